"""pretrain.py, tiny: resuming, refusals, what the log says."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import pretrain
from common import files, toy
from common.encoder import load_encoder

ROOT = Path(__file__).parent.parent
TINY = ["--arch", "resnet18", "--size", 32, "--batch-size", 8, "--optimizer", "adamw"]


@pytest.fixture(scope="module")
def store(tmp_path_factory, run):
    """A folder with the selections all and hash-6 of 3 toy patients."""
    folder = tmp_path_factory.mktemp("pretrain")
    toy.write_cohort(folder / "ct", patients=3, slices=20)
    for strategy in ("all", "hash"):
        run("reduce.py", folder / "ct", folder / "out", "--strategy", strategy, "--size", 32)
    return folder / "out"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stop_after(monkeypatch, step):
    """Save a checkpoint at every step, and end the run once that of `step` is on disk."""
    save_checkpoint = pretrain.save_checkpoint

    def save_and_stop(run, done, *state):
        save_checkpoint(run, done, *state)
        if done == step:
            raise SystemExit("killed")

    monkeypatch.setattr(pretrain, "SAVE_EVERY", 0)
    monkeypatch.setattr(pretrain, "save_checkpoint", save_and_stop)


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "float32"],
        ["--precision", "bfloat16"],
        ["--precision", "float32", "--size", 16],
        ["--precision", "bfloat16", "--size", 17, "--sample", "clusters"],
        ["--sample", "all", "--neighbours", 4, "--mask-negatives", 6, "--mask-random"],
        ["--optimizer", "lars"],
    ],
)
def test_a_stopped_run_ends_with_the_same_bytes(store, here, monkeypatch, tmp_path, flags):
    command = ["pretrain.py", store / "hash-6.csv"]
    flags = ["--steps", 4, *TINY, *flags]
    here(*command, tmp_path / "a", *flags)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit, match="killed"):
            here(*command, tmp_path / "b", *flags)
    assert not (tmp_path / "b" / "encoder.pt").exists()
    assert "going on at step 2" in here(*command, tmp_path / "b", *flags)
    assert digest(tmp_path / "a" / "encoder.pt") == digest(tmp_path / "b" / "encoder.pt")
    for first, second in zip(log(tmp_path / "a")[1:], log(tmp_path / "b")[1:], strict=True):
        for name in ("step", "loss", "top1", "std", "lr", "dose"):
            assert first[name] == second[name]


def test_a_finished_run_is_left_and_another_one_refused(store, here, stopped, capsys, tmp_path):
    selection, run = store / "hash-6.csv", tmp_path / "run"
    flags = ["--steps", 2, "--precision", "float32", *TINY]
    here("pretrain.py", selection, run, *flags)
    before = digest(run / "encoder.pt")
    assert stopped("pretrain.py", selection, run, *flags) == ""
    assert "nothing to do" in capsys.readouterr().out
    line = stopped("pretrain.py", selection, run, *flags, "--steps", 3)
    assert "other settings (steps 2 -> 3)" in line
    line = stopped("pretrain.py", selection, run, *flags, "--precision", "bfloat16")
    assert "other settings (precision float32 -> bfloat16)" in line
    assert "other settings (slices" in stopped("pretrain.py", store / "all.csv", run, *flags)
    assert digest(run / "encoder.pt") == before
    header, *epochs = log(run)
    assert {"settings", "code", "versions"} <= set(header) and epochs[-1]["step"] == 2
    names = set(load_encoder(run / "encoder.pt", "resnet18", 0).state_dict())
    assert names == set(torch.load(run / "encoder.pt", weights_only=True))


def test_edited_code_is_never_mistaken_for_the_old(store, stopped, here, monkeypatch, tmp_path):
    """An edited augmentation: a finished and an unfinished run are refused; a comment changes nothing."""
    shutil.copytree(ROOT / "common", tmp_path / "common")
    shutil.copy(ROOT / "pretrain.py", tmp_path)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(pretrain, "code_digest", files.code_digest.__wrapped__)  # not cached
    command = ["pretrain.py", store / "hash-6.csv", tmp_path / "run", "--steps", 2, *TINY]
    here(*command)
    source = (tmp_path / "common" / "simclr.py").read_text()
    (tmp_path / "common" / "simclr.py").write_text(source + "\n# a comment\n")
    assert stopped(*command) == ""  # nothing to do
    edited = source.replace("uniform(0.6, 1.4, n)", "uniform(0.1, 1.9, n)")
    assert edited != source
    (tmp_path / "common" / "simclr.py").write_text(edited)
    refusal = "was made by another version of common/simclr.py: give another RUN, or delete"
    assert refusal in stopped(*command)
    header = (tmp_path / "run" / "log.jsonl").read_text().splitlines()[0]
    (tmp_path / "run" / "encoder.pt").unlink()
    unfinished = {"step": 1, "log": [json.loads(header)]}
    torch.save(unfinished, tmp_path / "run" / "checkpoint.pt")
    assert refusal in stopped(*command)


def test_rows_of_as_many_steps_have_the_same_schedule(store, here, tmp_path):
    """However many slices they have, and the learning rate follows the batch (SimCLR)."""
    flags = ["--steps", 4, "--warmup", 0.5, *TINY, "--optimizer", "lars"]
    for name in ("all", "hash-6"):
        here("pretrain.py", store / f"{name}.csv", tmp_path / name, *flags)
    rates = {name: log(tmp_path / name)[-1]["lr"] for name in ("all", "hash-6")}
    assert rates["all"] == rates["hash-6"] > 0
    assert log(tmp_path / "all")[0]["settings"]["lr"] == 0.3 * 8 / 256


def test_the_log_tells_the_dose(store, here, tmp_path):
    flags = ["--epochs", 1, "--neighbours", 8, *TINY]
    here("pretrain.py", store / "all.csv", tmp_path / "plain", *flags)
    here("pretrain.py", store / "all.csv", tmp_path / "masked", *flags, "--mask-negatives", 6)
    assert log(tmp_path / "plain")[-1]["dose"] > 1 and log(tmp_path / "masked")[-1]["dose"] == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--precision", "bfloat16", "--size", 16], "--precision: bfloat16 on a CPU needs more"),
        (["--mask-random"], "--mask-random needs --mask-negatives"),
        (["--mask-negatives", 65], "must be 0 to 64 bits"),
        (["--neighbours", 0], "--neighbours 0: must be at least 1"),
        (["--seed", -1], "--seed -1: must be"),
        (["--lr", -1], "--lr and --temperature must be above 0"),
        (["--temperature", 0], "--lr and --temperature must be above 0"),
        (["--warmup", 2], "--warmup 2.0: must be a share"),
        (["--batch-size", 1], "a batch needs at least 2 slices"),
        (["--batch-size", 8, "--loss-groups", 5], "for each of the 5 --loss-groups"),
        (["--mask-negatives", 6, "--mask-random", "--loss-groups", 2], "go with --loss-groups"),
    ],
)
def test_wrong_flags_get_one_line(store, stopped, tmp_path, flags, message):
    command = ["pretrain.py", store / "hash-6.csv", tmp_path / "run", *TINY, "--device", "cpu"]
    assert message in stopped(*command, *flags)
    assert not (tmp_path / "run").exists()


def test_a_batch_smaller_than_the_number_of_processes_is_refused(store, monkeypatch, tmp_path):
    command = ["pretrain.py", store / "hash-6.csv", tmp_path / "run", "--batch-size", 4]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    args, selection = pretrain.parse_args(), pretrain.read_selection(store / "hash-6.csv")
    cpu = torch.device("cpu")
    assert pretrain.describe(args, selection, cpu, 2)["processes"] == 2
    with pytest.raises(SystemExit, match="1 for each of the 8 processes"):
        pretrain.describe(args, selection, cpu, 8)


def test_a_damaged_checkpoint_or_log_is_refused(store, stopped, tmp_path):
    """Neither trained on nor overwritten."""
    run = tmp_path / "run"
    run.mkdir()
    command = ["pretrain.py", store / "hash-6.csv", run, "--steps", 2, *TINY]
    for content in (b"", b"junk", b"PK\x03\x04"):
        (run / "checkpoint.pt").write_bytes(content)
        assert "damaged" in stopped(*command)
        assert (run / "checkpoint.pt").read_bytes() == content
    torch.save(load_encoder("scratch", "resnet18", 0).state_dict(), run / "encoder.pt")
    for content in ("", "{", json.dumps({"settings": 3})):
        (run / "log.jsonl").write_text(content)
        assert "delete" in stopped(*command)


def test_ctrl_c_ends_with_one_line(store, tmp_path):
    run = tmp_path / "run"
    command = ["pretrain.py", store / "hash-6.csv", run, "--epochs", 9999, *TINY]
    # a shell's background jobs start with it ignored
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeds,
    )
    while not (run / "log.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert stderr.splitlines()[-1].startswith("stopped:") and "Traceback" not in stderr
    assert not list(run.glob("*.unfinished")) and not (run / ".lock").exists()
