"""How fast the package is, beside the plain way to do the same.

    python tests/benchmark.py reduce --dicom DIR --volumes DIR
    python tests/benchmark.py pretrain --volumes DIR
    python tests/benchmark.py evaluate

The sides of a comparison take turns (A B A B ...). Printed are medians (smallest to largest); a
ratio is taken round by round. The plain ways, at the end of this file, run in a process of their
own, and need what the package does not; --ours leaves out those that do:

    pip install scikit-image==0.26.0 opencv-python-headless==5.0.0.93 lightly==1.6.0
"""

import argparse
import csv
import itertools
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
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PAIRS = 150  # of slices, for the similarities
OTHERS = ("the plain way in 1 process", "a plain loop", "lightly")  # that need more packages


def main():
    if sys.argv[1:] and sys.argv[1] in PLAIN:
        print(json.dumps(PLAIN[sys.argv[1]](*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", choices=PARTS)
    add("--dicom", type=Path, help="DICOM slices of full size")
    add("--volumes", type=Path, help="CT volumes")
    add("--ours", action="store_true", help="without the plain ways that need more packages")
    add("--arch", default="resnet18")
    numbers = {"slices": 2000, "size": 96, "batch-size": 128, "steps": 8, "rounds": 3}
    for name, default in numbers.items():
        add(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} at the start")
    with tempfile.TemporaryDirectory() as folder:
        PARTS[args.part](args, Path(folder))


# --- reduce


def reduce_part(args, folder):
    """DICOM to a hash-6 selection, by reduce.py and the plain way; then similarities."""
    dicom, out, plain_out = folder / "dicom", folder / "ours", folder / "plain"
    repeat_slices(args.dicom, dicom, args.slices)
    plain_kept = []

    def ours():
        shutil.rmtree(out, ignore_errors=True)
        run("reduce.py", dicom, out, "--strategy", "hash")

    def plain():
        shutil.rmtree(plain_out, ignore_errors=True)
        plain_kept[:] = run_plain("plain_hash", dicom, plain_out)

    sides = {"reduce.py": ours, "the plain way in 1 process": plain}
    compare(f"DICOM to hash-6, {args.slices} slices", args, sides, args.slices, "slices")
    with open(out / "slices.csv") as slices, open(out / "hash-6.csv") as selection:
        pairs = zip(csv.DictReader(slices), csv.DictReader(selection), strict=True)
        kept = sorted(line["file"] for line, selected in pairs if selected["kept"] == "1")
    if plain_kept:
        print(f"  same selection: {'yes' if kept == plain_kept else 'NO'}, {len(kept)} kept")
    similarities(args, folder)


def repeat_slices(source, target, slices):
    """Write so many slices: the DICOM files of source, again and again as another series."""
    import pydicom

    datasets = [pydicom.dcmread(file) for file in sorted(source.rglob("*")) if file.is_file()]
    for number in range(slices):
        series, i = divmod(number, len(datasets))
        datasets[i].SeriesInstanceUID = f"1.2.3.{series}"
        datasets[i].SOPInstanceUID = f"1.2.3.{series}.{i}"
        path = target / f"series{series}" / f"{i:04}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets[i].save_as(path)


def similarities(args, folder):
    """SSIM and mutual information of a slice with all of its volume: pairs/s of one process."""
    from common import similarity
    from common.store import read_store

    run("reduce.py", args.volumes, folder / "store", "--strategy", "all")
    store = read_store(folder / "store")
    longest = max(store.volumes, key=len)[:PAIRS]
    slices = np.array(store.slices[longest])
    for name in ("ssim", "mutual_information"):
        measure = getattr(similarity, name)
        plain = partial(run_plain, "plain_similarity", name, store.path, longest[0], len(longest))
        sides = {"ours": partial(compare_all, measure, slices), "a plain loop": plain}
        compare(f"{name}, {len(slices)} slices", args, sides, len(slices), "pairs")


def compare_all(measure, slices):
    measure(slices)(0, np.arange(len(slices)))


# --- pretrain


def pretrain_part(args, folder):
    """A step of pretrain.py, data and augmentation included, beside the bare one and lightly's."""
    import torch
    from PIL import Image

    import pretrain
    from common.batches import stream
    from common.encoder import choose_device, choose_precision, to_input
    from common.store import read_selection

    run("reduce.py", args.volumes, folder / "store", "--strategy", "all")
    selection = read_selection(folder / "store" / "all.csv")
    (folder / "png").mkdir()
    for i, pixels in enumerate(selection.store.slices):
        Image.fromarray(pixels).save(folder / "png" / f"{i:05}.png")
    flags = ["--arch", args.arch, "--size", args.size, "--batch-size", args.batch_size]
    flags += ["--optimizer", "adamw", "--epochs", 2]
    sys.argv = ["pretrain.py", "all.csv", "unused", *map(str, flags)]
    settings = pretrain.parse_args()
    device = choose_device("auto")
    precision = choose_precision("auto", device, args.size)
    model, optimizer = pretrain.build(settings, device)
    model.train()
    batches = stream(selection, settings, 0, device)
    inputs = to_input(torch.rand(2 * args.batch_size, args.size, args.size, device=device))
    bare = partial(bare_steps, args, model, optimizer, precision, inputs)

    def ours():
        for _ in range(args.steps):
            batch = next(batches)
            pretrain.train_step(model, optimizer, 1e-3, batch, settings, precision).sum().item()

    flags = [folder / "png", args.arch, args.size, args.batch_size, args.steps]
    lightly = partial(run_plain, "plain_lightly", *flags)
    ours()  # the first steps take longer
    sides = {"ours": ours, "forward, backward and optimiser alone": bare, "lightly": lightly}
    views_a_round = 2 * args.batch_size * args.steps
    title = f"pretrain.py, {args.arch}, {args.size} px, batch {args.batch_size}"
    compare(title, args, sides, views_a_round, "views")


def bare_steps(args, model, optimizer, precision, inputs):
    """Training steps without data, augmentation and loss."""
    import torch

    for _ in range(args.steps):
        with torch.autocast(inputs.device.type, precision, enabled=precision != torch.float32):
            loss = model(inputs).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()


# --- evaluate


def evaluate_part(args, _):
    """An epoch of fine-tuning, data included, beside the bare step."""
    import torch

    import evaluate
    from common.encoder import choose_device, choose_precision, load_encoder, to_input
    from common.tasks import Task

    device = choose_device("auto")
    precision = choose_precision("auto", device, args.size)
    n = args.steps * args.batch_size
    images = np.random.default_rng(0).integers(0, 256, (n, args.size, args.size), dtype=np.uint8)
    task = Task(images, np.arange(n) % 2, ["0", "1"], None, np.arange(n), [], flip=True)
    network = load_encoder("scratch", args.arch, 0)
    model = torch.nn.Sequential(network, torch.nn.Linear(network.inplanes, 2))
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=5e-4)
    settings = SimpleNamespace(batch_size=args.batch_size, device=device)
    settings.precision = str(precision).removeprefix("torch.")
    generator = torch.Generator().manual_seed(0)
    inputs = to_input(torch.rand(args.batch_size, args.size, args.size, device=device))

    bare = partial(bare_steps, args, model, optimizer, precision, inputs)
    order = torch.arange(n)
    ours = partial(evaluate.train_epoch, model, optimizer, task, order, generator, settings)
    ours()
    sides = {"ours": ours, "forward, backward and optimiser alone": bare}
    compare(f"Fine-tuning, {args.arch}, {args.size} px", args, sides, n, "images")


# --- Measuring


def compare(title, args, sides, amount, unit):
    """Call the functions of {name: function} in turns; print their rates, and the first's ratios.

    amount: what a call does, in units; or a function returns its own rate.
    """
    if args.ours:
        sides = {name: call for name, call in sides.items() if name not in OTHERS}
    rates = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, call in sides.items():
            started = time.perf_counter()
            rate = call()
            rates[name].append(rate or amount / (time.perf_counter() - started))
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


def run_plain(name, *arguments):
    """What a function of PLAIN returns, called in a process of its own."""
    return json.loads(run(__file__, name, *arguments).splitlines()[-1])


# --- The plain ways. They share nothing with our code.


def plain_hash(data, folder):
    """As the authors' scripts do it: DICOM -> PNG -> dHash -> greedy -> copy. The files kept."""
    import cv2
    import imagehash
    import pydicom
    from PIL import Image

    png, kept_folder = Path(folder, "png"), Path(folder, "kept")
    png.mkdir(parents=True)
    kept_folder.mkdir(parents=True)
    volumes = {}
    for file in sorted(Path(data).rglob("*.dcm")):
        dataset = pydicom.dcmread(file)
        stored = dataset.pixel_array.astype(np.int16)
        stored[stored == -2000] = 0
        hu = stored * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        grey = cv2.normalize(hu, None, 0, 255, cv2.NORM_MINMAX)
        image = png / f"{file.parent.name}_{file.stem}.png"
        cv2.imwrite(str(image), np.rint(grey).astype(np.uint8))
        z = float(dataset.ImagePositionPatient[2])
        volumes.setdefault(dataset.SeriesInstanceUID, []).append((z, image, file))
    kept = []
    for slices in volumes.values():
        remaining = [(imagehash.dhash(Image.open(png)), png, dcm) for _, png, dcm in sorted(slices)]
        while remaining:
            first, image, file = remaining[0]
            shutil.copy(image, kept_folder)
            kept.append(file.relative_to(data).as_posix())
            remaining = [slice for slice in remaining if slice[0] - first > 6]
    return sorted(kept)


def plain_similarity(name, path, first, n):
    """The first slice of a volume of n slices of the store with each of them: pairs/s."""
    from skimage.metrics import structural_similarity
    from sklearn.metrics import normalized_mutual_info_score

    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    measure = {
        "ssim": lambda a, b: structural_similarity(a, b, data_range=255, **window),
        "mutual_information": lambda a, b: normalized_mutual_info_score(
            a.ravel() // 8, b.ravel() // 8
        ),
    }[name]
    slices = np.load(path, mmap_mode="r")[int(first) :][: int(n)]
    started = time.perf_counter()
    for other in slices:
        measure(slices[0], other)
    return len(slices) / (time.perf_counter() - started)


def plain_lightly(folder, arch, size, batch_size, steps):
    """SimCLR as lightly's documentation sets it up: views/s, without the steps of the start."""
    import torch
    import torchvision
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    size, batch_size, steps = int(size), int(batch_size), int(steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resnet = torchvision.models.get_model(arch, weights=None)
    width = resnet.fc.in_features
    resnet.fc = torch.nn.Identity()
    model = torch.nn.Sequential(resnet, SimCLRProjectionHead(width, width, 128)).to(device)
    dataset = LightlyDataset(folder, transform=SimCLRTransform(input_size=size))
    workers = len(os.sched_getaffinity(0))
    loading = {"num_workers": workers, "persistent_workers": True}
    loader = torch.utils.data.DataLoader(dataset, batch_size, True, drop_last=True, **loading)
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    ready = 1 + 2 * workers  # each process reads two batches ahead
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for step, ((x0, x1), *_) in enumerate(batches):
        if step == ready:
            started = time.perf_counter()
        if step == ready + steps:
            return 2 * batch_size * steps / (time.perf_counter() - started)
        loss = criterion(model(x0.to(device)), model(x1.to(device)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()


PARTS = {"reduce": reduce_part, "pretrain": pretrain_part, "evaluate": evaluate_part}
PLAIN = {function.__name__: function for function in (plain_hash, plain_similarity, plain_lightly)}

if __name__ == "__main__":
    main()
