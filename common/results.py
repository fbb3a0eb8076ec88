"""results.csv, one line an evaluated encoder, and the test scores of each line beside it."""

import csv
from pathlib import Path

import numpy as np

from common.files import atomic_write, fail, locked

COLUMNS = [
    "task",
    "name",  # row of the tables
    "encoder",  # encoder_hash
    "protocol",  # finetune or linear
    "seed",  # finetune: of head and order of images; linear: of the pre-training or of scratch
    "label_share",  # of the training labels: 1, or such as 0.01
    "folds",  # such as 5x10, folds x repeats; empty: the task's split
    "train",  # images
    "val",
    "test",
    "auc",
    "auc_sd",  # over the draws of labels, or over the repeats
    "f1",
    "accuracy",
    "seconds",  # of the evaluation, with its features
    "slices",  # these four from the log beside the encoder
    "steps",
    "dose",
    "pretrain_seconds",
    "settings",
    "code",
]
SCORES = ["images", "labels", "groups", "probabilities"]  # arrays of a line's npz
KEY = ["task", "name", "protocol", "seed", "label_share", "folds"]  # a line replaces its like


def read_results(path):
    """results.csv as a list of dicts of strings; empty where there is no file."""
    if not Path(path).is_file():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            fail(
                f"{path}: not a results file of this version of evaluate.py, whose columns are "
                f"{','.join(COLUMNS)}: give another --results"
            )
        return list(reader)


def scores_folder(results):
    """results-scores/ beside results.csv."""
    results = Path(results)
    return results.with_name(f"{results.stem}-scores")


def scores_file(results, row):
    """results-scores/TASK-NAME-PROTOCOL[-share-0.01][-folds-5x10]-SEED.npz of a line."""
    share = f"-share-{row['label_share']}" if row["label_share"] != "1" else ""
    folds = f"-folds-{row['folds']}" if row["folds"] else ""
    name = f"{row['task']}-{row['name']}-{row['protocol']}{share}{folds}-{row['seed']}.npz"
    return scores_folder(results) / name


def read_scores(results, row):
    """(images, labels, groups, probabilities) of a line's tested images.

    images: int [n], rows of the task. labels: int [n]. groups: int [n], images of one group are not
    independent. probabilities: float32 [n, classes], or [parts, n, classes] of a line that is a
    mean over parts: draws of labels, or every fold of every repeat (NaN for images not in it).
    """
    path = scores_file(results, row)
    try:
        with np.load(path) as scores:
            return tuple(scores[key] for key in SCORES)
    except Exception as error:  # whatever a damaged file makes numpy and zipfile raise
        fail(
            f"{path}: scores missing or damaged ({type(error).__name__}): "
            f"delete the line from {results} and evaluate again"
        )


def write_line(results, row, images, labels, groups, probabilities):
    """Save the scores, then add the line to results.csv, in place of one with the same KEY.

    Locked for this moment only, so that several evaluations share a results.csv.
    """
    with locked(results):
        with atomic_write(scores_file(results, row)) as file:
            arrays = images, labels, groups, probabilities.astype(np.float32)
            np.savez_compressed(file, **dict(zip(SCORES, arrays)))
        others = [old for old in read_results(results) if not same(old, row, KEY)]
        write_results(results, [*others, row])


def write_results(results, rows):
    with atomic_write(results, text=True) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def same(old, row, keys):
    """Whether a line read from results.csv has the values of row in these columns."""
    return all(old[key] == str(row[key]) for key in keys)
