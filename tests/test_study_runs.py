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
        records = map(json.loads, (out / "runs.jsonl").read_text().splitlines())
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
    assert len(lines) == 4 * 2 * 4 and len(set(lines)) == 8  # one a task and kind of evaluation
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
    study("--seeds", 1)
    shutil.rmtree(study.out / "runs")
    assert "ALL-seed-0" in study("--seeds", 2).trained


def test_other_ct_is_refused(study):
    study("--seeds", 1, rows="ALL")
    (study.data / "ct" / "slice").write_text("other CT")
    done = study("--seeds", 2, rows="ALL", ok=False)
    assert "ALL seed 0 was trained on other CT: give another --out" in done.text
    assert done.trained == []


def test_what_is_not_whole_is_made_again(study):
    """As a killed study leaves it, or a copy of one at work."""
    study("--seeds", 1)
    lines = read_results(study.out / "results.csv")
    lines = [line for line in lines if (line["name"], line["task"]) != ("ALL", "head-ct")]
    write_results(study.out / "results.csv", lines)
    records = (study.out / "runs.jsonl").read_text().splitlines(keepends=True)
    records = [record for record in records if '"Random-matched"' not in record]
    (study.out / "runs.jsonl").write_text("".join(records) + '{"row": "Embedd')
    done = study("--seeds", 1)
    for row in ("ALL", "Random-matched"):
        assert f"{row} seed 0: not evaluated whole" in done.text
    assert "scratch seed 0: not" not in done.text
    evaluated = {c.split("--name ")[1].split()[0] for c in done.commands if "--name" in c}
    assert evaluated == {"ALL", "Random-matched"} and done.trained == []  # encoders are there
    assert done.runs == all_runs(1)


def test_an_edit_of_a_row_is_refused_for_that_row_alone(study):
    study("--seeds", 1)
    script = study.code / "reproduce.sh"
    text = script.read_text()
    script.write_text(text.replace("\nALL-masked  ", "\nALL-new | --strategy new |\nALL-masked  "))
    assert study("--seeds", 1).trained == []
    script.write_text(text.replace("--strategy random --like", "--strategy random --new --like"))
    done = study("--seeds", 1, ok=False)
    assert "Random-matched seed 0 was made by other code or other flags" in done.text
    study("--seeds", 1, rows="scratch ALL")
    assert "made by other code or other flags" in study("--steps", 5, ok=False).text


def test_another_encoder_to_embed_with_is_refused_for_its_rows_alone(study, tmp_path):
    study("--seeds", 1)
    encoder = tmp_path / "encoder.pt"
    encoder.write_text("one")
    given = ["--seeds", 1, "--embedding", encoder]
    assert "Embedding-budget seed 0 was made by other" in study(*given, ok=False).text
    assert study(*given, rows="scratch ALL").trained == []


def test_edited_code_is_refused_also_while_a_run_is_made(study):
    done = study("--seeds", 1, ok=False, rows="ALL Random-matched", EDIT="Random-matched-seed-0")
    assert done.runs == ["ALL-seed-0"]
    log = (study.out / "done" / "log-Random-matched-0.txt").read_text()
    assert "the code was edited while Random-matched seed 0 was made" in log
    done = study("--seeds", 1, ok=False, rows="ALL")
    assert "ALL seed 0 was made by other code" in done.text


def test_a_run_that_fails_stops_the_study(study):
    done = study("--seeds", 1, "--jobs", 2, ok=False, FAIL="Random-matched-seed-0")
    assert "a run of the study failed" in done.text and "Random-matched-seed-0" not in done.runs
    assert study("--seeds", 1).runs == all_runs(1)


def test_two_studies_in_one_folder(study):
    study("--seeds", 1, rows="scratch")
    with open(study.out / ".study-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another study is at work" in study("--seeds", 1, ok=False).text


def test_a_line_too_many_and_a_record_cut_short_harm_no_other_run(study):
    study("--seeds", 1, rows="scratch ALL")
    lines = read_results(study.out / "results.csv")
    write_results(study.out / "results.csv", [*lines, lines[0] | {"protocol": "finetune"}])
    with open(study.out / "runs.jsonl", "a") as file:
        file.write('{"row": "ALL", "se')
    done = study("--seeds", 2, rows="scratch ALL")
    assert "not evaluated whole" not in done.text and done.trained == ["ALL-seed-1"]
    assert done.runs == all_runs(2, "scratch ALL")
    (study.out / "results.csv").unlink()
    done = study("--seeds", 2, rows="scratch ALL", ok=False)
    assert "tells of runs: restore it" in done.text and done.runs == all_runs(2, "scratch ALL")
