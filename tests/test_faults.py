"""Kills, full disks and folders that cannot be used: one clear line, and nothing done is lost."""

import json
import resource
import shutil
import signal
import subprocess
from functools import partial

import faults
import numpy as np
import pytest
import torch

from common import toy
from common.encoder import load_encoder


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


def test_folders_that_reduce_cannot_use(store, stopped, tmp_path):
    (tmp_path / "file").touch()
    shutil.copytree(store / "ct", tmp_path / "other" / "ct")
    (tmp_path / "other" / "ct" / "more").touch()

    def line(data, out):
        return stopped("reduce.py", data, out, "--strategy", "hash", "--size", 32)

    assert "no such folder" in line(tmp_path / "none", tmp_path / "o")
    assert "Not a directory" in line(store / "ct", tmp_path / "file" / "o")
    assert "File exists" in line(store / "ct", tmp_path / "file")
    assert "lies inside" in line(store / "ct", store / "ct" / "o")
    assert "lies inside" in line(tmp_path / "other" / "ct", tmp_path / "other")
    assert "was made from other input" in line(tmp_path / "other" / "ct", store / "out")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    assert "no CT slice found; 1 files skipped, most: not a DICOM file" in line(
        tmp_path / "text", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists()


def edit(text, row, *cells):
    lines = text.splitlines()
    lines[row] = ",".join(cells)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "name, harm, words",
    [
        ("hash-6", lambda text: text.replace("kept", "keep", 1), "needs the columns row and kept"),
        ("hash-6", lambda text: edit(text, 3, "2", "yes", "0", "1"), "in whole numbers"),
        ("hash-6", lambda text: edit(text, 3, "2", "2", "0", "1"), "row 2: kept must be 0 or 1"),
        ("hash-6", lambda text: edit(text, 3, "7", "1", "0", "1"), "must list the rows 0 to"),
        ("hash-6", lambda text: text + "99999,1,0,0\n", "must list the rows 0 to"),
        ("hash-6", lambda text: text + "9" * 30 + ",1,0,0\n", "in whole numbers"),
        ("hash-6", lambda text: "\n".join(text.splitlines()[:-1]), "must list the rows 0 to"),
        ("hash-6", lambda text: text.replace(",1,", ",0,"), "keeps no slice"),
        ("hash-6", lambda text: "", "needs the columns row and kept"),
        ("hash-6", lambda text: edit(text, 3, "2", "1", "99999", "0"), "another store"),
    ],
)
def test_a_selection_that_was_edited_wrongly_is_refused(
    store, stopped, tmp_path, name, harm, words
):
    shutil.copytree(store / "out", tmp_path / "out")
    path = tmp_path / "out" / f"{name}.csv"
    path.write_text(harm(path.read_text()))
    assert words in stopped("pretrain.py", path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_selection_of_another_store_is_refused(store, stopped, tmp_path, run):
    """Of as many slices: hash selections are known by their bits, the others by the .json beside them."""
    shutil.copytree(store / "ct", tmp_path / "ct")
    first = sorted((tmp_path / "ct").rglob("*.dcm"))[0]
    data = bytearray(first.read_bytes())
    data[-20000:] = np.random.default_rng(0).integers(0, 8, 20000, np.uint8).tobytes()
    first.write_bytes(data)
    run("reduce.py", tmp_path / "ct", tmp_path / "out", "--strategy", "every-n", "--size", 32)
    shutil.copy(store / "out" / "hash-6.csv", tmp_path / "out")
    for ending in ("csv", "json"):
        shutil.copy(store / "out" / f"ssim-0.7.{ending}", tmp_path / "out")
    for name in ("hash-6", "ssim-0.7"):
        assert "was made for another store" in stopped(
            "pretrain.py", tmp_path / "out" / f"{name}.csv", tmp_path / "run"
        )


def test_a_damaged_checkpoint_or_log_is_refused(store, stopped, tmp_path):
    """Neither trained on nor overwritten."""
    flags = ["--arch", "resnet18", "--size", 16, "--steps", 2]
    for content in (b"", b"junk", b"PK\x03\x04"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
        assert "damaged" in stopped(
            "pretrain.py", store / "out" / "hash-6.csv", tmp_path / "run", *flags
        )
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == content
    torch.save(load_encoder("scratch", "resnet18", 0).state_dict(), tmp_path / "run" / "encoder.pt")
    for content in ("", "{", json.dumps({"settings": 3})):
        (tmp_path / "run" / "log.jsonl").write_text(content)
        assert "delete" in stopped(
            "pretrain.py", store / "out" / "hash-6.csv", tmp_path / "run", *flags
        )
