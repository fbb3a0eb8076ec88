"""How fast the package is, beside the plain way to do the same.

    python tests/benchmark.py reduce --dicom DIR --volumes DIR
    python tests/benchmark.py pretrain --volumes DIR
    python tests/benchmark.py evaluate

The sides of a comparison take turns (A B A B ...). Printed are medians (smallest to largest); a
ratio is taken round by round. The plain ways stand at the end of this file; the packages that only
they need are installed into .venv-benchmark on the first call, and this file runs there again.
"""

import argparse
import csv
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PACKAGES = ["scikit-image==0.26.0", "opencv-python-headless==5.0.0.93", "lightly==1.6.0"]
SLICES = 2000  # that the slices of --dicom are repeated to
PAIRS = 150  # of slices, for the plain similarities
COMPARED = {"ssim": 5, "mi": 15}  # slices of a volume that ours compares with all of it
PET_CT = 541_439  # slices (official code)
PET_CT_VOLUMES = 891


def main():
    if sys.argv[1:2] and sys.argv[1] in HIDDEN:
        print(json.dumps(HIDDEN[sys.argv[1]](*sys.argv[2:])))
        return
    args = parse_args()
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    print(f"{processor()}, {cores} cores, load {load:.1f} at the start, {args.rounds} rounds\n")
    with tempfile.TemporaryDirectory() as folder:
        PARTS[args.part](args, Path(folder))


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)

    part = parts.add_parser("reduce", help="DICOM to a selection, similarities, the hash index")
    part.add_argument("--dicom", type=Path, required=True, help="DICOM slices of full size")
    part.add_argument("--volumes", type=Path, required=True, help="CT volumes, for similarities")
    part.add_argument("--rounds", type=int, default=3, help="times that each side runs")

    part = parts.add_parser("pretrain", help="the training step; lightly's SimCLR")
    part.add_argument("--volumes", type=Path, required=True, help="CT volumes to train on")
    part.add_argument("--steps", type=int, default=8, help="training steps a round")
    add_network_flags(part)

    part = parts.add_parser("evaluate", help="the fine-tuning step")
    part.add_argument("--steps", type=int, default=8, help="training steps a round")
    add_network_flags(part)
    return parser.parse_args()


def add_network_flags(part):
    part.add_argument("--arch", default="resnet18")
    part.add_argument("--size", type=int, default=96, help="side of a view in pixels")
    part.add_argument("--batch-size", type=int, default=128)
    part.add_argument("--rounds", type=int, default=3, help="times that each side runs")


# --- reduce


def reduce_part(args, folder):
    dicom_to_selection(args, folder)
    similarities(args, folder)
    hash_index()


def dicom_to_selection(args, folder):
    """DICOM to a hash-6 selection, by reduce.py and the plain way."""
    dicom = folder / "dicom"
    shape = repeat_slices(args.dicom, dicom)
    out = folder / "ours"
    plain_kept = []

    def ours():
        subprocess.run(["rm", "-rf", out], check=True)
        run_script("reduce.py", dicom, out, "--strategy", "hash")

    def plain():
        subprocess.run(["rm", "-rf", folder / "plain"], check=True)
        plain_kept[:] = run_plain("plain-hash", dicom, folder / "plain")

    sides = {
        "reduce.py": ours,
        "the plain way in 1 process": plain,
    }
    seconds = alternate(args.rounds, sides)
    with open(out / "slices.csv") as slices, open(out / "hash-6.csv") as selection:
        files = [line["file"] for line in csv.DictReader(slices)]
        kept = [int(line["kept"]) for line in csv.DictReader(selection)]
    same = sorted(np.array(files)[np.array(kept) == 1]) == plain_kept

    title = f"DICOM to hash-6, {len(files)} slices of {shape[0]} x {shape[1]}"
    compare(title, "s", seconds)
    print(f"  same selection: {'yes' if same else 'NO'}, {sum(kept)} kept\n")


def repeat_slices(source, target):
    """Write SLICES slices: the DICOM files of source, again and again as another series."""
    import pydicom

    datasets = [pydicom.dcmread(file) for file in sorted(source.rglob("*")) if file.is_file()]
    for number in range(SLICES):
        series, i = divmod(number, len(datasets))
        dataset = datasets[i]
        dataset.SeriesInstanceUID = f"1.2.3.{series}"
        dataset.SOPInstanceUID = f"1.2.3.{series}.{i}"
        path = target / f"series{series}" / f"{i:04}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path)
    return datasets[0].Rows, datasets[0].Columns


def similarities(args, folder):
    """SSIM and mutual information: pairs/s, and the largest difference to the plain value."""
    from common.similarity import MEASURES
    from common.store import read_store

    out = folder / "volumes"
    run_script("reduce.py", args.volumes, out, "--strategy", "all")
    store = read_store(out)
    rates = {name: {"ours": [], "a plain loop in 1 process": []} for name in COMPARED}
    for _ in range(args.rounds):
        plain = run_plain("plain-pairs", store.path, PAIRS)
        for name, sides in rates.items():
            sides["ours"].append(our_pairs_a_second(store, name))
            sides["a plain loop in 1 process"].append(PAIRS / plain[name]["seconds"])

    n, height, width = store.slices.shape
    for name in COMPARED:
        differences = []
        for row, value in zip(rows_of_pairs(n, PAIRS), plain[name]["values"]):
            [similarity] = MEASURES[name](store.slices[[row, row + 1]])(0, [1])
            differences.append(abs(similarity - value))
        compare(f"{name}, {n} slices of {height} x {width}", "pairs/s", rates[name])
        print(f"  largest difference: {max(differences):.1e}\n")


def our_pairs_a_second(store, name):
    from common.workers import in_order, worker_pool

    started = time.perf_counter()
    with worker_pool(None) as pool:
        spans = [(rows[0], rows[-1] + 1) for rows in store.volumes]
        pairs = sum(in_order(pool, partial(compare_volume, store.path, name), spans))
    return pairs / (time.perf_counter() - started)


def compare_volume(path, name, span):
    """Compare some slices of a volume with all of it; the number of pairs."""
    from common.similarity import MEASURES

    slices = np.array(np.load(path, mmap_mode="r")[slice(*span)])
    similarity_to = MEASURES[name](slices)
    firsts = np.linspace(0, len(slices) - 1, COMPARED[name]).astype(int)
    return sum(len(similarity_to(first, np.arange(len(slices)))) for first in firsts)


def hash_index():
    found = run_plain("select-made-up-hashes", PET_CT, PET_CT_VOLUMES)
    print(
        f"hash-6 over {PET_CT} made-up hashes at once: {found['seconds']:.1f} s, "
        f"{found['mib']:.0f} MiB in all, {found['kept']} kept\n"
    )


def select_made_up_hashes(slices, volumes):
    """Greedy hash-6 over a whole data set: seconds, memory of the process, slices kept."""
    from common.reduction import select_hash

    hashes = made_up_hashes(int(slices), int(volumes))
    started = time.perf_counter()
    representative = select_hash(hashes, 6)
    seconds = time.perf_counter() - started
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "mib": mib, "kept": len(np.unique(representative))}


def made_up_hashes(slices, volumes):
    """uint64 [slices]: in each volume, from a random hash on, a few of 64 bits turn a slice."""
    rng = np.random.default_rng(0)
    found = []
    for volume in np.array_split(np.arange(slices), volumes):
        turns = rng.random((len(volume), 64)) < 0.02
        turns[0] = rng.random(64) < 0.5
        bits = np.logical_xor.accumulate(turns, 0)
        found.append(np.packbits(bits, axis=1).view(">u8").ravel())
    return np.concatenate(found).astype(np.uint64)


# --- pretrain


def pretrain_part(args, folder):
    run_script("reduce.py", args.volumes, folder / "store", "--strategy", "all")
    selection = folder / "store" / "all.csv"
    training_step(args, selection)
    against_lightly(args, selection, folder)


def training_step(args, selection):
    """A step of pretrain.py, its data and augmentation included, against the bare step."""
    import torch

    import pretrain
    from common import simclr
    from common.batches import stream
    from common.encoder import to_input
    from common.store import read_selection

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = simclr.choose_precision("auto", device, args.size)
    sys.argv = ["pretrain.py", *pretrain_flags(args, selection, "unused")]
    settings = pretrain.parse_args()
    model, optimizer = pretrain.build(settings, device)
    model.train()
    batches = stream(read_selection(selection), settings, 0, device)
    constant = torch.rand(2 * args.batch_size, args.size, args.size, device=device)
    inputs = to_input(constant)

    def ours():
        batch = next(batches)
        pretrain.train_step(model, optimizer, 1e-3, batch, settings, precision).sum().item()

    def bare():
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = model(inputs).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    compare_steps("Training step, data and augmentation included", args, args.steps, ours, bare)


def compare_steps(title, args, calls, ours, bare):
    """Alternate steps, or epochs, of ours with bare ones; the first of each does not count."""
    ours()
    bare()
    sides = {"ours": ours, "forward, backward and optimiser alone": bare}
    compare(f"{title}, {describe(args)}", "s", alternate(args.rounds * calls, sides))
    print()


def pretrain_flags(args, selection, run):
    flags = [selection, run, "--arch", args.arch, "--size", args.size]
    flags += ["--batch-size", args.batch_size, "--optimizer", "adamw", "--epochs", 2]
    return [str(flag) for flag in flags]


def against_lightly(args, selection, folder):
    """pretrain.py's second epoch against lightly's transform, loader, model and loss."""
    from PIL import Image

    from common.store import read_selection

    (folder / "png").mkdir()
    for row, pixels in enumerate(read_selection(selection).store.slices):
        Image.fromarray(pixels).save(folder / "png" / f"{row:05}.png")
    flags = [folder / "png", args.arch, args.size, args.batch_size, args.steps]
    rates = {"ours": [], "lightly as documented": [], "lightly with our precision and layout": []}
    for number in range(args.rounds):
        run = folder / f"run{number}"
        run_script("pretrain.py", *pretrain_flags(args, selection, run))
        last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
        rates["ours"].append(last["images_per_second"])
        rates["lightly as documented"].append(run_plain("lightly", *flags))
        same_precision = run_plain("lightly", *flags, "our-precision")
        rates["lightly with our precision and layout"].append(same_precision)
    compare(f"pretrain.py, {describe(args)}", "views/s", rates)


# --- evaluate


def evaluate_part(args, _):
    """An epoch of evaluate.py's fine-tuning, its data included, against the bare step."""
    import torch

    import evaluate
    from common import simclr
    from common.encoder import load_encoder, to_input
    from common.tasks import Task

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = simclr.choose_precision("auto", device, args.size)
    n = args.steps * args.batch_size
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n + 2, args.size, args.size), dtype=np.uint8)
    labels = np.arange(n + 2) % 2
    task = Task(images, labels, ["0", "1"], None, labels, [], None, vertical_flip=True)
    split = {"train": np.arange(n), "val": np.array([n]), "test": np.array([n + 1])}
    settings = SimpleNamespace(
        lr=1e-4,
        weight_decay=5e-4,
        epochs=1,
        freeze_epochs=0,
        batch_size=args.batch_size,
        name="ours",
        precision=str(precision).removeprefix("torch."),
    )
    encoder = load_encoder("scratch", args.arch, 0)
    bare_encoder = load_encoder("scratch", args.arch, 0)
    model = torch.nn.Sequential(bare_encoder, torch.nn.Linear(bare_encoder.inplanes, 2))
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=5e-4)
    inputs = to_input(torch.rand(args.batch_size, args.size, args.size, device=device))
    target = torch.arange(args.batch_size, device=device) % 2

    def ours():
        evaluate.finetune(encoder, task, split, 0, settings, device)

    def bare():
        for _ in range(args.steps):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                outputs = model(inputs).float()
            loss = torch.nn.functional.cross_entropy(outputs, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()

    title = f"Fine-tuning, {args.steps} steps, data, start and end included"
    compare_steps(title, args, 1, ours, bare)


# --- Measuring


def alternate(rounds, sides):
    """Call the functions of {name: function} in turns; {name: [seconds of each round]}."""
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(title, unit, sides):
    """Print {name: [value of each round]}, and how much faster the first is than the others."""
    print(title)
    for name, values in sides.items():
        print(f"  {name}: {spread(values)} {unit}")
    [(first, ours), *others] = sides.items()
    for name, values in others:
        times = [a / b for a, b in zip(ours, values)]
        if unit == "s":
            times = [1 / value for value in times]
        print(f"  {first} is {spread(times)} times as fast as {name}")


def spread(values):
    """Median (smallest to largest)."""
    middle = statistics.median(values)
    digits = max(0, 2 - math.floor(math.log10(middle)))  # three that count
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(": ")[1]
    return "unknown processor"


def describe(args):
    return f"{args.arch}, {args.size} px, batch {args.batch_size}"


def run_script(*command):
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}\n{done.stderr}")


def run_plain(name, *arguments):
    """What a hidden subcommand returns, run by .venv-benchmark's Python."""
    command = [plain_python(), __file__, name, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def plain_python():
    """The Python of .venv-benchmark, which also sees the packages of the one that runs this."""
    folder = ROOT / ".venv-benchmark"
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True)
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        [theirs] = folder.glob("lib/*/site-packages")
        (theirs / "ours.pth").write_text(ours + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (folder / "done").touch()
    return python


# --- The plain ways, run by .venv-benchmark's Python. They share nothing with our code but what is
# --- measured on purpose.


def plain_hash(data, folder):
    """As the authors' scripts do it: DICOM -> PNG -> dHash -> greedy -> copy. The files kept."""
    import shutil

    import cv2
    import imagehash
    import pydicom
    from PIL import Image

    png = Path(folder, "png")
    kept_folder = Path(folder, "kept")
    png.mkdir(parents=True)
    kept_folder.mkdir()
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
        remaining = []
        for _, image, file in sorted(slices):
            remaining.append((imagehash.dhash(Image.open(image)), image, file))
        while remaining:
            first, image, file = remaining[0]
            shutil.copy(image, kept_folder)
            kept.append(file.relative_to(data).as_posix())
            remaining = [slice for slice in remaining if slice[0] - first > 6]
    return sorted(kept)


def plain_pairs(path, n):
    """{measure: seconds, and the similarity of rows i and i + 1} for n rows all over the store."""
    from skimage.metrics import structural_similarity
    from sklearn.metrics import normalized_mutual_info_score

    def ssim(a, b):
        return structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )

    def mutual_information(a, b):
        return normalized_mutual_info_score(a.ravel() // 8, b.ravel() // 8)

    slices = np.load(path, mmap_mode="r")
    rows = rows_of_pairs(len(slices), int(n))
    found = {}
    for name, similarity in (("ssim", ssim), ("mi", mutual_information)):
        started = time.perf_counter()
        values = [similarity(slices[row], slices[row + 1]) for row in rows]
        found[name] = {"seconds": time.perf_counter() - started, "values": values}
    return found


def rows_of_pairs(slices, n):
    """The first rows of n pairs, all over a store of so many slices."""
    return np.linspace(0, slices - 2, n).astype(int)


def lightly(folder, arch, size, batch_size, steps, precision="float32"):
    """SimCLR as lightly's documentation sets it up: views/s over `steps` steps.

    It gets a loader process a core. The steps whose batches these had ready at the start do not
    count.
    precision "our-precision": with pretrain.py's precision and channels_last.
    """
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
    dtype = torch.float32
    if precision == "our-precision":
        from common.simclr import choose_precision

        dtype = choose_precision("auto", device, size)
        model = model.to(memory_format=torch.channels_last)
    dataset = LightlyDataset(folder, transform=SimCLRTransform(input_size=size))
    workers = len(os.sched_getaffinity(0))
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
    )
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    def endless():
        while True:
            yield from loader

    ready = 1 + 2 * workers  # each process reads two batches ahead
    for step, batch in enumerate(endless()):
        if step == ready:
            started = time.perf_counter()
        if step == ready + steps:
            return 2 * batch_size * steps / (time.perf_counter() - started)
        x0, x1 = batch[0]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            z0 = model(x0.to(device))
            z1 = model(x1.to(device))
        loss = criterion(z0.float(), z1.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()


PARTS = {"reduce": reduce_part, "pretrain": pretrain_part, "evaluate": evaluate_part}
HIDDEN = {
    "plain-hash": plain_hash,
    "plain-pairs": plain_pairs,
    "select-made-up-hashes": select_made_up_hashes,
    "lightly": lightly,
}

if __name__ == "__main__":
    main()
