"""The slice store: every readable slice of a data folder, decoded once, and the selections that lie beside it.

OUT/slices.npy (uint8 [N, size, size], volume after volume in z order), OUT/slices.csv, OUT/skipped.csv and, written
last, OUT/store.json, which says what the store was made from: without it a store does not count as finished.
"""

import csv
import hashlib
import json
import os
import signal
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from common import ct
from common.files import fail, whole_file
from common.reduction import dhash

BATCH, AHEAD = 16, 32  # slices decoded at a time; batches in work or waiting to be written
COLUMNS = ["row", "volume", "position", "file", "dhash"]


class Store(NamedTuple):
    path: Path  # of slices.npy
    slices: np.ndarray  # uint8 [N, size, size], memory-mapped
    hashes: np.ndarray  # uint64 [N], dHash of the full-resolution slices
    names: list[str]  # of the volumes
    volumes: list[np.ndarray]  # the rows of each volume, in z order, one after the other
    skipped: int  # files left out, listed in skipped.csv


def check_folders(data, out):
    if not data.is_dir():
        fail(f"{data}: no such folder: DATA must be a folder that holds CT slices")
    if data.resolve() == out.resolve() or data.resolve() in out.resolve().parents:
        fail(f"{out} lies inside {data}: choose an OUT elsewhere, or its pictures would count as slices")


def open_or_build_store(data, out, size, window, workers):
    """The Store in out; decodes data only if out holds none yet, refuses a store of other data or settings."""
    files = ct.list_files(data)
    made_from = {
        "files": len(files),
        "fingerprint": fingerprint(files),
        "size": size,
        "window": window,
    }
    if (out / "store.json").exists():
        found = json.loads((out / "store.json").read_text())
        changed = [key for key in made_from if found.get(key) != made_from[key]]
        if changed:
            what = "the files of DATA (names, sizes or times)" if "fingerprint" in changed else ", ".join(changed)
            fail(f"{out} was made from other input: {what} changed; give another OUT, or delete this one")
    else:
        for old in out.glob("features-*.npy"):  # of a store that was deleted
            old.unlink()
        build_store(data, out, [file for file, _, _ in files], size, window, workers)
        with whole_file(out / "store.json", text=True) as file:
            json.dump(made_from | {"crc32": checksums(out)}, file, indent=1)
    return read_store(out)


def checksums(out):
    """CRC-32 of the files that make a store, so that a flipped byte or a lost end is noticed."""
    found = {}
    for name in ("slices.npy", "slices.csv"):
        with open(out / name, "rb") as file:
            crc = 0
            while piece := file.read(1 << 24):
                crc = zlib.crc32(piece, crc)
        found[name] = crc
    return found


def check_store(out):
    """Stop with one line if the store in out is not as reduce.py wrote it; a hand-made one, without store.json, passes."""
    if not (out / "store.json").exists():
        return
    try:
        expected, found = json.loads((out / "store.json").read_text())["crc32"], checksums(out)
    except (OSError, ValueError, KeyError):
        fail(f"{out}: holds no whole slice store: delete it and run reduce.py again")
    damaged = [name for name in expected if found.get(name) != expected[name]]
    if damaged:
        fail(f"{out / damaged[0]}: damaged: it is not what reduce.py wrote; delete {out} and run reduce.py again")


def fingerprint(files):
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr(file).encode(errors="surrogateescape"))
    return digest.hexdigest()


def build_store(data, out, files, size, window, workers):
    """Decode every slice below data in parallel, in order, into slices.npy, slices.csv and skipped.csv."""
    with worker_pool(workers) as pool:

        def read_headers(read, paths):
            headers = chain.from_iterable(in_order(pool, partial(on_each, read), batches(paths, 64)))
            return tqdm(headers, "headers", len(paths), unit="file", disable=not paths)

        volumes, skipped = ct.find_volumes(data, files, read_headers)
        places = [(v.name, position, file) for v in volumes for file, position in zip(v.files, v.positions)]
        jobs = ((Path(data, file), header) for v in volumes for file, header in zip(v.files, v.headers))
        decoded = in_order(pool, partial(decode, size=size, window=window), batches(jobs, BATCH))
        with tqdm(desc="slices", total=len(places), unit="slice", disable=not places) as progress:
            n, n_volumes = write_slices(data, out, places, decoded, progress, size, skipped)
    with whole_file(out / "skipped.csv", text=True) as file:
        csv.writer(file, lineterminator="\n").writerows([("file", "reason"), *sorted(skipped)])
    left_out = f"{len(skipped)} file{'s' * (len(skipped) != 1)} skipped" + (f", see {out / 'skipped.csv'}" if skipped else "")
    print(f"{n} slices of {n_volumes} volumes; {left_out}")


def worker_pool(workers):
    """A pool of processes, as many as there are cores by default; each computes in one thread, or they would fight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ProcessPoolExecutor(workers or cores, initializer=start_worker)


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    threadpool_limits(1)
    np.empty(2**24, np.uint8)  # once freed, glibc keeps the memory of smaller arrays instead of giving it back each time


def in_order(pool, work, jobs):
    """Yield work(job) of every job, in order, worked on in the pool; only so many at a time that memory stays bounded."""
    running = deque()
    for job in jobs:
        running.append(pool.submit(work, job))
        if len(running) >= AHEAD:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def batches(items, size):
    items = iter(items)
    return iter(lambda: list(islice(items, size)), [])


def on_each(work, items):
    return [work(item) for item in items]


def decode(jobs, size, window):
    """[(path, Header or None)] -> (all their pixels as bytes, [dhash at full resolution, or Unusable]).

    Pixels are uint8 [size, size], resized with antialiasing, larger slices by a mean of whole pixels first (our choice).
    """
    pixels, found = [], []
    for path, header in jobs:
        try:
            slice8 = ct.read_slice(path, window, header)
        except ct.Unusable as error:
            found.append(error)
            continue
        image, bits = Image.fromarray(slice8), dhash(slice8)
        if not pixels and bits != str(imagehash.dhash(image)):
            fail("dHash differs from imagehash's: install the versions in requirements.txt, Pillow's above all")
        pixels.append(image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=1.0).tobytes())
        found.append(bits)
    return b"".join(pixels), found


def write_slices(data, out, places, decoded, progress, size, skipped):
    """Write slices.npy and slices.csv in one pass; append to skipped. Returns the numbers of slices and volumes."""
    n, volumes, places = 0, set(), iter(places)
    with whole_file(out / "slices.npy") as array_file, whole_file(out / "slices.csv", text=True) as csv_file:
        write_npy_header(array_file, 0, size)
        writer = csv.writer(csv_file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for pixels, found in decoded:
            array_file.write(pixels)
            for result, (volume, position, file) in zip(found, places):
                if isinstance(result, ct.Unusable):
                    skipped.append((file, str(result)))
                    continue
                writer.writerow([n, volume, position, file, result])
                volumes.add(volume)
                n += 1
            progress.update(len(found))
        if n == 0:
            most = Counter(why for _, why in skipped).most_common(1)
            fail(f"{data}: no CT slice found" + (f"; {len(skipped)} files skipped, most: {most[0][0]}" if most else ""))
        array_file.seek(0)
        write_npy_header(array_file, n, size)  # same length: NumPy leaves room for the first axis to grow
    return n, len(volumes)


def write_npy_header(file, n, size):
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, size, size)}
    np.lib.format.write_array_header_1_0(file, header)


def read_store(out):
    """The Store in the folder out."""
    check_store(out)
    slices = np.load(out / "slices.npy", mmap_mode="r")
    hashes, names, starts = np.empty(len(slices), np.uint64), [], []
    n = -1
    for n, line in enumerate(read_lines(out / "slices.csv")):
        if n < len(slices):
            hashes[n] = int(line["dhash"], 16)
            if not names or line["volume"] != names[-1]:
                names.append(line["volume"])
                starts.append(n)
    if n + 1 != len(slices):
        fail(f"{out}: slices.npy holds {len(slices)} slices, slices.csv {n + 1}; delete {out} to build it again")
    skipped = sum(1 for _ in read_lines(out / "skipped.csv"))
    return Store(out / "slices.npy", slices, hashes, names, np.split(np.arange(n + 1), starts[1:]), skipped)


def read_lines(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        yield from csv.DictReader(file)


def read_selection(path):
    """NAME.csv -> (slices.npy of the store beside it, memory-mapped; the kept rows, int array)."""
    path = Path(path)
    if not path.is_file():
        fail(f"{path}: no such selection: make one with reduce.py")
    if not (path.parent / "slices.npy").is_file():
        fail(f"{path}: no slices.npy beside it: a selection belongs in the folder where reduce.py wrote it")
    check_store(path.parent)
    slices = np.load(path.parent / "slices.npy", mmap_mode="r")
    try:
        with open(path, newline="") as file:
            lines = [(int(line["row"]), int(line["kept"])) for line in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError):
        fail(f"{path}: not a selection: it needs the columns row and kept, in whole numbers")
    if [row for row, _ in lines] != list(range(len(slices))):
        fail(f"{path}: must list the rows 0 to {len(slices) - 1} of slices.npy in order; make it again with reduce.py")
    kept = np.array([row for row, k in lines if k], int)
    if not len(kept):
        fail(f"{path}: keeps no slice")
    return slices, kept
