"""The parts of `benchmark.py pretrain`: the training step, lightly's SimCLR, ALL against Hash-6."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

import pretrain
from common import simclr
from common.loader import stream
from common.store import read_selection
from tests.benchmark import ROOT, alternate, plain_python, ratio, spread


def run(args):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        store = folder / "store"
        for flags in (["--strategy", "all"], ["--strategy", "hash"]):
            subprocess.run(
                [sys.executable, ROOT / "reduce.py", args.volumes, store, *flags],
                check=True,
                capture_output=True,
            )
        against_the_bare_step(args, store)
        against_lightly(args, store, folder)
        all_against_hash(args, store, folder)


def against_the_bare_step(args, store):
    """A training step, data and augmentation included, against forward, backward and optimiser on one constant batch."""
    slices, kept = read_selection(store / "all.csv")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = torch.bfloat16 if pretrain.bf16_pays(device) else torch.float32
    settings = SimpleNamespace(
        size=args.size, temperature=0.1, optimizer="adamw", lr=1e-3, weight_decay=1e-6
    )
    model = simclr.build(args.arch).to(device, memory_format=torch.channels_last).train()
    optimizer = pretrain.build_optimizer(model, settings)
    batches = stream(slices, kept, args.batch_size, 0, 0, device)
    constant = simclr.to_input(torch.rand(2 * args.batch_size, args.size, args.size, device=device))

    def ours():
        batch, generator = next(batches), torch.Generator().manual_seed(0)
        pretrain.train_step(model, optimizer, 1e-3, batch, settings, generator, precision)
        views.append(2 * len(batch))
        wait(device)

    def bare():
        with torch.autocast(device.type, precision, enabled=precision is torch.bfloat16):
            loss = model(constant).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wait(device)

    views = []
    ours(), bare()  # the first step of each does not count
    views.clear()
    seconds = alternate(args.rounds * args.steps, ours=ours, bare=bare)
    rates = {
        "ours": [n / s for n, s in zip(views, seconds["ours"])],
        "bare": [2 * args.batch_size / s for s in seconds["bare"]],
    }
    print(
        f"Training step, {args.arch}, {args.size} px, batch {args.batch_size} in two views, {device}, {precision}"
    )
    print(
        f"  ours {spread(rates['ours'], 1)} views/s; bare forward, backward, optimiser {spread(rates['bare'], 1)}; "
        f"ratio {ratio(rates['ours'], rates['bare'])}\n"
    )


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def against_lightly(args, store, folder):
    """pretrain.py against lightly's transform, loader, model and loss, each in its own process, without the first step."""
    slices, _ = read_selection(store / "all.csv")
    (folder / "png").mkdir()
    for row, pixels in enumerate(slices):
        Image.fromarray(pixels).save(folder / "png" / f"{row:05}.png")
    python, workers = plain_python(), str(args.workers)

    def lightly(*fast):
        command = [
            python,
            ROOT / "tests" / "lightly_way.py",
            folder / "png",
            args.arch,
            args.size,
            args.batch_size,
            workers,
        ]
        done = subprocess.run(
            [*map(str, command), str(args.steps), *fast],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        return float(done.stdout.split()[-1])

    rates = {"ours": [], "lightly": [], "lightly, our precision and layout": []}
    for number in range(args.rounds):
        rates["ours"].append(our_rate(args, store, folder / f"ours{number}"))
        rates["lightly"].append(lightly())
        rates["lightly, our precision and layout"].append(lightly("fast"))
    print(f"Against lightly's SimCLR, the same network, size and batch, {workers} loader processes")
    for name, values in rates.items():
        print(
            f"  {name}: {spread(values, 1)} views/s; ours is {ratio(rates['ours'], values)} times as fast"
        )
    print()


def our_rate(args, store, run_folder):
    """Views/s of pretrain.py's loop, from a step-by-step log of one process: the first step does not count."""
    code = (
        "import sys, time, pretrain\n"
        "times, real = [], pretrain.add_up\n"
        "def add_up(sums, measured, images, waited, seconds):\n"
        "    times.append((images, seconds)); real(sums, measured, images, waited, seconds)\n"
        "pretrain.add_up = add_up; pretrain.main()\n"
        "print(sum(i for i, _ in times[1:]) / sum(s for _, s in times[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        code,
        store / "all.csv",
        run_folder,
        "--arch",
        args.arch,
        "--size",
        args.size,
    ]
    command += ["--batch-size", args.batch_size, "--steps", args.steps + 1, "--optimizer", "adamw"]
    done = subprocess.run(
        [*map(str, command)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return float(done.stdout.split()[-1])


def all_against_hash(args, store, folder):
    """Seconds of pretrain.py on ALL and on Hash-6 for the same number of epochs."""
    seconds = {"all": [], "hash-6": []}
    for number in range(args.rounds):
        for name in seconds:
            run_folder = folder / f"{name}-{number}"
            command = [
                sys.executable,
                ROOT / "pretrain.py",
                store / f"{name}.csv",
                run_folder,
                "--arch",
                "resnet18",
            ]
            command += ["--size", 48, "--batch-size", 64, "--epochs", 2, "--optimizer", "adamw"]
            subprocess.run([*map(str, command)], check=True, capture_output=True)
            lines = [
                json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()
            ]
            seconds[name].append(sum(line["seconds"] for line in lines[1:]))
    kept = {name: json.loads((store / f"{name}.json").read_text())["kept"] for name in seconds}
    print("ALL against Hash-6, 2 epochs of ResNet-18 at 48 px, batch 64")
    print(
        f"  ALL {spread(seconds['all'], 1)} s, Hash-6 {spread(seconds['hash-6'], 1)} s: {ratio(seconds['all'], seconds['hash-6'])} "
        f"times as long, for {kept['all'] / kept['hash-6']:.2f} times the slices"
    )
