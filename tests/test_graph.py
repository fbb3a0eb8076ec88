"""The step as CUDA graphs, on a GPU: the same bytes as of its kernels launched one by one."""

import pytest
import torch
from test_pretrain import digest, log

import pretrain

RUNS = [
    "all --arch resnet18 --optimizer lars --precision float32 --loss-groups 2",
    "all --arch resnet18 --optimizer adamw --precision bfloat16 --neighbours 4 --mask-negatives 6",
    "all --arch resnet50 --optimizer lars --precision bfloat16 --mask-negatives 6 --mask-random",
    "hash-6 --arch resnet50 --optimizer adamw --precision float32 --sample clusters",
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("flags", RUNS)
def test_50_steps_end_with_the_same_bytes(store, here, monkeypatch, tmp_path, flags):
    """Of a run that was stopped, of a second one, and of one whose kernels are launched singly."""
    selection, *flags = flags.split()
    flags += ["--size", 48, "--batch-size", 6, "--steps", 50, "--hold-out", 0.3]
    save_checkpoint, runs = pretrain.save_checkpoint, [tmp_path / name for name in "abc"]

    def save_and_stop(run, step, *state):
        if run == runs[0] and step == 12:
            save_checkpoint(run, step, *state)
            raise KeyboardInterrupt

    def launched(take_step, *_):  # with a number as its rate LARS rounds once less
        return lambda lr, batch: take_step(torch.tensor(lr, device="cuda"), batch)

    monkeypatch.setattr(pretrain, "SAVE_EVERY", 0)
    monkeypatch.setattr(pretrain, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        here("pretrain.py", store / f"{selection}.csv", runs[0], *flags)
    for run in runs:
        if run == runs[2]:
            monkeypatch.setattr(pretrain, "graphed", launched)
        here("pretrain.py", store / f"{selection}.csv", run, *flags)
        assert log(run)[0]["step"] == "graph"
        for line, first in zip(log(run)[1:], log(runs[0])[1:], strict=True):
            assert all(line[name] == first[name] for name in (*pretrain.METRICS, "held_out_loss"))
        assert digest(run) == digest(runs[0]), run
