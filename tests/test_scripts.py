"""The real scripts, tiny, in subprocesses, on toy CT."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common import toy
from common.encoder import load_encoder
from common.files import exclusive
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


def test_pretrain_resumes_to_the_same_bytes(made, run, stopped, capsys, tmp_path):
    """A run stopped half-way (as its checkpoint is on disk) ends like one that was not."""
    folder, _, _ = made
    selection = folder / "store" / "hash-6.csv"
    run("pretrain.py", selection, tmp_path / "a", "--steps", 6, *TINY)
    program = (
        "import pretrain, time; pretrain.SAVE_EVERY = 0; real = pretrain.save\n"
        "def save(path, state):\n"
        "    real(path, state)\n"
        "    if state.get('step') == 3: raise SystemExit(9)\n"
        "pretrain.save = save; pretrain.main()"
    )
    run("-c", program, selection, tmp_path / "b", "--steps", 6, *TINY, ok=False)
    assert not (tmp_path / "b" / "encoder.pt").exists()
    assert (
        "going on at step 3"
        in run("pretrain.py", selection, tmp_path / "b", "--steps", 6, *TINY).stdout
    )
    assert (tmp_path / "a" / "encoder.pt").read_bytes() == (
        tmp_path / "b" / "encoder.pt"
    ).read_bytes()
    assert (
        stopped("pretrain.py", selection, tmp_path / "a", "--steps", 6, *TINY) == ""
        and "nothing to do" in capsys.readouterr().out
    )
    assert "other settings (steps 6 -> 7)" in stopped(
        "pretrain.py", selection, tmp_path / "a", "--steps", 7, *TINY
    )
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert {"settings", "versions"} <= set(lines[0]) and lines[-1]["step"] == 6
    assert set(load_encoder(tmp_path / "a" / "encoder.pt", "resnet18", 0).state_dict()) == set(
        torch.load(tmp_path / "a" / "encoder.pt", weights_only=True)
    )


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


def test_a_damaged_store_is_noticed(made, run, stopped, tmp_path):
    shutil.copytree(made[0] / "store", tmp_path / "store")
    whole = (tmp_path / "store" / "slices.npy").read_bytes()
    for harm in (whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], whole[:-1], b""):
        (tmp_path / "store" / "slices.npy").write_bytes(harm)
        assert "damaged" in stopped(
            "pretrain.py", tmp_path / "store" / "hash-6.csv", tmp_path / "run", *TINY
        )
        assert "damaged" in stopped(
            "reduce.py", made[0] / "ct", tmp_path / "store", "--strategy", "hash", "--size", 32
        )
    for harm in ("", "{", "[]"):
        (tmp_path / "store" / "store.json").write_text(harm)
        assert "damaged" in stopped(
            "pretrain.py", tmp_path / "store" / "hash-6.csv", tmp_path / "run", *TINY
        )
        assert "damaged" in stopped(
            "reduce.py", made[0] / "ct", tmp_path / "store", "--strategy", "hash", "--size", 32
        )
    (tmp_path / "store" / "store.json").unlink()  # as in a store made by hand
    assert "not an array of slices" in stopped(
        "pretrain.py", tmp_path / "store" / "hash-6.csv", tmp_path / "run", *TINY
    )


def test_a_second_run_in_the_same_folder_stops(made, stopped):
    with exclusive(made[0] / "store"):
        assert "another run" in stopped(
            "reduce.py", made[0] / "ct", made[0] / "store", "--strategy", "hash", "--size", 32
        )
    assert not (made[0] / "store" / ".lock").exists()


def test_ctrl_c_ends_with_one_line(made, tmp_path):
    command = [
        sys.executable,
        "pretrain.py",
        made[0] / "store" / "hash-6.csv",
        tmp_path / "run",
        "--epochs",
        9999,
        *TINY,
    ]
    heeds = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs start with it ignored
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heeds
    )
    while not (tmp_path / "run" / "log.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert (
        process.returncode == 1
        and stderr.splitlines()[-1].startswith("stopped:")
        and "Traceback" not in stderr
    )
    assert (
        not list((tmp_path / "run").glob("*.unfinished"))
        and not (tmp_path / "run" / ".lock").exists()
    )


def test_a_reproduction_of_the_row_that_needs_another(tmp_path, run):
    """Embedding selects with the encoder of ALL, so that is pre-trained first."""
    command = ["reproduce.sh", "--out", tmp_path / "out", "--rows", "Embedding"]
    command += ["--pretrain", "--arch resnet18 --size 16 --steps 3 --optimizer adamw"]
    command += ["--evaluate", "--protocol linear --arch resnet18 --size 32 --seeds 2"]
    done = run(*command, program="bash")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert text in done.stdout and "| Embedding |" in text and "pretrain-ALL-0" in done.stdout
    assert len(table(tmp_path / "out" / "results.csv")) == 2 * 2
    again = run(*command, program="bash")
    assert "pretrain-" not in again.stdout and text in again.stdout
