"""The real scripts, tiny, in subprocesses, on toy CT."""

import csv
from pathlib import Path

import pytest

from common import toy

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
