"""Kills and full disks: one clear line, and nothing done is lost."""

import resource
import signal
import subprocess
from functools import partial

import faults
import pytest


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return faults.commands(tmp_path_factory.mktemp("faults"))


def test_a_killed_run_ends_like_an_undisturbed_one(commands, tmp_path):
    """tests/faults.py does this 20 times, also with pretrain.py and evaluate.py, slow to start."""
    kills = list(faults.same_after_kills(commands["reduce.py"], tmp_path, 2, seed=3))
    assert [different for _, different in kills] == [[], []]


def allow(size):
    """For preexec_fn: no file may grow beyond `size` bytes, much as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    "script, limits",
    [("reduce.py", [100, 1000, 20_000]), ("pretrain.py", [20_000]), ("evaluate.py", [100])],
)
def test_a_full_disk_gets_one_line_and_harms_nothing(
    commands, tmp_path, monkeypatch, script, limits
):
    """With room again, reduce.py goes on to its end; that the others do, tests/faults.py shows."""
    out = tmp_path / "out"
    faster = ["--protocol", "linear", "--seeds", 1] if script == "evaluate.py" else []
    popen = subprocess.Popen
    for limit in limits:
        monkeypatch.setattr(subprocess, "Popen", partial(popen, preexec_fn=partial(allow, limit)))
        process = faults.start([*commands[script](out), *faster])
        printed = process.communicate()[0]
        assert process.returncode == 1, printed
        assert "error: " in printed and "Traceback" not in printed
        for name in faults.content(out):
            # results.csv.lock stays: another evaluation may be waiting for it
            assert not name.endswith(".unfinished") and name != ".lock"
    monkeypatch.undo()
    if script == "reduce.py":
        faults.finish(commands[script](out))
