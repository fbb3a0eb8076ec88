"""The parts of `benchmark.py evaluate`: the fine-tuning step against the bare one, and the linear probe on real tasks."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import evaluate
from common.encoder import load_encoder
from common.tasks import Task
from tests.benchmark import ROOT, alternate, ratio, spread

STEPS, BATCH = 8, 64


def run(args):
    against_the_bare_step(args)
    if args.tasks:
        linear_probes(args)


def against_the_bare_step(args):
    """An epoch of evaluate.finetune on made-up images, data included, against the bare step on a constant batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n, rng = STEPS * BATCH, np.random.default_rng(0)
    images, labels = (
        rng.integers(0, 256, (n + 2, args.size, args.size), dtype=np.uint8),
        np.arange(n + 2) % 2,
    )
    groups = np.arange(n + 2)
    task = Task(images, labels, ["0", "1"], None, groups, [], None, vertical_flip=True)
    split = {"train": np.arange(n), "val": np.arange(n, n + 1), "test": np.arange(n + 1, n + 2)}
    epochs = SimpleNamespace(
        lr=1e-4,
        weight_decay=5e-4,
        epochs=1,
        freeze_epochs=0,
        batch_size=BATCH,
        name="ours",
        precision="float32",
    )
    batch = torch.rand(BATCH, 3, args.size, args.size, device=device).contiguous(
        memory_format=torch.channels_last
    )
    target = torch.arange(BATCH, device=device) % 2
    networks = [load_encoder("scratch", args.arch, 0) for _ in range(2)]
    model = (
        torch.nn.Sequential(networks[1], torch.nn.Linear(networks[1].inplanes, 2))
        .to(device, memory_format=torch.channels_last)
        .train()
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=5e-4)

    def bare():
        for _ in range(STEPS):
            loss = torch.nn.functional.cross_entropy(model(batch), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()  # waits for a GPU

    def ours():
        evaluate.finetune(networks[0], task, split, 0, epochs, device)

    ours(), bare()
    seconds = alternate(args.rounds, ours=ours, bare=bare)
    rates = {name: [n / s for s in values] for name, values in seconds.items()}
    print(
        f"Fine-tuning, {args.arch}, {args.size} px, batch {BATCH}, {device}: an epoch of {STEPS} steps, its start and end included"
    )
    print(
        f"  ours {spread(rates['ours'], 1)} images/s; bare forward, backward, Adam {spread(rates['bare'], 1)}; "
        f"ratio {ratio(rates['ours'], rates['bare'])}\n"
    )


def linear_probes(args):
    """Seconds of evaluate.py --protocol linear, one encoder, on each task below args.tasks."""
    print(
        f"evaluate.py --protocol linear, {args.arch}, {args.probe_size} px, one encoder, one process a task, all included"
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.save(
            load_encoder("scratch", args.arch, 0).state_dict(), Path(folder, "encoder.pt")
        )  # costs what any other does
        total = 0.0
        for task in ("covid-ct", "organ", "head-ct"):
            command = [
                "evaluate.py",
                task,
                args.tasks / task,
                "--encoder",
                f"{folder}/encoder.pt",
                "--name",
                "probe",
                "--results",
                f"{folder}/results.csv",
                "--protocol",
                "linear",
                "--arch",
                args.arch,
                "--size",
                args.probe_size,
            ]
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True
            )
            total += time.perf_counter() - started
            print(f"  {task} {time.perf_counter() - started:.0f} s")
    print(f"  together {total:.0f} s")
