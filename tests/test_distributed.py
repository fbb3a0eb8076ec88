"""Several processes against one. Run under torchrun, this file is what each process does."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common import loader, simclr  # noqa: E402

VIEWS = torch.randn(
    2, 12, 20, generator=torch.Generator().manual_seed(0)
)  # two views of a global batch of 12 samples


def linear_model():
    torch.manual_seed(1)
    return torch.nn.Linear(20, 8)


def loss_and_gradients(model, views):
    """As pretrain.train_step has it: views [2, b, d] of this process."""
    loss, top1 = simclr.nt_xent(model(views.flatten(0, 1)), 0.1)
    (loss * simclr.processes()).backward()
    return [loss.detach(), top1, *(p.grad for p in model.parameters())]


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path, run):
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, __file__, tmp_path)
    expected = loss_and_gradients(linear_model(), VIEWS)
    for rank in range(2):
        for ours, theirs in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


def test_two_processes_pretrain(tmp_path, run):
    np.save(
        tmp_path / "slices.npy",
        np.random.default_rng(0).integers(0, 256, (13, 16, 16), dtype=np.uint8),
    )
    (tmp_path / "slices.csv").write_text("the digest of this belongs to the settings\n")
    (tmp_path / "all.csv").write_text("row,kept\n" + "".join(f"{row},1\n" for row in range(13)))
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        "pretrain.py",
        tmp_path / "all.csv",
    ]
    command += [
        tmp_path / "run",
        "--arch",
        "resnet18",
        "--size",
        32,
        "--batch-size",
        8,
        "--epochs",
        2,
        "--optimizer",
        "adamw",
    ]
    assert (tmp_path / "run" / "encoder.pt").name in run(*command).stdout
    first, *epochs = [
        json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert first["settings"]["processes"] == 2 and [line["step"] for line in epochs] == [2, 4]
    assert run(*command).stdout.count("finished before") == 1


@pytest.mark.parametrize("resident", [1e9, 0])
@pytest.mark.parametrize("n, batch_size", [(100, 16), (7, 16), (64, 16), (101, 3)])
def test_an_epoch_holds_every_slice_once_and_can_be_entered_anywhere(
    monkeypatch, resident, n, batch_size
):
    monkeypatch.setattr(loader, "RESIDENT", resident)
    monkeypatch.setattr(loader, "BLOCK", 4)
    monkeypatch.setattr(loader, "PART", 32)
    slices = np.arange(200, dtype=np.uint8)[:, None, None]
    kept = np.sort(np.random.default_rng(0).permutation(200)[:n])
    per_epoch = -(-n // batch_size)

    def taken(start, steps, **processes):
        stream = loader.stream(slices, kept, batch_size, 5, start, torch.device("cpu"), **processes)
        return [next(stream).flatten().tolist() for _ in range(steps)]

    batches = taken(0, 2 * per_epoch)
    for epoch in (batches[:per_epoch], batches[per_epoch:]):
        assert sorted(sum(epoch, [])) == kept.tolist()
        assert (
            max(map(len, epoch)) <= batch_size and max(map(len, epoch)) - min(map(len, epoch)) <= 1
        )
    assert n < 20 or batches[:per_epoch] != batches[per_epoch:]
    for start in (1, per_epoch - 1, per_epoch + 1):
        assert taken(start, 2) == taken(0, start + 2)[start:]
    shares = [taken(0, per_epoch, rank=rank, world=2) for rank in range(2)]
    for batch, first, second in zip(batches, *shares):
        assert len(first) == len(second) == len(batch) // 2
        assert set(first) | set(second) <= set(batch) and not set(first) & set(second)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(linear_model())
    found = loss_and_gradients(model, VIEWS.chunk(2, 1)[dist.get_rank()])
    torch.save(found, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
