"""reproduce.sh, tiny: rows, resuming, flags that are refused before the work begins."""

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import write_covid_ct
from PIL import Image

from common import toy
from common.files import one_digest

ROOT = Path(__file__).parent.parent
PRETRAIN = "--arch resnet18 --size 32 --batch-size 16 --steps 2 --optimizer adamw"
EVALUATE = "--protocol linear --arch resnet18 --size 32 --seeds 2"
ROWS = "Embedding-steps-x2"


@pytest.fixture(scope="module")
def made(tmp_path_factory, run):
    """Two finished processes, made at once on two cores: two runs of every row; a study of one run.

    With the command of each. What the study looks after, test_study_runs.py tries with scripts that
    take no time.
    """
    folder = tmp_path_factory.mktemp("made")
    rows = ["reproduce.sh", "--out", folder / "rows", "--seeds", 2, "--rows", ROWS]
    rows += ["--reduce", "--size 32", "--pretrain", PRETRAIN, "--evaluate", EVALUATE]
    write_study_data(folder / "data")
    study = ["reproduce.sh", "--study", folder / "data", "--out", folder / "study"]
    study += ["--rows", "ALL-steps-x3", "--seeds", 1, "--jobs", 2, "--reduce", "--size 32"]
    study += ["--pretrain", "--arch resnet18 --size 32 --batch-size 16 --optimizer adamw"]
    study += ["--evaluate", "--protocol linear --arch resnet18 --size 32", "--steps", 1]
    with ThreadPoolExecutor() as pool:
        of_rows, of_study = (pool.submit(run, *made, program="bash") for made in (rows, study))
    return {
        "rows": (folder / "rows", rows, of_rows.result()),
        "study": (folder / "study", study, of_study.result()),
    }


def write_study_data(data):
    rng = np.random.default_rng(0)
    toy.write_cohort(data / "ct", patients=2, slices=12)
    write_covid_ct(data / "covid-ct", images=6)
    (data / "head-ct").mkdir()
    for i in range(20):
        pixels = rng.integers(0, 256, (40, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(data / "head-ct" / f"{i:03d}.png")
    labels = "".join(f"{i},{i % 2}\n" for i in range(20))
    (data / "head-ct" / "labels.csv").write_text("id,hemorrhage\n" + labels)
    toy.write_tasks(data, size=32)
    (data / "organ").mkdir()
    (data / "toy-organ.npz").rename(data / "organ" / "organ.npz")


def test_every_row_is_in_the_tables_with_an_interval_over_runs(made):
    """Embedding selects with the encoder of ALL, so that is pre-trained first, though no row."""
    out, _, done = made["rows"]
    text = (out / "tables.md").read_text()
    assert text in done.stdout and "pretrain-ALL-0" in done.stdout
    assert (out / "figure.svg").exists()
    for row in ROWS.split():
        [line] = [line for line in text.splitlines() if line.startswith(f"| {row} |")][:1]
        assert line.count("±") == 2
    with open(out / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 2 * len(ROWS.split())
    assert {line["steps"] for line in lines} == {"4"}
    assert all(float(line["dose"]) >= 0 for line in lines)


def test_a_second_call_does_nothing_again(made, run):
    out, command, _ = made["rows"]
    again = run(*command, program="bash").stdout
    assert "---" not in again.split("# ")[0] and (out / "tables.md").read_text() in again


def test_a_line_that_is_deleted_is_evaluated_again(made, run):
    out, command, _ = made["rows"]
    *lines, last = (out / "results.csv").read_text().splitlines(keepends=True)
    tables = (out / "tables.md").read_text()
    (out / "results.csv").write_text("".join(lines))
    again = run(*command, program="bash").stdout
    assert again.count("\n--- ") == 1 and (out / "tables.md").read_text() == tables
    assert len((out / "results.csv").read_text().splitlines()) == len(lines) + 1


def test_a_study_of_one_run(made):
    """Evaluated on all tasks."""
    out, _, done = made["study"]
    assert "1 of 151 planned runs" in done.stdout
    assert done.stdout.endswith((out / "README.md").read_text())
    [record] = map(json.loads, (out / "runs.jsonl").read_text().splitlines())
    assert record["row"] == "ALL-steps-x3" and record["log"]["settings"]["steps"] == 3
    assert (out / "results-draws.jsonl").exists() and (out / "figure.svg").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rows", "ALL Hash-9 Hash-x"], "--rows: Hash-x is not a row"),
        (["--rows", "ALL-steps-y2"], "--rows: ALL-steps-y2 is not a row"),
        (["--rows", "ALL-steps-x0"], "--rows: ALL-steps-x0 is not a row"),
        (["--embedding", "nowhere.pt"], "--embedding nowhere.pt: no such file"),
        (["--seeds", "0"], "--seeds 0: must be a whole number"),
        (["--pretrain", "--epoch-size=100"], "pretrain.py: error"),
        (["--seeds", "3", "--evaluate", "--seeds 2"], "--seeds 2 leaves some of the 3 encoders"),
        (["--pretrain", "--device nonsense"], "nonsense is no device"),
        (["--pretrain", "--help"], "error: pretrain selection.csv run --help"),
        (["--reduce", "--size 0"], "--size 0 is not a number of pixels"),
        (
            ["--pretrain", "--size 16 --precision bfloat16 --device cpu"],
            "needs more than 16 pixels",
        ),
        (["--data", "nowhere"], "nowhere/ct: no such folder"),
        (["--nothing"], "--nothing is not an option"),
        (["--out"], "--out needs a value"),
        (["--steps", "5"], "--steps is for --study"),
    ],
)
def test_wrong_flags_are_refused_before_any_work(tmp_path, run, flags, message):
    (tmp_path / "out" / "toy").mkdir(parents=True)
    (tmp_path / "out" / "toy" / "code.txt").write_text(one_digest("common/toy.py") + "\n")
    done = run("reproduce.sh", "--out", tmp_path / "out", *flags, program="bash", ok=False)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "slices").exists()
