"""How fast the package is, beside the plain way to do the same.

    python tests/benchmark.py reduce --dicom DIR
    python tests/benchmark.py pretrain --volumes DIR
    python tests/benchmark.py pretrain    # on a GPU: a table, of made-up CT

The sides of a comparison take turns (A B A B ...). Printed are medians (smallest to largest); a
ratio is taken round by round. The plain way, plain_hash.py, needs what the package does not:

    pip install opencv-python-headless==5.0.0.93
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pydicom
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gpu_table  # noqa: E402

import pretrain  # noqa: E402
from common import encoder  # noqa: E402
from common.batches import steps, stream  # noqa: E402
from common.store import read_lines, read_selection  # noqa: E402

PLAIN = "the plain way in 1 process"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", choices=PARTS)
    add("--dicom", type=Path, help="DICOM slices of full size")
    add("--volumes", type=Path, help="CT volumes")
    add("--ours", action="store_true", help="without the plain way")
    add("--arch", default="resnet18")
    numbers = {"slices": 2000, "size": 96, "batch-size": 128, "steps": 8, "rounds": 3}
    for name, default in numbers.items():
        add(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} at the start")
    with tempfile.TemporaryDirectory() as folder:
        PARTS[args.part](args, Path(folder))


# --- reduce


def reduce_part(args, folder):
    """DICOM to a hash-6 selection, by reduce.py and the plain way."""
    dicom, out, plain_out = folder / "dicom", folder / "ours", folder / "plain"
    repeat_slices(args.dicom, dicom, args.slices)
    plain_kept = []

    def ours():
        shutil.rmtree(out, ignore_errors=True)
        run("reduce.py", dicom, out, "--strategy", "hash")

    def plain():
        shutil.rmtree(plain_out, ignore_errors=True)
        plain_kept[:] = json.loads(run("tests/plain_hash.py", dicom, plain_out))

    sides = {"reduce.py": ours, PLAIN: plain}
    compare(f"DICOM to hash-6, {args.slices} slices", args, sides, args.slices, "slices")
    if plain_kept:
        files = [line["file"] for line in read_lines(out / "slices.csv")]
        kept = sorted(files[i] for i in read_selection(out / "hash-6.csv").kept)
        print(f"  same selection: {'yes' if kept == plain_kept else 'NO'}, {len(kept)} kept")


def repeat_slices(source, target, slices):
    """Write so many slices: the DICOM files of source, again and again as another series."""
    datasets = [pydicom.dcmread(file) for file in sorted(source.rglob("*")) if file.is_file()]
    for number in range(slices):
        series, i = divmod(number, len(datasets))
        datasets[i].SeriesInstanceUID = f"1.2.3.{series}"
        datasets[i].SOPInstanceUID = f"1.2.3.{series}.{i}"
        path = target / f"series{series}" / f"{i:04}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets[i].save_as(path)


# --- pretrain


def pretrain_part(args, folder):
    """A step of pretrain.py, data and augmentation included, beside the bare one."""
    if args.volumes is None:
        return gpu_table.on_a_gpu(folder, run)
    run("reduce.py", args.volumes, folder / "store", "--strategy", "all")
    selection = read_selection(folder / "store" / "all.csv")
    flags = ["--arch", args.arch, "--size", args.size, "--batch-size", args.batch_size]
    sys.argv = ["pretrain.py", "all.csv", "unused", "--optimizer", "adamw", *map(str, flags)]
    settings = pretrain.parse_args()
    device = encoder.choose_device("auto")
    precision = encoder.choose_precision("auto", device)
    model, optimizer = pretrain.build(settings, device)
    model.train()
    batches = stream(selection, settings, steps(selection, settings, 0), device)

    def ours():
        for _ in range(args.steps):
            batch = next(batches)
            pretrain.train_step(model, optimizer, 1e-3, batch, settings, precision).sum().item()

    inputs = encoder.to_input(torch.rand(2 * args.batch_size, args.size, args.size, device=device))
    bare = partial(gpu_table.bare_steps, args.steps, model, optimizer, precision, inputs)
    ours()  # the first steps take longer
    title = f"pretrain.py, {args.arch}, {args.size} px, batch {args.batch_size}"
    sides = {"ours": ours, "forward, backward and optimiser alone": bare}
    compare(title, args, sides, 2 * args.batch_size * args.steps, "views")


# --- Measuring


def compare(title, args, sides, amount, unit):
    """Call the functions of {name: function} in turns, each of which does an amount in units; print
    their rates, and the first's ratios."""
    if args.ours:
        sides = {name: call for name, call in sides.items() if name != PLAIN}
    rates = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, call in sides.items():
            started = time.perf_counter()
            call()
            rates[name].append(amount / (time.perf_counter() - started))
    print(title)
    [(first, ours), *others] = rates.items()
    print(f"  {first}: {spread(ours)} {unit}/s")
    for name, values in others:
        ratios = [a / b for a, b in zip(ours, values, strict=True)]
        print(f"  {name}: {spread(values)} {unit}/s; {first} is {spread(ratios)} times as fast")


def spread(values):
    """Median (smallest to largest)."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def run(*command):
    """What a script prints."""
    return subprocess.check_output([sys.executable, *map(str, command)], cwd=ROOT, text=True)


PARTS = {"reduce": reduce_part, "pretrain": pretrain_part}

if __name__ == "__main__":
    main()
