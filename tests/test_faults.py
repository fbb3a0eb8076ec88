"""Kills, full disks and folders that cannot be used: one clear line, and nothing done is lost."""

import resource
import signal
import subprocess
from functools import partial

import faults
import pytest

from common import toy


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return faults.commands(tmp_path_factory.mktemp("faults"))


def test_a_killed_run_ends_like_an_undisturbed_one(commands, tmp_path):
    """tests/faults.py does this 20 times, and with pretrain.py and evaluate.py, which take longer to start."""
    assert all(
        equal for _, equal in faults.same_after_kills(commands["reduce.py"], tmp_path, 2, seed=3)
    )


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
    """With room again, reduce.py goes on to its end; that the others do shows tests/faults.py."""
    out, popen = tmp_path / "out", subprocess.Popen
    for limit in limits:
        monkeypatch.setattr(subprocess, "Popen", partial(popen, preexec_fn=partial(allow, limit)))
        process = faults.start(commands[script](out))
        printed = process.communicate()[0]
        assert process.returncode == 1 and "Traceback" not in printed and "error: " in printed, (
            printed
        )
        assert not out.exists() or not [
            name for name in faults.content(out) if name.endswith((".unfinished", ".lock"))
        ]
    monkeypatch.undo()
    if script == "reduce.py":
        faults.finish(commands[script](out))


@pytest.fixture(scope="module")
def store(tmp_path_factory, run):
    """ct/, and out/ with the selections hash-6 and ssim-0.7."""
    folder = tmp_path_factory.mktemp("store")
    toy.write_cohort(folder / "ct", patients=2, slices=12)
    for strategy in ("hash", "ssim"):
        run("reduce.py", folder / "ct", folder / "out", "--strategy", strategy, "--size", 32)
    return folder
