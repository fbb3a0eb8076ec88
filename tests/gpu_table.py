"""What `benchmark.py pretrain` measures on a GPU: one table, and fine-tuning."""

import contextlib
import gc
import json
import os
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

import evaluate
import pretrain
from common import batches, toy
from common.encoder import choose_device, load_encoder, to_input
from common.store import read_selection
from common.tasks import Task

NETWORKS = [("resnet18", 64), ("resnet18", 96), ("resnet50", 96), ("resnet50", 224)]
REPEATS, STEPS = 3, 20
COLUMNS = ["network, batch 128, bf16, AdamW; ms a step", "pretrain.py", "graph alone"]
COLUMNS += ["eager, fixed batch", "kernels alone", "launches", "pretrain.py / kernels"]
COLUMNS += ["GB: graph", "GB: eager", "s to the first step"]


def on_a_gpu(folder, run):
    """Print a table of pretrain.py and its parts, then fine-tuning beside its bare step."""
    if not torch.cuda.is_available():
        raise SystemExit("error: pretrain needs --volumes, or a GPU")
    toy.write_cohort(folder / "ct", patients=31, slices=130)  # 32 batches, of 126 and of 125
    run("reduce.py", folder / "ct", folder / "store", "--strategy", "all")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; made-up slices of 224 px;")
    print(f"best of {REPEATS} (worst); pretrain.py: epochs of 32 steps, data included\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for arch, size in NETWORKS:
        print(f"| {arch}, {size} px | {' | '.join(gpu_row(folder, arch, size))} |", flush=True)
    fine_tuning()


def gpu_row(folder, arch, size):
    """The cells of a line of the table, but for its first."""
    out = folder / f"{arch}-{size}"
    flags = ["--arch", arch, "--size", size, "--optimizer", "adamw", "--epochs", 1 + REPEATS]
    command = [folder / "store" / "all.csv", out, *flags, "--precision", "bfloat16"]
    sys.argv = ["pretrain.py", *map(str, command)]
    first_step, reserved = whole_run()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    views_a_step = 2 * lines[0]["settings"]["slices"] / lines[1]["step"]
    loop = [1e3 * views_a_step / line["images_per_second"] for line in lines[2:]]

    args, device = pretrain.parse_args(), choose_device("auto")
    selection = read_selection(args.selection)
    model, optimizer = pretrain.build(args, device)
    sizes = {len(i): (0, i) for i in batches.epoch_batches(selection, args, 0)}
    examples = list(batches.stream(selection, args, sizes.values(), device))
    take_step = partial(pretrain.train_step, model, optimizer, args=args, precision=torch.bfloat16)
    for batch in 3 * examples:
        take_step(1e-3, batch)
    eager = milliseconds(lambda: take_step(1e-3, examples[0]))
    eager_reserved = torch.cuda.max_memory_reserved() / 1e9
    kernels, launches = kernels_alone(lambda: take_step(1e-3, examples[0]))
    replay = pretrain.graphed(take_step, model, optimizer, examples)
    alone = milliseconds(lambda: replay(1e-3, examples[0]))
    measured = [best(loop), best(alone), best(eager), f"{kernels:.2f}", f"{launches:.0f}"]
    memory = [f"{reserved:.1f}", f"{eager_reserved:.1f}"]
    return [*measured, f"{min(loop) / kernels:.2f}", *memory, f"{first_step:.1f}"]


def whole_run():
    """Call pretrain.main: (seconds to the end of its first step, GB of memory at most)."""
    empty_gpu()
    looked, check_loss = [], pretrain.check_loss

    def check_and_look(*arguments):
        loss = check_loss(*arguments)  # waits for the GPU
        looked.append(time.perf_counter())
        return loss

    pretrain.check_loss = check_and_look
    started = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        with contextlib.redirect_stderr(nowhere):  # tqdm's bar
            pretrain.main()
    pretrain.check_loss = check_loss
    reserved = torch.cuda.max_memory_reserved() / 1e9
    empty_gpu()
    return looked[0] - started, reserved


def empty_gpu():
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # one for each stream of a graph that is gone
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def milliseconds(call):
    """Of a call, REPEATS times a mean over STEPS of them."""
    found = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(STEPS):
            call()
        torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - started) / STEPS)
    return found


def best(values):
    return f"{min(values):.2f} ({max(values):.2f})"


def kernels_alone(call, calls=5):
    """(milliseconds that the GPU works, number of kernels and copies) of a call."""
    with torch.profiler.profile() as profile:  # of CPU and GPU
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    events = [event for event in profile.key_averages() if event.device_type == cuda]
    events = [event for event in events if not event.is_user_annotation]
    microseconds = sum(event.self_device_time_total for event in events)
    return microseconds / 1e3 / calls, sum(event.count for event in events) / calls


def fine_tuning(size=224, batch_size=64):
    """A step of evaluate.py's fine-tuning of a ResNet-50, data included, beside the bare one."""
    empty_gpu()
    n, device = STEPS * batch_size, torch.device("cuda:0")
    images = np.random.default_rng(0).integers(0, 256, (n, size, size), dtype=np.uint8)
    task = Task(images, np.arange(n) % 2, ["0", "1"], None, np.arange(n), [], flip=True)
    network = load_encoder("scratch", "resnet50", 0)
    model = torch.nn.Sequential(network, torch.nn.Linear(network.inplanes, 2))
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=5e-4)
    settings = SimpleNamespace(batch_size=batch_size, device=device, precision="bfloat16")
    epoch = [model, optimizer, task, torch.arange(n), torch.Generator().manual_seed(0), settings]
    inputs = to_input(torch.rand(batch_size, size, size, device=device))
    calls = {
        "evaluate.py": lambda: evaluate.train_epoch(*epoch),
        "bare step": lambda: bare_steps(STEPS, model, optimizer, torch.bfloat16, inputs),
    }
    found = {name: [] for name in calls}
    for name, call in [*calls.items()] * (1 + REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found[name].append(1e3 * (time.perf_counter() - started) / STEPS)
    ours, bare = (values[1:] for values in found.values())  # the first steps take longer
    print(f"\nFine-tuning, resnet50, {size} px, batch {batch_size}, bf16, ms a step:")
    print(f"evaluate.py {best(ours)}, bare step {best(bare)}: {min(bare) / min(ours):.2f} of its")
    print("speed")


def bare_steps(steps, model, optimizer, precision, inputs):
    """Training steps without data, augmentation and loss."""
    for _ in range(steps):
        with torch.autocast(inputs.device.type, precision, enabled=precision != torch.float32):
            loss = model(inputs).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()
