"""Pre-train a ResNet with SimCLR on the slices that a selection keeps.

    python pretrain.py OUT/hash-6.csv RUN --epochs 100          # RUN/encoder.pt, log.jsonl, checkpoint.pt
    python pretrain.py OUT/hash-6.csv RUN --steps 5000          # as many optimiser steps as another row had
    torchrun --nproc-per-node 8 pretrain.py OUT/hash-6.csv RUN  # 8 GPUs; --batch-size is that of all together

Called again on an unfinished RUN it goes on where it was; on a finished one it says so and does nothing.
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
from common.files import atomic_write, exclusive, fail, run_script, versions
from common.loader import stream
from common.store import read_selection

SAVE_EVERY = 60  # seconds between checkpoints: what a killed run loses at most
COLLAPSED = 0.005  # std of the normalised embedding


def main():
    args = parse_args()
    rank, world, device = join_processes(args.device)
    selection = read_selection(args.selection)
    slices, kept = selection.store.slices, selection.kept
    steps = args.steps or args.epochs * math.ceil(len(kept) / args.batch_size)
    settings = describe(args, selection, steps, world)
    with exclusive(args.run) if rank == 0 else nullcontext():
        saved = open_run(args.run, settings, rank)
        train(args, slices, kept, steps, settings, saved, rank, world, device)
    if world > 1:
        dist.destroy_process_group()


def train(args, slices, kept, steps, settings, saved, rank, world, device):
    per_epoch = math.ceil(len(kept) / args.batch_size)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    model = simclr.build(args.arch).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, args)
    precision = torch.bfloat16 if bf16_pays(device) else torch.float32
    state = {"step": 0, "log": [header(settings, device, precision)], "sums": new_sums(device)}
    if saved:
        model.load_state_dict(saved.pop("model"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        state = saved
        state["sums"]["measured"] = state["sums"]["measured"].to(device)
    trained = distributed(model, device) if world > 1 else model
    trained.train()

    batches = stream(slices, kept, args.batch_size, args.seed, state["step"], device, rank, world)
    last_save = time.perf_counter()
    with tqdm(total=steps, initial=state["step"], unit="step", disable=rank > 0) as progress:
        while state["step"] < steps:
            started, step = time.perf_counter(), state["step"]
            batch = next(batches)
            waited = time.perf_counter() - started
            rate = simclr.learning_rate(
                step, steps, min(args.warmup_epochs * per_epoch, steps // 10), args.lr
            )
            generator = torch.Generator().manual_seed(args.seed * 2**32 + step + (rank << 56))
            measured = train_step(trained, optimizer, rate, batch, args, generator, precision)

            state["step"] += 1
            images, epoch_ends = (
                2 * len(batch) * world,
                state["step"] % per_epoch == 0 or state["step"] == steps,
            )
            save_now = rank == 0 and time.perf_counter() - last_save > SAVE_EVERY
            if (
                epoch_ends or save_now or step % 10 == 0
            ):  # not at every step: a GPU would stand still meanwhile
                loss = measured[0].item()
                if not math.isfinite(loss):
                    fail(
                        f"{args.run}: the loss is {loss} at step {step + 1}: start again with a lower --lr"
                    )
                progress.set_postfix(
                    loss=f"{loss:.3f}",
                    images_per_s=f"{images / (time.perf_counter() - started):.0f}",
                )
            add_up(state["sums"], measured, images, waited, time.perf_counter() - started)
            progress.update()
            if epoch_ends:
                state["log"].append(epoch_line(state, step // per_epoch, rate))
                state["sums"] = new_sums(device)
                if rank == 0:
                    write_log(args.run, state["log"])
                check_collapse(args.run, state["log"][-1])
            if save_now:
                save(
                    args.run / "checkpoint.pt",
                    state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
                )
                last_save = time.perf_counter()

    if rank == 0:
        finish(args.run, state, model, len(kept))


def train_step(model, optimizer, rate, batch, args, generator, precision):
    """One optimiser step on slices, uint8 [B, H, W]: tensor of loss, contrastive top-1, std of the normalised embedding."""
    views = torch.cat([simclr.augment(batch, args.size, generator) for _ in range(2)])
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(batch.device.type, precision, enabled=precision is torch.bfloat16):
        embeddings = model(simclr.to_input(views))
    loss, top1 = simclr.nt_xent(embeddings, args.temperature)
    optimizer.zero_grad()
    (
        loss * simclr.processes()
    ).backward()  # gradients are averaged over processes, but each has only its views' part
    optimizer.step()
    std = torch.nn.functional.normalize(embeddings.detach().float(), dim=1).std(0).mean()
    return torch.stack([loss.detach(), top1, std])


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "selection",
        type=Path,
        metavar="SELECTION.csv",
        help="written by reduce.py, its slice store beside it",
    )
    add("run", type=Path, metavar="RUN", help="folder for the encoder, the log and the checkpoint")
    add("--arch", choices=simclr.ARCHS, default="resnet50", help="default: the paper's")
    add("--size", type=int, default=96, help="side of a view in pixels (default 96)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=int,
        default=800,
        help="passes over the kept slices (default: the paper's 800)",
    )
    length.add_argument("--steps", type=int, help="optimiser steps instead of epochs")
    add(
        "--batch-size",
        type=int,
        default=128,
        help="slices a step, each seen in two views (default: the paper's 128)",
    )
    add(
        "--optimizer",
        choices=["lars", "adamw"],
        default="lars",
        help="default: the paper's; adamw for short runs",
    )
    add(
        "--lr", type=float, help="peak learning rate (default: lars 0.15, the paper's; adamw 0.001)"
    )
    add(
        "--weight-decay",
        type=float,
        default=1e-6,
        help="not on biases and batch norm (default: the paper's 1e-6)",
    )
    add(
        "--warmup-epochs",
        type=int,
        default=10,
        help="at most a tenth of the run (default: the paper's 10)",
    )
    add("--temperature", type=float, default=0.1, help="of NT-Xent (default: SimCLR's 0.1)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    args = parser.parse_args()
    for name in ("size", "epochs", "batch_size", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1")
    args.lr = args.lr or {"lars": 0.15, "adamw": 1e-3}[args.optimizer]
    return args


def join_processes(name):
    """(rank, number of processes, device): one process, or those that torchrun started, each with its own GPU if any."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def distributed(model, device):
    """The model, its gradients averaged over all processes and, on GPUs, its batch norm over the global batch."""
    if device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(
        model, [device] if device.type == "cuda" else None
    )


def describe(args, selection, steps, world):
    """What makes a run this run: its flags, and digests of the selection and of the store's table."""
    kept = selection.kept
    if len(kept) < 2 * world:
        fail(
            f"{args.selection}: keeps {len(kept)} slice{'s' * (len(kept) > 1)}: contrastive learning needs at least 2 a process"
        )
    names = [
        "arch",
        "size",
        "batch_size",
        "optimizer",
        "lr",
        "weight_decay",
        "warmup_epochs",
        "temperature",
        "seed",
    ]
    found = {"slices": len(kept), "steps": steps, "processes": world, "selection": selection.digest}
    return {name: getattr(args, name) for name in names} | found


def open_run(run, settings, rank):
    """The saved state of an unfinished run, None for a new one; ends the script on a finished or different one."""
    if (run / "encoder.pt").exists():
        check_same(
            run,
            whole(
                run / "log.jsonl",
                lambda path: json.loads(path.read_text().splitlines()[0])["settings"],
            ),
            settings,
        )
        if rank == 0:
            (run / "checkpoint.pt").unlink(missing_ok=True)  # of a run killed in its last moment
            print(f"{run / 'encoder.pt'}: finished before, nothing to do")
        sys.exit()
    if (run / "checkpoint.pt").exists():
        saved = whole(
            run / "checkpoint.pt",
            lambda path: torch.load(path, map_location="cpu", weights_only=True),
        )
        check_same(run, saved["log"][0]["settings"], settings)
        if rank == 0:
            print(f"{run}: going on at step {saved['step']}")
        return saved


def whole(path, read):
    """read(path), or one line if the file is not what this script wrote."""
    try:
        return read(path)
    except Exception as error:  # whatever a damaged file raises
        fail(f"{path}: damaged ({type(error).__name__}): delete {path.parent} and start again")


def check_same(run, before, now):
    before = before if isinstance(before, dict) else {}
    changed = [
        f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if changed:
        fail(
            f"{run}: was started with other settings ({', '.join(changed)}): give another RUN, or delete this one"
        )


def build_optimizer(model, args):
    groups = simclr.parameter_groups(model, args.weight_decay)
    return (
        simclr.LARS(groups, args.lr)
        if args.optimizer == "lars"
        else torch.optim.AdamW(groups, args.lr, fused=True)
    )


def bf16_pays(device):
    """Whether the hardware multiplies bf16 natively; elsewhere it would only be emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def header(settings, device, precision):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "command": " ".join(sys.argv),
        "settings": settings,
        "device": name,
        "threads": torch.get_num_threads(),
        "precision": str(precision).removeprefix("torch."),
        "versions": versions(),
    }


def new_sums(device):
    return {
        "steps": 0,
        "measured": torch.zeros(3, device=device),
        "images": 0,
        "waiting": 0.0,
        "seconds": 0.0,
    }


def add_up(sums, measured, images, waited, seconds):
    sums["measured"] += measured
    for key, value in {"steps": 1, "images": images, "waiting": waited, "seconds": seconds}.items():
        sums[key] += value


def epoch_line(state, epoch, rate):
    """Means over the epoch: loss, contrastive top-1, std of the normalised embedding, speed, share of time without data."""
    sums = state["sums"]
    means = {
        key: round(v / sums["steps"], 5)
        for key, v in zip(("loss", "top1", "std"), sums["measured"].tolist())
    }
    speed = {
        "images_per_second": round(sums["images"] / sums["seconds"], 1),
        "seconds": round(sums["seconds"], 3),
        "waiting": round(sums["waiting"] / sums["seconds"], 4),
    }
    return {"epoch": epoch + 1, "step": state["step"], **means, "lr": rate, **speed}


def check_collapse(run, line):
    """Stop a run whose embeddings have become one point, which no more training mends: std is near 0.09 when all is well."""
    if line["std"] < COLLAPSED:
        fail(
            f"{run}: collapsed: the embeddings' std is {line['std']} in epoch {line['epoch']}; start again with a lower --lr"
        )


def finish(run, state, model, kept):
    write_log(run, state["log"])
    save(
        run / "encoder.pt",
        {key: value.cpu().contiguous() for key, value in model[0].state_dict().items()},
    )
    (run / "checkpoint.pt").unlink(missing_ok=True)
    last, seconds = state["log"][-1], sum(line["seconds"] for line in state["log"][1:])
    print(
        f"{kept} slices, {state['step']} steps, {seconds:.0f} s, loss {last['loss']:.3f} -> {run / 'encoder.pt'}"
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
