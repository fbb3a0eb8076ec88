"""Two processes against one. Run under torchrun, this file is what each process does."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_simclr import batch_and_model, train_by_sgd  # noqa: E402

import pretrain  # noqa: E402
from common import batches, simclr  # noqa: E402
from common.encoder import to_input  # noqa: E402

CPU = torch.device("cpu")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


def test_two_processes_take_the_steps_of_one(tmp_path, run):
    """The loss is over the negatives of the global batch, and its gradient has the same scale."""
    run(*TORCHRUN, __file__, tmp_path)
    metrics, *weights = train_by_sgd(*batch_and_model())
    for rank in range(2):
        of_two, *trained = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(of_two[:, :2], metrics[:, :2], rtol=1e-5)
        for ours, theirs in zip(trained, weights, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


def test_two_processes_pretrain_as_one_would_on_their_shares(store, tmp_path, run, monkeypatch):
    """Simulated in one process: each share has its own batch norm, all negatives, one gradient."""
    selection = store / "all.csv"
    command = ["pretrain.py", selection, tmp_path / "run", "--arch", "resnet18", "--size", 32]
    command += ["--batch-size", 8, "--steps", 4, "--neighbours", 4, "--mask-negatives", 6]
    command += ["--lr", 1, "--warmup", 0, "--device", "cpu", "--precision", "float32"]
    run(*TORCHRUN, *command)
    header, epoch = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert header["settings"]["processes"] == 2 and epoch["step"] == 4

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have; LARS makes much of the last digits
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    args = pretrain.parse_args()
    model, optimizer = pretrain.build(args, CPU)
    start = {name: p.detach().clone() for name, p in model[0].named_parameters()}
    chosen = pretrain.read_selection(selection)
    steps = [batches.steps(chosen, args, 0) for _ in range(2)]
    streams = [batches.stream(chosen, args, steps[rank], CPU, rank, 2) for rank in range(2)]
    for step in range(4):
        shares = [next(stream) for stream in streams]
        views = [simclr.augment(share.slices, share.augmentation, 32) for share in shares]
        embeddings = [model(to_input(pair)).unflatten(0, (2, -1)) for pair in views]
        z = torch.cat(embeddings, 1).flatten(0, 1)
        loss, _ = simclr.nt_xent(z, args.temperature, shares[0].excluded)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = simclr.learning_rate(step, 4, 0, 1)
        optimizer.step()
    torch.set_num_threads(threads)
    trained = torch.load(tmp_path / "run" / "encoder.pt")
    for name, weight in model[0].named_parameters():
        moved = (weight - start[name]).norm()
        assert (trained[name] - weight).norm() < 0.01 * moved, name


def test_batch_norm_is_synchronised_on_gpus(monkeypatch):
    """Else the statistics of a small share would tell a sample's partner from its negatives."""
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model, gpus: model)
    model = pretrain.distributed(simclr.build("resnet18"), torch.device("cuda:0"))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
    assert {type(norm) for norm in norms} == {torch.nn.SyncBatchNorm} and len(norms) == 21


if __name__ == "__main__":
    dist.init_process_group("gloo")
    batch, model = batch_and_model(dist.get_rank(), 2)
    done = train_by_sgd(batch, pretrain.distributed(model, CPU))
    torch.save(done, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
