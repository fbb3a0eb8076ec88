"""pretrain.py, tiny: what a run is, resuming, refusals, what the log says."""

import json
import sys
import time
from functools import partial
from hashlib import sha256

import pytest
import torch
from torch import nn

import pretrain
from common import simclr
from common.encoder import load_encoder
from common.files import run_script

TINY = ["--arch", "resnet18", "--size", 32, "--batch-size", 8, "--optimizer", "adamw"]


def digest(run):
    return sha256((run / "encoder.pt").read_bytes()).hexdigest()


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def parsed(monkeypatch, *command):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, command)])
    return pretrain.parse_args()


def test_the_defaults_are_the_papers(monkeypatch):
    """Where they are published; else SimCLR's: see README's table of settings."""
    args = parsed(monkeypatch, "all.csv", "run")
    assert (args.arch, args.epochs, args.batch_size) == ("resnet50", 800, 128)
    assert (args.optimizer, args.lr, args.weight_decay) == ("lars", 0.15, 1e-6)
    assert (args.warmup, args.temperature, args.size) == (10 / 800, 0.1, 96)
    assert (args.sample, args.neighbours, args.loss_groups) == ("kept", 1, 1)
    assert args.mask_negatives is args.steps is None and args.seed == 0
    assert parsed(monkeypatch, "all.csv", "run", "--batch-size", 512).lr == 0.6
    assert parsed(monkeypatch, "all.csv", "run", "--optimizer", "adamw").lr == 1e-3


def test_encoder_is_the_trained_resnet_alone(store, here, tmp_path):
    """Neither fc nor head; batch norm saw both views of every step at once, in training mode."""
    here("pretrain.py", store / "hash-6.csv", tmp_path, "--epochs", 2, *TINY, "--seed", 1)
    trained = torch.load(tmp_path / "encoder.pt", weights_only=True)
    initial = load_encoder("scratch", "resnet18", 1).state_dict()
    assert trained.keys() == initial.keys()
    for name, before in initial.items():
        change = (trained[name].double() - before).norm()
        assert change > 0, name
        if name.endswith("conv1.weight"):
            assert change < 0.5 * before.norm()  # of the same seed
    header, *epochs = log(tmp_path)
    per_epoch = -(-header["settings"]["slices"] // 8)
    assert [line["step"] for line in epochs] == [per_epoch, 2 * per_epoch]
    for line in epochs:  # images are views, two a slice
        views = line["images_per_second"] * line["seconds"]
        assert views == pytest.approx(2 * header["settings"]["slices"], rel=0.2)  # rounded
    assert trained["bn1.num_batches_tracked"] == header["settings"]["steps"] == 2 * per_epoch


@pytest.mark.parametrize(
    "flags",
    [
        "--precision float32 --size 20",
        "--precision bfloat16 --size 17 --sample clusters",
        "--sample all --neighbours 4 --mask-negatives 6 --mask-random",
        "--optimizer lars",
    ],
)
def test_a_stopped_run_ends_with_the_same_bytes(store, here, monkeypatch, tmp_path, flags):
    command = ["pretrain.py", store / "hash-6.csv"]
    flags = ["--steps", 3, *TINY, *flags.split()]
    here(*command, tmp_path / "a", *flags)
    save_checkpoint = pretrain.save_checkpoint

    def save_and_stop(run, step, *state):
        save_checkpoint(run, step, *state)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "SAVE_EVERY", 0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^stopped: .*$"):
        patch.setattr(pretrain, "save_checkpoint", save_and_stop)
        run_script(partial(here, *command, tmp_path / "b", *flags))
    assert "going on at step 2" in here(*command, tmp_path / "b", *flags)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    for first, second in zip(log(tmp_path / "a")[1:], log(tmp_path / "b")[1:], strict=True):
        for name in ("step", "loss", "top1", "std", "lr", "dose"):
            assert first[name] == second[name]


@pytest.fixture
def small_network(monkeypatch):
    """Where it does not matter what is trained: a network of one convolution."""

    def build(arch):
        encoder = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(nn.Sequential(*encoder, nn.Flatten()), nn.Linear(4, 8))

    monkeypatch.setattr(simclr, "build", build)


def test_each_flag_of_the_training_changes_it(store, here, tmp_path, small_network):
    """No two of these runs have the same encoder, so none of the flags is without effect."""
    changes = """--precision bfloat16, --seed 1, --temperature 0.5, --optimizer lars, --lr 0.01,
        --warmup 1, --weight-decay 0.5, --batch-size 4, --size 40, --steps 3, --sample clusters,
        --sample all, --neighbours 4, --loss-groups 2, --mask-negatives 30,
        --mask-negatives 30 --mask-random""".split(",")
    digests = set()
    for i, change in enumerate(["", *changes]):
        flags = ["--steps", 2, *TINY, "--precision", "float32", *change.split()]
        here("pretrain.py", store / "hash-6.csv", tmp_path / str(i), *flags)
        digests.add(digest(tmp_path / str(i)))
        assert len(digests) == i + 1, change


def test_a_finished_run_is_left_and_another_refused(store, here, stopped, tmp_path, small_network):
    """Of other settings, another selection, or edited code: also where it is not finished."""
    selection, run = store / "hash-6.csv", tmp_path / "run"
    flags = ["--steps", 2, "--precision", "float32", *TINY]
    command = ["pretrain.py", selection, run, *flags]
    here(*command)
    before = digest(run)
    assert stopped(*command) == ""  # nothing to do
    line = stopped(*command, "--precision", "bfloat16", "--steps", 3)
    assert "made otherwise (steps 2 -> 3, precision float32 -> bfloat16)" in line
    line = stopped("pretrain.py", store / "all.csv", run, *flags)
    assert "otherwise (slices " in line and ", selection " in line
    assert digest(run) == before
    header = log(run)[0]
    assert {*header} == {"command", "settings", "code", "device", "step", "threads", "versions"}
    assert {"pretrain.py", "common/simclr.py", "common/batches.py"} <= header["code"].keys()
    header["code"]["common/simclr.py"] = "before"  # as after an edit
    (run / "log.jsonl").write_text(json.dumps(header) + "\n")
    refusal = "was made otherwise (common/simclr.py before -> "
    assert refusal in stopped(*command)
    (run / "encoder.pt").unlink()
    torch.save({"step": 1, "log": [header]}, run / "checkpoint.pt")
    assert refusal in stopped(*command)


def test_every_flag_that_decides_a_run_is_among_its_settings(store, monkeypatch):
    args = parsed(monkeypatch, store / "hash-6.csv", "run", *TINY)
    selection = pretrain.read_selection(args.selection)
    settings = pretrain.describe(args, selection, torch.device("cpu"), 1)["settings"]
    decisive = vars(args).keys() - {"run", "epochs", "device"}  # steps tell the epochs
    assert settings.keys() == decisive | {"slices", "processes"}


def test_runs_of_as_many_steps_have_the_same_schedule(store, here, tmp_path, small_network):
    """However many slices they have: --steps-of takes the number from the other run."""
    flags = ["--warmup", 0.25, *TINY, "--optimizer", "lars"]
    here("pretrain.py", store / "all.csv", tmp_path / "all", *flags, "--epochs", 1)
    of_all = ["--steps-of", tmp_path / "all"]
    here("pretrain.py", store / "hash-6.csv", tmp_path / "few", *flags, *of_all)
    first, second = (log(tmp_path / name) for name in ("all", "few"))
    assert first[0]["settings"]["slices"] > second[0]["settings"]["slices"]
    assert first[0]["settings"]["steps"] == first[-1]["step"] == second[-1]["step"] == 8
    # the last of 8 steps, 2 of them to warm up, is 5/6 of the way down the cosine
    cosine = 0.5 * (1 - 3**0.5 / 2)
    assert first[-1]["lr"] == second[-1]["lr"] == pytest.approx(0.3 * 8 / 256 * cosine)


def test_a_line_of_the_log_is_the_mean_of_its_steps():
    steps = [(torch.tensor([1.0, 0.2, 0.3, 0.4]), 4.0, 16, 0.5, 1.0)]
    steps += [(torch.tensor([2.0, 0.4, 0.1, 0.8]), 2.0, 16, 0.5, 1.0)]
    line = pretrain.epoch_line(7, 4, 0.1, steps)
    assert (line["epoch"], line["step"], line["lr"], line["dose"]) == (2, 8, 0.1, 3)
    assert [line[name] for name in pretrain.METRICS] == [1.5, 0.3, 0.2, 0.6]
    assert (line["images_per_second"], line["seconds"], line["waiting"]) == (16, 2, 0.5)


def test_the_log_tells_the_time_spent_waiting_for_data(
    store, here, monkeypatch, tmp_path, small_network
):
    stream = pretrain.batches.stream

    def slow_stream(*arguments):
        for batch in stream(*arguments):
            time.sleep(0.1)
            yield batch

    monkeypatch.setattr(pretrain.batches, "stream", slow_stream)
    here("pretrain.py", store / "hash-6.csv", tmp_path, "--steps", 3, *TINY)
    assert sum(line["seconds"] * line["waiting"] for line in log(tmp_path)[1:]) > 0.29


def test_a_loss_that_is_no_number_ends_the_run_with_one_line(store, stopped, tmp_path):
    flags = ["--steps", 30, *TINY, "--lr", 1e30]
    line = stopped("pretrain.py", store / "hash-6.csv", tmp_path / "run", *flags)
    assert "the loss is nan at step" in line and "lower --lr" in line
    assert not (tmp_path / "run" / "encoder.pt").exists()


def test_wrong_flags_get_one_line(store, stopped, tmp_path):
    command = ["pretrain.py", store / "hash-6.csv", tmp_path / "run", *TINY, "--device", "cpu"]
    for flags, message in (
        ("--size 16", "--size: 16: must be 17 to inf"),
        ("--mask-random", "--mask-random needs --mask-negatives"),
        ("--batch-size 8 --loss-groups 5", "2 for each of 5 --loss-groups"),
        ("--mask-negatives 6 --mask-random --loss-groups 2", "go with --loss-groups"),
    ):
        assert message in stopped(*command, *flags.split())
        assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_or_log_is_refused(store, stopped, tmp_path):
    """Neither trained on nor overwritten."""
    command = ["pretrain.py", store / "hash-6.csv", tmp_path, "--steps", 2, *TINY]
    for content in (b"", b"junk", b"PK\x03\x04"):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        assert "damaged" in stopped(*command)
        assert (tmp_path / "checkpoint.pt").read_bytes() == content
    (tmp_path / "encoder.pt").touch()
    for content in ("", "{\n", json.dumps({"settings": 3}) + "\n"):
        (tmp_path / "log.jsonl").write_text(content)
        assert "delete" in stopped(*command)
