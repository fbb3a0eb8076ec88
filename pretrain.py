"""Pre-train a ResNet with SimCLR on the slices that a selection keeps.

    python pretrain.py OUT/hash-6.csv RUN --epochs 100    # RUN/encoder.pt and log.jsonl
    python pretrain.py OUT/hash-6.csv RUN --steps 5000    # as many steps as another row had
    torchrun --nproc-per-node 8 pretrain.py OUT/hash-6.csv RUN    # 8 GPUs share a batch

Without flags it is the paper's 800 epochs of a ResNet-50 with LARS, for a GPU; on a CPU give --arch
resnet18 --optimizer adamw. Called again on an unfinished RUN, which holds checkpoint.pt, it goes on
where it was, to the same bytes; on a finished one it says so and does nothing. A RUN of other
settings, or of edited code, is refused.
"""

import argparse
import io
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import simclr
from common.batches import batches_per_epoch, slices_per_epoch, stream
from common.encoder import to_input
from common.files import (
    atomic_write,
    check_code,
    code_digest,
    exclusive,
    fail,
    run_script,
    versions,
)
from common.store import read_selection

CODE = ["pretrain.py"]
CODE += [f"common/{name}.py" for name in ("batches", "encoder", "hashing", "simclr")]
SAVE_EVERY = 60  # seconds between checkpoints: what a killed run loses at most
LOOK_EVERY = 10  # steps between looks at the loss: a GPU would stand still at every step
COLLAPSED = (
    0.005  # std of the normalised embeddings; 1 / sqrt(128 values) = 0.09 when spread evenly
)

# Flags that do not make a run what it is: `describe` tells what they come to. All others do.
NO_SETTINGS = ("selection", "run", "epochs", "steps", "precision", "device")


def main():
    args = parse_args()
    rank, world, device = join_processes(args.device)
    selection = read_selection(args.selection)
    settings = describe(args, selection, device, world)
    with exclusive(args.run) if rank == 0 else nullcontext():
        saved = open_run(args.run, settings, rank)
        train(args, selection, settings, saved, device, rank, world)
    if world > 1:
        dist.destroy_process_group()


def train(args, selection, settings, saved, device, rank, world):
    model, optimizer = build(args, device)
    precision = getattr(torch, settings["precision"])
    steps = settings["steps"]
    per_epoch = batches_per_epoch(selection, args)
    first = 0
    log = [header(settings, device)]
    measured = []  # of each step since the last line of the log
    if saved:
        first, log, measured = restore(saved, model, optimizer, device)
    trained = distributed(model, device) if world > 1 else model
    trained.train()

    batches = stream(selection, args, first, device, rank, world)
    last_save = time.perf_counter()
    with tqdm(initial=first, total=steps, unit="step", disable=rank > 0) as progress:
        for step in range(first, steps):
            started = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - started

            lr = simclr.learning_rate(step, steps, args.warmup, args.lr)
            metrics = train_step(trained, optimizer, lr, batch, args, precision)

            epoch_ends = (step + 1) % per_epoch == 0 or step + 1 == steps
            save_now = rank == 0 and time.perf_counter() - last_save > SAVE_EVERY
            if epoch_ends or save_now or step % LOOK_EVERY == 0:
                progress.set_postfix(loss=check_loss(args.run, step, metrics))
            progress.update()
            views = 2 * len(batch.slices) * world
            measured.append((metrics, batch.dose, views, waited, time.perf_counter() - started))
            if epoch_ends:
                log.append(epoch_line(step, per_epoch, lr, measured))
                measured = []
                if rank == 0:
                    write_log(args.run, log)
                check_collapse(args.run, log[-1])
            if save_now:
                save_checkpoint(args.run, step + 1, log, measured, model, optimizer)
                last_save = time.perf_counter()

    if rank == 0:
        finish(args.run, log, model)


def train_step(model, optimizer, lr, batch, args, precision):
    """One optimiser step on a batches.Batch: tensor of loss, contrastive top-1, embeddings' std."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    views = simclr.augment(batch.slices, batch.augmentation, args.size)
    with torch.autocast(views.device.type, precision, enabled=precision != torch.float32):
        embeddings = model(to_input(views))
    loss, top1 = simclr.nt_xent(embeddings, args.temperature, batch.excluded)
    optimizer.zero_grad()
    # gradients are averaged over processes, but each has only the part of its own views
    (loss * simclr.processes()).backward()
    optimizer.step()
    std = torch.nn.functional.normalize(embeddings.detach().float(), dim=1).std(0).mean()
    return torch.stack([loss.detach(), top1, std])


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("selection", type=Path, metavar="SELECTION.csv", help="of reduce.py, its store beside it")
    add("run", type=Path, metavar="RUN", help="folder for the encoder, the log and the checkpoint")
    add("--arch", choices=simclr.ARCHS, default="resnet50", help="default: the paper's")
    add("--size", type=int, default=96, help="side of a view in pixels (default: %(default)s)")
    add("--epochs", type=int, default=800, help="default: the paper's 800")
    add("--steps", type=int, help="optimiser steps; given, --epochs does not count")
    add("--batch-size", type=int, default=128, help="slices, of two views each (paper: 128)")
    add("--optimizer", choices=["lars", "adamw"], default="lars", help="paper: lars")
    add("--lr", type=float, help="peak (default: lars 0.3 x batch size / 256, SimCLR; adamw 0.001)")
    add("--weight-decay", type=float, default=1e-6, help="of weights only (paper: %(default)s)")
    add(
        "--warmup",
        type=float,
        default=10 / 800,
        help="share of the steps (paper: 10 of 800 epochs)",
    )
    add("--temperature", type=float, default=0.1, help="of NT-Xent (SimCLR: %(default)s)")
    add(
        "--sample",
        choices=["kept", "all", "clusters"],
        default="kept",
        help="slices of an epoch: those kept; all of the store; or soft reduction: for each slice "
        "kept one of those that it stands for, drawn anew every epoch (default: %(default)s)",
    )
    add(
        "--neighbours",
        type=int,
        default=1,
        metavar="C",
        help="batches of runs of C neighbouring slices (default: %(default)s, a uniform order)",
    )
    add(
        "--mask-negatives",
        type=int,
        metavar="BITS",
        help="slices of one volume whose dHash differs by at most BITS are no negatives",
    )
    add(
        "--mask-random",
        action="store_true",
        help="with --mask-negatives, its control: as many negatives go, drawn at random",
    )
    add(
        "--loss-groups",
        type=int,
        default=1,
        metavar="G",
        help="negatives only within each of G equal parts of the batch (default: %(default)s)",
    )
    add(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="auto: bfloat16 where the hardware has it, for views above 16 pixels",
    )
    add("--seed", type=int, default=0, help="of the weights, the order and the augmentation")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    args = parser.parse_args()
    for name in ("size", "epochs", "steps", "batch_size", "neighbours", "loss_groups"):
        value = getattr(args, name)
        if value is not None and value < 1:
            fail(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 <= args.seed < 2**32:
        fail(f"--seed {args.seed}: must be at least 0 and below 2**32")
    if not 0 <= args.warmup <= 1:
        fail(f"--warmup {args.warmup}: must be a share of the steps, from 0 to 1")
    if args.mask_negatives is not None and not 0 <= args.mask_negatives <= 64:
        fail(f"--mask-negatives {args.mask_negatives}: must be 0 to 64 bits")
    if args.mask_random and args.mask_negatives is None:
        fail("--mask-random needs --mask-negatives, whose number of negatives it takes away")
    if args.mask_random and args.loss_groups > 1:
        fail("--mask-random draws from the whole batch: it does not go with --loss-groups")
    if args.lr is None:
        args.lr = 0.3 * args.batch_size / 256 if args.optimizer == "lars" else 1e-3
    if not args.lr > 0 or not args.temperature > 0 or not args.weight_decay >= 0:
        fail("--lr and --temperature must be above 0, and --weight-decay at least 0")
    return args


def join_processes(name):
    """(rank, number of processes, device): one process, or torchrun's, each with its own GPU."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = simclr.choose_device(name)
    except ValueError as error:
        fail(f"--device: {error}")
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def describe(args, selection, device, world):
    """What makes a run this run: its flags, its length, and a digest of the selection."""
    try:
        precision = simclr.choose_precision(args.precision, device, args.size)
    except ValueError as error:
        fail(f"--precision: {error}")
    slices = slices_per_epoch(selection, args.sample)
    per_epoch = batches_per_epoch(selection, args)
    smallest = slices // per_epoch
    if smallest < max(2 * args.loss_groups, world):
        fail(
            f"{args.selection}: its {slices} slices make batches of {smallest}: a batch needs at "
            f"least 2 slices for each of the {args.loss_groups} --loss-groups, and 1 for each of "
            f"the {world} processes: give a larger --batch-size, or fewer of these"
        )
    settings = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    return settings | {
        "precision": str(precision).removeprefix("torch."),
        "slices": slices,
        "steps": args.steps or args.epochs * per_epoch,
        "processes": world,
        "selection": selection.digest,
    }


def build(args, device):
    """The network, with weights from the seed, and its optimiser."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    model = simclr.build(args.arch).to(device, memory_format=torch.channels_last)
    groups = simclr.parameter_groups(model, args.weight_decay)
    if args.optimizer == "lars":
        return model, simclr.LARS(groups, args.lr)
    return model, torch.optim.AdamW(groups, args.lr, fused=True)


def distributed(model, device):
    """The model, its gradients averaged over processes, on GPUs also its batch norm."""
    if device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(
        model, [device] if device.type == "cuda" else None
    )


# What a run writes, and how it goes on.


def open_run(run, settings, rank):
    """The checkpoint of an unfinished run, None for a new one.

    Ends the script on a finished run, and on one of other settings or of other code.
    """
    if (run / "encoder.pt").exists():
        check_same(run, read_damageable(run / "log.jsonl", read_first_line), settings)
        if rank == 0:
            (run / "checkpoint.pt").unlink(missing_ok=True)  # of a run killed in its last moment
            print(f"{run / 'encoder.pt'}: finished before, nothing to do")
        sys.exit()
    if (run / "checkpoint.pt").exists():
        saved = read_damageable(run / "checkpoint.pt", read_checkpoint)
        check_same(run, saved["log"][0], settings)
        if rank == 0:
            print(f"{run}: going on at step {saved['step']}")
        return saved
    return None


def read_first_line(path):
    return json.loads(path.read_text().splitlines()[0])


def read_checkpoint(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def read_damageable(path, read):
    """read(path), or one line if the file is not what this script wrote."""
    try:
        return read(path)
    except Exception as error:  # whatever a damaged file raises
        fail(f"{path}: damaged ({type(error).__name__}): delete {path.parent} and start again")


def check_same(run, before, settings):
    """Stop with one line unless the run was started with these settings and by this code."""
    remedy = "give another RUN, or delete this one"
    found = before.get("settings") if isinstance(before, dict) else None
    found = found if isinstance(found, dict) else {}
    changed = [
        f"{key} {found.get(key)} -> {settings[key]}"
        for key in settings
        if found.get(key) != settings[key]
    ]
    if changed:
        fail(f"{run}: was started with other settings ({', '.join(changed)}): {remedy}")
    check_code(run, before.get("code"), code_digest(*CODE), remedy)


def header(settings, device):
    """The first line of the log."""
    return {
        "command": " ".join(sys.argv),
        "settings": settings,
        "code": code_digest(*CODE),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def epoch_line(step, per_epoch, lr, measured):
    """A line of the log: means over the epoch's steps, speed, share of time waiting for data.

    images_per_second counts views, two a slice.
    """
    metrics, dose, views, waited, seconds = zip(*measured)
    loss, top1, std = torch.stack(metrics).mean(0).tolist()
    return {
        "epoch": step // per_epoch + 1,
        "step": step + 1,
        "loss": round(loss, 5),
        "top1": round(top1, 5),
        "std": round(std, 5),
        "lr": lr,
        "dose": round(sum(dose) / len(dose), 4),
        "images_per_second": round(sum(views) / sum(seconds), 1),
        "seconds": round(sum(seconds), 3),
        "waiting": round(sum(waited) / sum(seconds), 4),
    }


def check_loss(run, step, metrics):
    """The loss as a number; stops a run where it is none."""
    loss = metrics[0].item()
    if not math.isfinite(loss):
        fail(f"{run}: the loss is {loss} at step {step + 1}: start again with a lower --lr")
    return round(loss, 3)


def check_collapse(run, line):
    """Stop a run whose embeddings have become one point, which no more training mends."""
    if line["std"] < COLLAPSED:
        fail(
            f"{run}: collapsed: the embeddings' std is {line['std']} in epoch {line['epoch']}; "
            "start again with a lower --lr"
        )


def save_checkpoint(run, step, log, measured, model, optimizer):
    state = {
        "step": step,
        "log": log,
        "measured": measured,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    save(run / "checkpoint.pt", state)


def restore(saved, model, optimizer, device):
    """(step to go on at, log, measurements of the unfinished epoch); loads the weights in place."""
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    measured = [(metrics.to(device), *rest) for metrics, *rest in saved["measured"]]
    return saved["step"], saved["log"], measured


def finish(run, log, model):
    write_log(run, log)
    encoder = model[0].state_dict()
    save(run / "encoder.pt", {key: value.cpu().contiguous() for key, value in encoder.items()})
    (run / "checkpoint.pt").unlink(missing_ok=True)
    seconds = sum(line["seconds"] for line in log[1:])
    last = log[-1]
    print(
        f"{log[0]['settings']['slices']} slices an epoch, {last['step']} steps, {seconds:.0f} s, "
        f"loss {last['loss']:.3f}, dose {last['dose']:.2f} -> {run / 'encoder.pt'}"
    )


def write_log(run, lines):
    with atomic_write(run / "log.jsonl", text=True) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def save(path, state):
    packed = io.BytesIO()  # PyTorch's own writer hides why a disk takes no more
    torch.save(state, packed)
    with atomic_write(path) as file:
        file.write(packed.getbuffer())


if __name__ == "__main__":
    run_script(main)
