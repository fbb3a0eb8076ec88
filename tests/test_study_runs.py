"""What reproduce.sh --study makes, makes again and refuses, with scripts that take no time."""

import csv
import fcntl
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from common.results import COLUMNS, read_results, write_results
from common.runs import OUTCOMES

ROWS = "scratch ALL Random-matched Embedding-budget"


@pytest.fixture
def study(tmp_path):
    """A folder to study in: study(flags, ok, **environment) runs it and returns its outputs."""
    code = tmp_path / "code"
    shutil.copytree(ROOT / "common", code / "common")
    for name in ("reduce.py", "pretrain.py", "evaluate.py", "reproduce.sh"):
        shutil.copy(ROOT / name, code)
    for name in ("ct", "organ", "covid-ct", "head-ct"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / "ct" / "slice").write_text("CT")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S {ROOT}/tests/fake_scripts.py "$@"\n')
    python.chmod(0o755)
    out, calls = tmp_path / "out", tmp_path / "calls.csv"

    def call(*flags, ok=True, rows=ROWS, **environment):
        calls.write_text("")
        command = ["bash", code / "reproduce.sh", "--study", tmp_path / "data", "--out", out]
        command += ["--rows", rows, *flags]
        environment |= {"PYTHON": str(python), "CALLS": str(calls)}
        environment["COLUMNS_OF_RESULTS"] = ",".join(COLUMNS)
        done = subprocess.run(
            [str(word) for word in command],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        with open(calls, newline="") as file:
            commands = list(csv.reader(file))
        text = (out / "runs.jsonl").read_text() if (out / "runs.jsonl").exists() else ""
        records = map(json.loads, text.splitlines())
        return SimpleNamespace(
            text=done.stdout + done.stderr,
            commands=[" ".join(words) for words in commands],
            trained=sorted(os.path.basename(w[2]) for w in commands if w[0] == "pretrain.py"),
            runs=sorted(f"{record['row']}-seed-{record['seed']}" for record in records),
        )

    call.code, call.out, call.data = code, out, tmp_path / "data"
    return call


def all_runs(seeds, rows=ROWS):
    return sorted(f"{row}-seed-{seed}" for row in rows.split() for seed in range(seeds))


def test_two_jobs_make_every_run_once(study):
    """Embedding, which selects by the encoder of ALL, waits for it."""
    done = study("--seeds", 2, "--jobs", 2, SLOW="ALL-seed-0")
    assert done.runs == all_runs(2)
    assert done.trained == [run for run in all_runs(2) if not run.startswith("scratch")]
    lines = [(line["name"], line["seed"]) for line in read_results(study.out / "results.csv")]
    assert len(lines) == 4 * 2 * len(OUTCOMES) and len(set(lines)) == 8
    # a run's test scores are bootstrapped before it counts
    assert sum(command.startswith("evaluate.py tables") for command in done.commands) == 8 + 1
    again = study("--seeds", 2, "--jobs", 2)
    assert again.trained == [] and again.runs == all_runs(2)


def test_a_study_goes_on_where_only_its_results_are(study):
    study("--seeds", 1)
    for name in ("runs", "slices", "done"):
        shutil.rmtree(study.out / name)
    done = study("--seeds", 2)
    # ALL is trained once more, since Embedding selects by its encoder
    expected = ["ALL-seed-0", "ALL-seed-1", "Embedding-budget-seed-1", "Random-matched-seed-1"]
    assert done.trained == expected and done.runs == all_runs(2)


def test_encoders_that_are_gone_are_trained_again_where_they_are_needed(study):
    study("--seeds", 1, rows="Embedding-budget")
    shutil.rmtree(study.out / "runs")
    assert "ALL-seed-0" in study("--seeds", 2, rows="Embedding-budget").trained


def test_other_ct_is_refused(study):
    study("--seeds", 1, rows="ALL")
    (study.data / "ct" / "slice").write_text("other CT")
    done = study("--seeds", 2, rows="ALL", ok=False)
    assert "ALL seed 0 was trained on other CT: give another --out" in done.text
    assert done.trained == []


def test_what_is_not_whole_is_made_again(study):
    """As a killed study leaves it, or a copy of one at work."""
    rows = "scratch ALL Random-matched"
    study("--seeds", 1, rows=rows)
    lines = read_results(study.out / "results.csv")
    lines = [line for line in lines if (line["name"], line["task"]) != ("ALL", "head-ct")]
    write_results(study.out / "results.csv", lines)
    records = (study.out / "runs.jsonl").read_text().splitlines(keepends=True)
    records = [record for record in records if '"Random-matched"' not in record]
    (study.out / "runs.jsonl").write_text("".join(records) + '{"row": "Embedd')
    done = study("--seeds", 1, rows=rows)
    for row in ("ALL", "Random-matched"):
        assert f"{row} seed 0: not evaluated whole" in done.text
    assert "scratch seed 0: not" not in done.text
    evaluated = {c.split("--name ")[1].split()[0] for c in done.commands if "--name" in c}
    assert evaluated == {"ALL", "Random-matched"} and done.trained == []  # encoders are there
    assert done.runs == all_runs(1, rows)


REFUSED = "was made by other code or other flags: give another --out"


def test_an_edit_of_a_row_with_runs_is_refused_whatever_rows_are_to_be_made(study):
    study("--seeds", 1, rows="ALL Random-matched")
    script = study.code / "reproduce.sh"
    text = script.read_text()
    edited = text.replace("\nALL-masked  ", "\nALL-new | --strategy new |\nALL-masked  ", 1)
    script.write_text(edited)
    assert study("--seeds", 1, rows="ALL Random-matched").trained == []
    script.write_text(text.replace("--strategy random --like", "--strategy random --new --like"))
    for rows in ("Random-matched", "EveryN"):
        done = study("--seeds", 2, rows=rows, ok=False)
        assert f"Random-matched seed 0 {REFUSED}" in done.text and done.trained == []


@pytest.mark.parametrize("flags", [["--steps", 5], ["--pretrain", "--lr 1"], ["--reduce", "--x 1"]])
def test_other_flags_are_refused_whatever_rows_are_to_be_made(study, flags):
    study("--seeds", 1, rows="ALL")
    assert f"ALL seed 0 {REFUSED}" in study(*flags, rows="EveryN", ok=False).text


def test_another_encoder_to_embed_with_is_refused(study, tmp_path):
    study("--seeds", 1, rows="ALL")
    encoder = tmp_path / "encoder.pt"
    encoder.write_text("one")
    assert study("--seeds", 1, "--embedding", encoder, rows="ALL").trained == []
    study("--seeds", 1, "--embedding", encoder)
    encoder.write_text("two")
    done = study("--seeds", 1, "--embedding", encoder, ok=False)
    assert f"Embedding-budget seed 0 {REFUSED}" in done.text


def test_a_machine_of_another_precision_is_refused_before_any_training(study):
    study("--seeds", 1, rows="scratch ALL")
    done = study("--seeds", 2, rows="scratch ALL", ok=False, PRECISION="float32")
    assert "ALL seed 0 was trained on cpu torch.bfloat16, this machine is cpu" in done.text
    assert done.trained == []
    assert study("--seeds", 2, rows="scratch ALL").trained == ["ALL-seed-1"]


def test_edited_code_is_refused_also_while_a_run_is_made(study):
    done = study("--seeds", 1, ok=False, rows="ALL Random-matched", EDIT="Random-matched-seed-0")
    assert done.runs == ["ALL-seed-0"]
    log = (study.out / "done" / "log-Random-matched-0.txt").read_text()
    assert "the code was edited while Random-matched seed 0 was made" in log
    done = study("--seeds", 1, ok=False, rows="EveryN")
    assert f"ALL seed 0 {REFUSED}" in done.text


def test_a_run_that_fails_stops_the_study(study):
    done = study("--seeds", 1, "--jobs", 2, ok=False, FAIL="Random-matched-seed-0")
    assert "a run of the study failed" in done.text and "Random-matched-seed-0" not in done.runs
    assert study("--seeds", 1).runs == all_runs(1)


def test_two_studies_in_one_folder(study):
    study("--seeds", 1, rows="scratch")
    with open(study.out / ".study-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another study is at work" in study("--seeds", 1, ok=False).text


def test_lines_that_are_not_of_the_study_harm_no_run_and_are_kept(study):
    study("--seeds", 1, rows="scratch ALL")
    lines = read_results(study.out / "results.csv")
    others = [lines[0] | {"protocol": "finetune", "seed": str(seed)} for seed in range(5)]
    others += [line | {"name": "imagenet"} for line in lines[:2]]
    write_results(study.out / "results.csv", [*lines, *others])
    done = study("--seeds", 2, rows="scratch ALL")
    assert "not evaluated whole" not in done.text and done.trained == ["ALL-seed-1"]
    assert done.runs == all_runs(2, "scratch ALL")
    kept = read_results(study.out / "results.csv")
    assert [line for line in kept if line in others] == others


def test_a_run_that_a_merge_has_doubled_is_made_again(study):
    study("--seeds", 1, rows="scratch ALL")
    path = study.out / "results.csv"
    lines = read_results(path)
    others = [line | {"encoder": "another"} for line in lines if line["name"] == "ALL"]
    write_results(path, [*lines, *others])
    done = study("--seeds", 1, rows="scratch ALL")
    assert "ALL seed 0: not evaluated whole" in done.text and done.runs == all_runs(
        1, "scratch ALL"
    )
    assert len(read_results(path)) == 2 * len(OUTCOMES)
    path.write_text(path.read_text() + "=======\n")
    assert "cut short, or of a merge" in study("--seeds", 1, rows="scratch ALL", ok=False).text


def test_results_of_other_encoders_than_the_records_are_made_again(study):
    """As results.csv and runs.jsonl of two machines leave them; what is dropped is kept apart."""
    study("--seeds", 1, rows="scratch ALL")
    path = study.out / "results.csv"
    lines = [line | {"encoder": f"{line['name']} elsewhere"} for line in read_results(path)]
    write_results(path, lines)
    done = study("--seeds", 1, rows="scratch ALL")
    assert "ALL seed 0: not evaluated whole" in done.text
    assert "elsewhere" not in path.read_text()
    assert read_results(study.out / "results-dropped.csv") == lines


@pytest.mark.parametrize("name", ["results.csv", "runs.jsonl"])
def test_a_file_of_the_study_that_is_lost_is_missed(study, name):
    study("--seeds", 1, rows="scratch ALL")
    files = {path.name: path.read_text() for path in study.out.glob("r*.[cj]s*")}
    (study.out / name).unlink()
    assert "restore it" in study("--seeds", 2, rows="EveryN", ok=False).text
    (study.out / name).write_text(files[name])
    assert study("--seeds", 1, rows="scratch ALL").trained == []


def test_results_older_than_the_records_are_made_again(study):
    """As a commit in the middle of a run leaves them."""
    rows = "scratch ALL Random-matched"
    study("--seeds", 1, rows=rows)
    lines = read_results(study.out / "results.csv")
    write_results(study.out / "results.csv", [line for line in lines if line["name"] == "ALL"])
    done = study("--seeds", 1, rows=rows)
    assert "scratch seed 0: not evaluated whole" in done.text and done.runs == all_runs(1, rows)
    assert len(read_results(study.out / "results.csv")) == 3 * len(OUTCOMES)
