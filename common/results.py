"""results.csv and the test scores beside it."""

import csv
from pathlib import Path

import numpy as np

from common.files import atomic_write, fail

COLUMNS = [
    "task",
    "name",
    "encoder",
    "protocol",
    "seed",
    "label_share",
    "folds",
    "train",
    "val",
    "test",
    "auc",
    "auc_sd",
    "f1",
    "accuracy",
    "seconds",
    "slices",
    "steps",
    "dose",
    "pretrain_seconds",
    "settings",
    "code",
]
KEY = ["task", "name", "protocol", "label_share", "folds", "seed"]  # one line each


def read_results(path):
    """results.csv as a list of dicts of strings; empty where there is no file."""
    if not Path(path).is_file():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            fail(f"{path}: not a results file: its columns must be {','.join(COLUMNS)}")
        return list(reader)


def scores_folder(results):
    results = Path(results)
    return results.with_name(f"{results.stem}-scores")


def scores_file(results, row):
    """Where the test scores of a line lie."""
    name = "{task}-{name}-{protocol}".format(**row)
    if row["label_share"] != "1":
        name += f"-share-{row['label_share']}"
    if row["folds"]:
        name += f"-folds-{row['folds']}"
    return scores_folder(results) / f"{name}-{row['seed']}.npz"


def read_scores(results, row):
    """Test scores of a line: (images [n], labels [n], groups [n], probabilities)."""
    path = scores_file(results, row)
    try:
        with np.load(path) as scores:
            return tuple(scores[key] for key in ("images", "labels", "groups", "probabilities"))
    except (OSError, KeyError, ValueError) as error:
        fail(f"{path}: scores missing or damaged ({error}): delete its line and evaluate again")


def write_line(results, row, images, labels, groups, probabilities):
    """Save the test scores, then add the line, in place of one with the same key."""
    with atomic_write(scores_file(results, row)) as file:
        scores = probabilities.astype(np.float32)
        np.savez(file, images=images, labels=labels, groups=groups, probabilities=scores)
    row = {key: str(value) for key, value in row.items()}
    others = [old for old in read_results(results) if any(old[key] != row[key] for key in KEY)]
    with atomic_write(results, text=True) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*others, row])
