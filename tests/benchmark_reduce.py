"""The parts of `benchmark.py reduce`: decoding, similarities, a whole data set at once, growth, and what it adds up to."""

import csv
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

import numpy as np
import pydicom

from common import hashing, reduction
from common.encoder import embed
from common.similarity import MEASURES
from common.store import read_store
from common.workers import in_order, worker_pool
from reduce import DEFAULT_THRESHOLDS, select_volume
from tests.benchmark import ROOT, alternate, peak, plain_python, ratio, spread

SLICES = 2000  # that the full-size slices are repeated to
PAPER = {"LIDC-IDRI": (1010, 243_958), "PET-CT": (891, 541_439)}  # volumes, slices (official code)
PROCESSES = len(os.sched_getaffinity(0))
PYDICOM_ALONE = """
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import pydicom

def decode(path):
    return pydicom.dcmread(path).pixel_array.shape

with ProcessPoolExecutor(int(sys.argv[2])) as pool:
    for _ in pool.map(decode, sorted(Path(sys.argv[1]).rglob("*.dcm")), chunksize=16):
        pass
"""
DRAFT_HOURS = {"hash": (2, 3), "ssim": (92, 340), "mi": (90, 312)}  # drafts of the authors' charts
EMBEDDED = 64  # slices, to time ResNet-50


def run(args):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        decode_ms = decoding(args, folder)
        rates = similarities(args, folder)
        dataset_seconds = whole_dataset()
        growth(folder)
        extrapolate(args, decode_ms, rates, dataset_seconds, folder)


def decoding(args, folder):
    """DICOM to a hash-6 selection, against the plain way and against pydicom alone."""
    dicom = repeat(args.dicom, folder / "dicom")
    files = sorted(dicom.rglob("*.dcm"))

    def ours():
        shutil.rmtree(folder / "ours", ignore_errors=True)
        reduce(dicom, folder / "ours", "--strategy", "hash")

    def plain():
        shutil.rmtree(folder / "plain", ignore_errors=True)
        kept["plain"] = plain_way("hash", dicom, folder / "plain")

    def pydicom_alone():
        subprocess.run([sys.executable, "-c", PYDICOM_ALONE, dicom, str(PROCESSES)], check=True)

    kept = {}
    seconds = alternate(args.rounds, ours=ours, plain=plain, pydicom_alone=pydicom_alone)
    with (
        open(folder / "ours" / "hash-6.csv") as rows,
        open(folder / "ours" / "slices.csv") as slices,
    ):
        ours_kept = sorted(
            s["file"]
            for r, s in zip(csv.DictReader(rows), csv.DictReader(slices))
            if r["kept"] == "1"
        )
    print(
        f"DICOM to hash-6, {len(files)} slices {pydicom.dcmread(files[0]).pixel_array.shape}, {PROCESSES} processes"
    )
    print(f"  reduce.py            {spread(seconds['ours'])} s")
    print(
        f"  plain way, 1 process {spread(seconds['plain'])} s, {ratio(seconds['plain'], seconds['ours'])} times as long"
    )
    print(
        f"  pydicom alone        {spread(seconds['pydicom_alone'])} s; "
        f"reduce.py takes {ratio(seconds['ours'], seconds['pydicom_alone'])} times that"
    )
    print(
        f"  same selection: {'yes' if ours_kept == kept['plain'] else 'NO'}, {len(ours_kept)} kept\n"
    )
    return statistics.median(seconds["ours"]) / len(files) * 1e3


def repeat(source, target):
    """Some SLICES slices: the DICOM files of source under other series UIDs."""
    datasets = [pydicom.dcmread(file) for file in sorted(source.rglob("*")) if file.is_file()]
    for copy in range(-(-SLICES // len(datasets))):
        (target / f"series{copy}").mkdir(parents=True)
        for i, dataset in enumerate(datasets):
            dataset.SeriesInstanceUID = f"1.2.3.{copy}"
            dataset.SOPInstanceUID = f"1.2.3.{copy}.{i}"
            dataset.save_as(target / f"series{copy}" / f"{i:04}.dcm")
    return target


def similarities(args, folder):
    """SSIM and mutual information, against plain loops over scikit-image and scikit-learn: pairs/s of ours."""
    out = folder / "volumes"
    reduce(args.volumes, out, "--strategy", "all")
    store = read_store(out)
    firsts = {"ssim": 5, "mi": 15}
    ours = {name: [] for name in MEASURES}
    plain = {name: [] for name in MEASURES}
    n_plain = 150
    for _ in range(args.rounds):
        for name in MEASURES:
            started = time.perf_counter()
            with worker_pool(PROCESSES) as pool:
                spans = [(rows[0], rows[-1] + 1) for rows in store.volumes]
                pairs = sum(
                    in_order(pool, partial(measure_pairs, store.path, name, firsts[name]), spans)
                )
            ours[name].append(pairs / (time.perf_counter() - started))
        found = plain_way("pairs", store.path, n_plain)
        for name in MEASURES:
            plain[name].append(n_plain / found[name]["seconds"])
    rows = np.linspace(0, len(store.slices) - 2, n_plain).astype(int)
    print(
        f"Similarities, {len(store.slices)} slices {store.slices.shape[1:]} of {len(store.volumes)} volumes, {PROCESSES} processes"
    )
    for name, measure in MEASURES.items():
        error = max(
            abs(measure(store.slices[[i, i + 1]])(0, [1])[0] - v)
            for i, v in zip(rows, found[name]["values"])
        )
        print(
            f"  {name:4} {spread(ours[name], 0)} pairs/s; plain loop, 1 process {spread(plain[name], 0)}; "
            f"ratio {ratio(ours[name], plain[name])}; largest difference {error:.1e}"
        )
    shortest = sorted(store.volumes, key=len)[:3]
    for name, measure in MEASURES.items():
        threshold, same = DEFAULT_THRESHOLDS[name], True
        for rows in shortest:
            span = (int(rows[0]), int(rows[-1]) + 1)
            mine = select_volume(store.path, name, threshold, span)[0] + span[0]
            same &= mine.tolist() == plain_way("select", store.path, name, threshold, *span)
        print(
            f"  {name:4} selections of {len(shortest)} volumes at {threshold} as by the plain loop: {'yes' if same else 'NO'}"
        )
    print()
    return {name: statistics.median(rates) for name, rates in ours.items()}


def measure_pairs(path, name, firsts, span):
    """Similarities of some slices of a volume to all of it; how many."""
    slices = np.array(np.load(path, mmap_mode="r")[span[0] : span[1]])
    measure, others = MEASURES[name](slices), np.arange(len(slices))
    return sum(
        len(measure(first, others)) for first in np.linspace(0, len(slices) - 1, firsts).astype(int)
    )


def whole_dataset():
    """Greedy hash over as many hashes as PET-CT has slices, drawn like real neighbours; brute force on a part."""
    volumes, slices = PAPER["PET-CT"]
    code = (
        "import sys, time; from tests.benchmark_reduce import random_walks; from common import reduction\n"
        f"hashes = random_walks({volumes}, {slices}); started = time.perf_counter()\n"
        "kept = len(set(reduction.select_hash(hashes, 6).tolist())); print(kept, time.perf_counter() - started)"
    )
    command = [sys.executable, "-c", code]
    kept, seconds = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    part = random_walks(33, 20_000)
    brute, _ = reduction.greedy(
        len(part), lambda i, rest: hashing.hamming(part[i], part[rest]), lambda bits: bits <= 6
    )
    same = (reduction.select_hash(part, 6) == brute).all()
    mib = peak([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + code])[1]
    print(
        f"Whole data set, {slices} hashes (random walks of {volumes} volumes), t = 6: {float(seconds):.1f} s, {mib:.0f} MiB, "
        f"{kept} kept; as brute force on {len(part)}: {'yes' if same else 'NO'}\n"
    )
    return float(seconds)


def random_walks(volumes, slices, seed=0):
    """uint64 [slices]: in each volume, from a random hash on, a few of the 64 bits turn from slice to slice."""
    rng = np.random.default_rng(seed)
    turns = rng.random((slices, 64)) < 0.02
    starts = np.linspace(0, slices, volumes, endpoint=False).astype(int)
    turns[starts] = rng.random((volumes, 64)) < 0.5
    bits = np.logical_xor.accumulate(turns, 0)
    return np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)


def growth(folder):
    """Time and memory of reduce.py for twice the volumes."""
    print("Growth (hash-6 from DICOM; SSIM from the store), and the largest process")
    once = folder / "dicom"
    half = folder / "half"
    for series in sorted(once.iterdir())[::2]:
        shutil.copytree(series, half / series.name)
    for strategy in ("hash", "ssim"):
        for name, data in (("half", half), ("all", once)):
            command = [
                sys.executable,
                ROOT / "reduce.py",
                data,
                folder / f"growth-{name}",
                "--strategy",
                strategy,
            ]
            seconds, mib = peak(command)
            print(
                f"  {strategy:4} {sum(1 for _ in data.rglob('*.dcm'))} slices: {seconds:.1f} s, {mib:.0f} MiB"
            )
    print()


def extrapolate(args, decode_ms, rates, dataset_seconds, folder):
    """Hours for the paper's data sets on this machine, from the rates above."""
    print(
        "The paper's data sets on this machine, from these rates: hours to read the DICOM files + hours to select at the"
    )
    print(
        "default threshold (in brackets: to compute similarities in the authors' way, by their drafts)"
    )
    print(
        "| strategy | "
        + " | ".join(f"{name}, {slices:,} slices" for name, (_, slices) in PAPER.items())
        + " |"
    )
    print("|" + "---|" * (1 + len(PAPER)))
    store = read_store(folder / "volumes")
    started = time.perf_counter()
    embed("scratch", store.slices[:EMBEDDED], folder)  # random weights cost what ImageNet's do
    embedding_rate = EMBEDDED / (time.perf_counter() - started)
    for strategy in ("hash", "ssim", "mi", "embedding"):
        cells = []
        for i, (volumes, slices) in enumerate(PAPER.values()):
            if strategy == "hash":
                seconds = (
                    dataset_seconds * slices / PAPER["PET-CT"][1]
                )  # the whole data set at once, so at most this
            elif strategy == "embedding":
                seconds = slices / embedding_rate
            else:
                longer = (slices / volumes) / (len(store.slices) / len(store.volumes))
                seconds = (
                    slices
                    * pairs_per_slice(args, folder, store, strategy)
                    * longer
                    / rates[strategy]
                )
            draft = DRAFT_HOURS.get(strategy, ("-", "-"))[i]
            cells.append(f"{slices * decode_ms / 3.6e6:.2f} + {seconds / 3600:.2f} ({draft})")
        print(f"| {strategy} | " + " | ".join(cells) + " |")
    print(
        f"A pair costs the same everywhere; pairs a slice grow with the length of a volume. embedding: ResNet-50, "
        f"{embedding_rate:.1f} slices/s."
    )


def pairs_per_slice(args, folder, store, strategy):
    """How many slices the greedy rule compares with a kept one, a slice, at the default threshold."""
    reduce(args.volumes, folder / "volumes", "--strategy", strategy)
    with open(folder / "volumes" / f"{strategy}-{DEFAULT_THRESHOLDS[strategy]:g}.csv") as file:
        representative = np.array([int(row["representative"]) for row in csv.DictReader(file)])
    found = [representative[rows] for rows in store.volumes]
    return sum((r >= kept).sum() for r in found for kept in np.unique(r)) / len(representative)


def reduce(data, out, *flags):
    subprocess.run(
        [sys.executable, ROOT / "reduce.py", data, out, *flags], check=True, capture_output=True
    )


def plain_way(*arguments):
    command = [plain_python(), ROOT / "tests" / "plain_way.py", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
