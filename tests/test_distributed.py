"""Several processes against one. Run under torchrun, this file is what each process does."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common import simclr  # noqa: E402

VIEWS = torch.randn(
    2, 12, 20, generator=torch.Generator().manual_seed(0)
)  # two views of a global batch of 12 samples
EXCLUDED = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.3
EXCLUDED = (EXCLUDED | EXCLUDED.T).fill_diagonal_(False)


def linear_model():
    torch.manual_seed(1)
    return torch.nn.Linear(20, 8)


def loss_and_gradients(model, views):
    """As pretrain.train_step has it: views [2, b, d] of this process, mask of the global batch."""
    loss, top1 = simclr.nt_xent(model(views.flatten(0, 1)), 0.1, EXCLUDED)
    (loss * simclr.processes()).backward()
    return [loss.detach(), top1, *(p.grad for p in model.parameters())]


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path, run):
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, __file__, tmp_path)
    expected = loss_and_gradients(linear_model(), VIEWS)
    for rank in range(2):
        for ours, theirs in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


def test_two_processes_pretrain(tmp_path, run):
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (13, 16, 16), np.uint8)):
        (tmp_path / "ct").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "ct" / f"p_{i}.png")
    run("reduce.py", tmp_path / "ct", tmp_path / "out", "--strategy", "all", "--size", 16)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command = [*torchrun, "pretrain.py", tmp_path / "out" / "all.csv", tmp_path / "run"]
    command += ["--arch", "resnet18", "--size", 32, "--batch-size", 8, "--optimizer", "adamw"]
    command += ["--epochs", 2, "--mask-negatives", 6, "--device", "cpu"]
    run(*command)
    assert (tmp_path / "run" / "encoder.pt").exists()
    first, *epochs = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert first["settings"]["processes"] == 2 and [line["step"] for line in epochs] == [2, 4]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(linear_model())
    found = loss_and_gradients(model, VIEWS.chunk(2, 1)[dist.get_rank()])
    torch.save(found, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
