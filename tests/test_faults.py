"""Kills and full disks: one clear line, and nothing done is lost.

KILLS=20 python -m pytest tests/test_faults.py    # kills of every script, at random moments
"""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from conftest import ROOT

KILLS = int(os.environ.get("KILLS", 0))
SCRIPTS = ["reduce.py", "pretrain.py", "evaluate.py"] if KILLS else ["reduce.py"]  # quick to start
# what differs between equal runs
TIMES = {"seconds", "mtime_ns", "images_per_second", "waiting", "command", "pretrain_seconds"}
SAVE_AFTER_EVERY_STEP = (
    "import pretrain; from common.files import run_script; "
    "pretrain.SAVE_EVERY = 0; run_script(pretrain.main)"
)


@pytest.fixture(scope="module")
def commands(cohort, tasks):
    """{script: function of the output folder that gives its command}."""
    small = ["--arch", "resnet18", "--size", 32, "--epochs"]
    pretrain = ["-c", SAVE_AFTER_EVERY_STEP, cohort / "store" / "hash-6.csv"]
    training = [*small, 6, "--optimizer", "adamw", "--batch-size", 8]
    evaluate = ["evaluate.py", "toy-organ", tasks, "--encoder", "scratch", "--seeds", 3]
    ssim = ["--strategy", "ssim", "--keep", 0.2]
    return {
        "reduce.py": lambda out: ["reduce.py", cohort / "ct", out, *ssim],
        "pretrain.py": lambda out: [*pretrain, out, *training],
        "evaluate.py": lambda out: [*evaluate, *small, 2, "--results", out / "results.csv"],
    }


def start(command, **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **output, **more)


def content(folder):
    """{file: what it holds, without times} of everything below folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): without_times(path) for path in files}


def without_times(path):
    if path.suffix not in (".json", ".jsonl", ".csv"):
        return path.read_bytes()
    text = path.read_text()
    if path.suffix == ".csv":
        lines = list(csv.DictReader(text.splitlines()))
    elif path.suffix == ".json":
        lines = [json.loads(text)]
    else:  # a kill may leave the bootstrap of a line that never came
        lines = [json.loads(line) for line in dict.fromkeys(text.splitlines())]
    return [{key: line[key] for key in line if key not in TIMES} for line in lines]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_run_ends_like_an_undisturbed_one(commands, tmp_path, run, script):
    command, out = commands[script], tmp_path / "killed"
    started = time.perf_counter()
    run(*command(tmp_path / "undisturbed"))
    seconds = time.perf_counter() - started
    expected = content(tmp_path / "undisturbed")
    rng = np.random.default_rng(3)
    kills = 0
    while kills < (KILLS or 2):
        process = start(command(out))
        time.sleep(rng.uniform(0.2, 1) * seconds)
        running = process.poll() is None
        process.kill()
        # ends with the last process that holds its output: workers must not wait for ever
        process.communicate(timeout=20)
        if running:
            kills += 1
            run(*command(out))
            assert content(out) == expected
        else:
            seconds *= 0.9  # it is faster than the first
        shutil.rmtree(out, ignore_errors=True)


def allow(size):
    """For preexec_fn: no file may grow beyond `size` bytes, much as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    "script, limits",
    [("reduce.py", [100, 1000, 20_000]), ("pretrain.py", [20_000]), ("evaluate.py", [100])],
)
def test_a_full_disk_gets_one_line_and_harms_nothing(commands, tmp_path, run, script, limits):
    """With room again, reduce.py goes on to its end; that the others do, KILLS=20 shows."""
    out = tmp_path / "out"
    faster = "--protocol linear --seeds 1 --label-share 0.1 --draws 1".split()
    for limit in limits:
        command = commands[script](out) + (faster if script == "evaluate.py" else [])
        process = start(command, preexec_fn=partial(allow, limit))
        printed = process.communicate()[0]
        assert process.returncode == 1, printed
        assert "error: " in printed and "Traceback" not in printed
        assert not list(out.rglob("*.unfinished"))
    if script == "reduce.py":
        run(*commands[script](out))
