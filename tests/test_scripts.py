"""The real scripts, tiny, in subprocesses, on toy CT."""

import csv
from pathlib import Path

import numpy as np
import pytest

from common import toy
from common.tasks import leaks, load_task, split_of

ROOT = Path(__file__).parent.parent
TINY = ["--arch", "resnet18", "--size", 16, "--batch-size", 16, "--optimizer", "adamw"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, run):
    """A toy cohort of 3 patients with one file cut short, and its hash-6 selection."""
    folder = tmp_path_factory.mktemp("made")
    toy.write_cohort(folder / "ct", patients=3, slices=20)
    cut = sorted((folder / "ct").rglob("*.dcm"))[5]
    cut.write_bytes(cut.read_bytes()[:-500])
    done = run("reduce.py", folder / "ct", folder / "store", "--strategy", "hash", "--size", 32)
    return folder, cut, done.stdout


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_evaluate_writes_one_line_a_seed_and_its_scores(tmp_path, run, here):
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    toy.write_tasks(tmp_path, size=32)
    results = tmp_path / "results.csv"
    common = ["--results", results, "--arch", "resnet18", "--size", 32, "--seeds", 2]
    here(
        "evaluate.py",
        "toy-organ",
        tmp_path,
        "--encoder",
        "scratch",
        *common,
        "--protocol",
        "linear",
        "--name",
        "ALL",
    )
    run(
        "evaluate.py",
        "toy-lesion",
        tmp_path,
        "--encoder",
        "scratch",
        *common,
        "--epochs",
        2,
        "--freeze-epochs",
        1,
    )
    again = here(
        "evaluate.py",
        "toy-lesion",
        tmp_path,
        "--encoder",
        "scratch",
        *common,
        "--epochs",
        2,
        "--freeze-epochs",
        1,
    )
    assert again.count("done before") == 2
    rows = table(results)
    assert [(r["task"], r["name"], r["protocol"], r["seed"]) for r in rows] == [
        ("toy-organ", "ALL", "linear", "0"),
        ("toy-organ", "ALL", "linear", "1"),
        ("toy-lesion", "scratch", "finetune", "0"),
        ("toy-lesion", "scratch", "finetune", "1"),
    ]
    for row in rows:
        scores = np.load(
            tmp_path / "results-scores" / "{task}-{name}-{protocol}-{seed}.npz".format(**row)
        )
        labels, p = scores["labels"], scores["probabilities"]
        binary = p.shape[1] == 2
        expected = roc_auc_score(
            labels, p[:, 1] if binary else p / p.sum(1, keepdims=True), multi_class="ovr"
        )
        assert float(row["auc"]) == pytest.approx(expected, abs=2e-5) and len(labels) == int(
            row["test"]
        )
        assert float(row["f1"]) == pytest.approx(
            f1_score(labels, p.argmax(1), average="binary" if binary else "macro"), abs=1e-5
        )
        assert float(row["accuracy"]) == pytest.approx(
            accuracy_score(labels, p.argmax(1)), abs=1e-5
        )
    tables = here("evaluate.py", "tables", results)
    assert "| ALL | -" in tables and "0.830" in tables
    listed = table(tmp_path / "results-scores" / "near-duplicates-toy-organ.csv")
    task = load_task("toy-organ", tmp_path, 32)
    pairs = leaks(task, split_of(task, 0))
    assert [tuple(row.values()) for row in listed] == [
        (task.names[i], task.names[j], str(bits)) for i, j, bits in pairs
    ]
    assert (
        f"toy-lesion: {len(table(tmp_path / 'results-scores' / 'near-duplicates-toy-lesion.csv'))} of"
        in again
    )


@pytest.mark.parametrize(
    "command, words",
    [
        (["reduce.py", "{t}/none", "{t}/o", "--strategy", "all"], "no such folder"),
        (["reduce.py", "{t}", "{t}/o", "--strategy", "all"], "lies inside"),
        (["reduce.py", "{t}/empty", "{t}/o", "--strategy", "all"], "no CT slice"),
        (["pretrain.py", "{t}/none.csv", "{t}/r"], "no such selection"),
        (
            [
                "evaluate.py",
                "toy-organ",
                "{t}/none",
                "--encoder",
                "scratch",
                "--results",
                "{t}/r.csv",
            ],
            "no such file",
        ),
        (
            [
                "evaluate.py",
                "toy-organ",
                "{t}/empty",
                "--encoder",
                "scratch",
                "--results",
                "{t}/r.csv",
            ],
            "one is needed",
        ),
        (["evaluate.py", "tables", "{t}/none.csv"], "no such file"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, stopped, command, words):
    (tmp_path / "empty").mkdir()
    assert words in stopped(*(part.format(t=tmp_path) for part in command))


def test_an_error_is_one_line_and_no_traceback(tmp_path, run):
    done = run("reduce.py", tmp_path / "none", tmp_path / "o", "--strategy", "hash", ok=False)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
