"""Pre-train a ResNet with SimCLR on the slices that a selection keeps.

    python pretrain.py OUT/hash-6.csv RUN --epochs 100          # RUN/encoder.pt, log.jsonl, checkpoint.pt
    python pretrain.py OUT/hash-6.csv RUN --steps 5000          # as many optimiser steps as another row had

Called again on an unfinished RUN it goes on where it was; on a finished one it says so and does nothing.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import simclr
from common.files import fail, versions, whole_file
from common.store import read_selection

SAVE_EVERY = 60  # seconds between checkpoints: what a killed run loses at most


def main():
    args = parse_args()
    slices, kept = read_selection(args.selection)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else torch.device(args.device)
    per_epoch = math.ceil(len(kept) / args.batch_size)
    steps = args.steps or args.epochs * per_epoch
    settings = describe(args, kept, steps)
    saved = open_run(args.run, settings)

    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    model = simclr.build(args.arch).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, args)
    precision = torch.bfloat16 if bf16_pays(device) else torch.float32
    state = {"step": 0, "log": [header(settings, device, precision)], "sums": new_sums()}
    if saved:
        model.load_state_dict(saved.pop("model"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        state = saved
    slices = in_memory_if_small(slices, kept, device)
    model.train()

    progress = tqdm(total=steps, initial=state["step"], unit="step")
    last_save = time.perf_counter()
    while state["step"] < steps:
        started = time.perf_counter()
        step = state["step"]
        epoch, index = divmod(step, per_epoch)
        rows = batches(len(kept), args.batch_size, args.seed, epoch)[index]
        generator = torch.Generator().manual_seed(args.seed * 2**32 + step)
        batch = slices(rows)
        views = torch.cat([simclr.augment(batch, args.size, generator) for _ in range(2)])

        rate = simclr.learning_rate(step, steps, min(args.warmup_epochs * per_epoch, steps // 10), args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, precision, enabled=precision is torch.bfloat16):
            embeddings = model(simclr.to_input(views))
        loss, top1 = simclr.nt_xent(embeddings, args.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if not math.isfinite(loss.item()):
            fail(f"{args.run}: the loss is {loss.item()} at step {step + 1}: start again with a lower --lr")
        state["step"] += 1
        add_up(state["sums"], loss, top1, embeddings, len(views), time.perf_counter() - started)
        if index + 1 == per_epoch or state["step"] == steps:
            state["log"].append(epoch_line(state, epoch, rate))
            state["sums"] = new_sums()
            write_log(args.run, state["log"])
        progress.update()
        progress.set_postfix(loss=f"{loss.item():.3f}", images_per_s=f"{len(views) / (time.perf_counter() - started):.0f}")
        if time.perf_counter() - last_save > SAVE_EVERY:
            save(args.run / "checkpoint.pt", state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            last_save = time.perf_counter()

    progress.close()
    write_log(args.run, state["log"])
    save(args.run / "encoder.pt", {key: value.cpu().contiguous() for key, value in model[0].state_dict().items()})
    (args.run / "checkpoint.pt").unlink(missing_ok=True)
    seconds = sum(line["seconds"] for line in state["log"][1:])
    print(f"{len(kept)} slices, {steps} steps, {seconds:.0f} s, loss {state['log'][-1]['loss']:.3f} -> {args.run / 'encoder.pt'}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("selection", type=Path, metavar="SELECTION.csv", help="written by reduce.py, its slice store beside it")
    add("run", type=Path, metavar="RUN", help="folder for the encoder, the log and the checkpoint")
    add("--arch", choices=simclr.ARCHS, default="resnet50", help="default: the paper's")
    add("--size", type=int, default=96, help="side of a view in pixels (default 96)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, default=800, help="passes over the kept slices (default: the paper's 800)")
    length.add_argument("--steps", type=int, help="optimiser steps instead of epochs")
    add("--batch-size", type=int, default=128, help="slices a step, each seen in two views (default: the paper's 128)")
    add("--optimizer", choices=["lars", "adamw"], default="lars", help="default: the paper's; adamw for short runs")
    add("--lr", type=float, help="peak learning rate (default: lars 0.15, the paper's; adamw 0.001)")
    add("--weight-decay", type=float, default=1e-6, help="not on biases and batch norm (default: the paper's 1e-6)")
    add("--warmup-epochs", type=int, default=10, help="at most a tenth of the run (default: the paper's 10)")
    add("--temperature", type=float, default=0.1, help="of NT-Xent (default: SimCLR's 0.1)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    args = parser.parse_args()
    for name in ("size", "epochs", "batch_size", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("pretrain.py trains in one process: start it with python, not with torchrun")
    args.lr = args.lr or {"lars": 0.15, "adamw": 1e-3}[args.optimizer]
    return args


def describe(args, kept, steps):
    """What makes a run this run: its flags, and digests of the selection and of the store's table."""
    if len(kept) < 2:
        fail(f"{args.selection}: keeps {len(kept)} slice: contrastive learning needs at least 2")
    names = ["arch", "size", "batch_size", "optimizer", "lr", "weight_decay", "warmup_epochs", "temperature", "seed"]
    files = [args.selection, args.selection.parent / "slices.csv"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {name: getattr(args, name) for name in names} | {"slices": len(kept), "steps": steps, "selection": digest[:16]}


def open_run(run, settings):
    """The saved state of an unfinished run, None for a new one; ends the script on a finished or different one."""
    if (run / "encoder.pt").exists():
        check_same(run, json.loads((run / "log.jsonl").read_text().splitlines()[0])["settings"], settings)
        print(f"{run / 'encoder.pt'}: finished before, nothing to do")
        sys.exit()
    if (run / "checkpoint.pt").exists():
        saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        check_same(run, saved["log"][0]["settings"], settings)
        print(f"{run}: going on at step {saved['step']}")
        return saved


def check_same(run, before, now):
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        fail(f"{run}: was started with other settings ({', '.join(changed)}): give another RUN, or delete this one")


def build_optimizer(model, args):
    groups = simclr.parameter_groups(model, args.weight_decay)
    return simclr.LARS(groups, args.lr) if args.optimizer == "lars" else torch.optim.AdamW(groups, args.lr)


def bf16_pays(device):
    """Whether the hardware multiplies bf16 natively; elsewhere it would only be emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def in_memory_if_small(slices, kept, device):
    """A function: indices into kept -> uint8 [B, H, W] on the device; a store below 2 GB is moved there whole."""
    if len(kept) * slices[0].nbytes < 2e9:
        resident = torch.from_numpy(slices[kept]).to(device)
        return lambda index: resident[torch.from_numpy(index).to(device)]
    return lambda index: torch.from_numpy(slices[np.sort(kept[index])]).to(device)


def batches(n, batch_size, seed, epoch):
    """The epoch's batches of indices below n: every slice once, sizes equal but for one, none above batch_size."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return np.array_split(order, math.ceil(n / batch_size))


def header(settings, device, precision):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"command": " ".join(sys.argv), "settings": settings, "device": name, "threads": torch.get_num_threads(),
            "precision": str(precision).removeprefix("torch."), "versions": versions()}  # fmt: skip


def new_sums():
    return {"steps": 0, "loss": 0.0, "top1": 0.0, "std": 0.0, "images": 0, "seconds": 0.0}


def add_up(sums, loss, top1, embeddings, images, seconds):
    std = torch.nn.functional.normalize(embeddings.detach().float(), dim=1).std(0).mean().item()
    values = {"steps": 1, "loss": loss.item(), "top1": top1.item(), "std": std, "images": images, "seconds": seconds}
    for key, value in values.items():
        sums[key] += value


def epoch_line(state, epoch, rate):
    """Means over the epoch: loss, contrastive top-1, std of the normalised embedding (near 0: collapsed), speed."""
    sums = state["sums"]
    means = {key: round(sums[key] / sums["steps"], 5) for key in ("loss", "top1", "std")}
    speed = {"images_per_second": round(sums["images"] / sums["seconds"], 1), "seconds": round(sums["seconds"], 3)}
    return {"epoch": epoch + 1, "step": state["step"], **means, "lr": rate, **speed}


def write_log(run, lines):
    with whole_file(run / "log.jsonl", text=True) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def save(path, state):
    with whole_file(path) as file:
        torch.save(state, file)


if __name__ == "__main__":
    main()
