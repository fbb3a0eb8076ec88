"""The slice store: every readable slice of a data folder, decoded once, and the selections that lie beside it.

OUT/slices.npy (uint8 [N, size, size], volume after volume in z order), OUT/slices.csv, OUT/skipped.csv and, written
last, OUT/store.json, which says what the store was made from: without it a store does not count as finished.
"""

import csv
import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import ct
from common.files import fail, whole_file
from common.reduction import dhash

COLUMNS = ["row", "volume", "position", "file", "dhash"]


class Store(NamedTuple):
    slices: np.ndarray  # uint8 [N, size, size], memory-mapped
    hashes: np.ndarray  # uint64 [N], dHash of the full-resolution slices
    names: list[str]  # of the volumes
    volumes: list[np.ndarray]  # the rows of each volume, in z order
    skipped: int  # files left out, listed in skipped.csv


def open_or_build_store(data, out, size, window, workers):
    """The Store in out; decodes data only if out holds none yet, refuses a store of other data or settings."""
    if not data.is_dir():
        fail(f"{data}: no such folder: DATA must be a folder that holds CT slices")
    if data.resolve() == out.resolve() or data.resolve() in out.resolve().parents:
        fail(f"{out} lies inside {data}: choose an OUT elsewhere, or its pictures would count as slices")
    files = ct.list_files(data)
    made_from = {
        "files": len(files),
        "fingerprint": hashlib.sha256(repr(files).encode(errors="surrogateescape")).hexdigest(),
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
        build_store(data, out, [file for file, _, _ in files], size, window, workers)
        with whole_file(out / "store.json", text=True) as file:
            json.dump(made_from, file, indent=1)
    return read_store(out)


def build_store(data, out, files, size, window, workers):
    """Decode every slice below data in parallel, in order, into slices.npy, slices.csv and skipped.csv."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(workers or cores) as pool:

        def read_headers(read, paths):
            return tqdm(pool.map(read, paths, chunksize=64), "headers", len(paths), unit="file", disable=not paths)

        volumes, skipped = ct.find_volumes(data, files, read_headers)
        places = [(v.name, position, file) for v in volumes for file, position in zip(v.files, v.positions)]
        paths = [Path(data, file) for _, _, file in places]
        decoded = pool.map(partial(decode, size=size, window=window), paths, chunksize=8)
        progress = tqdm(zip(places, decoded), "slices", len(places), unit="slice", disable=not places)
        n, n_volumes = write_slices(data, out, progress, size, skipped)
    with whole_file(out / "skipped.csv", text=True) as file:
        csv.writer(file, lineterminator="\n").writerows([("file", "reason"), *sorted(skipped)])
    left_out = f"{len(skipped)} file{'s' * (len(skipped) != 1)} skipped" + (f", see {out / 'skipped.csv'}" if skipped else "")
    print(f"{n} slices of {n_volumes} volumes; {left_out}")


def decode(path, size, window):
    """(uint8 [size, size], dhash of the full-resolution slice), or the reason (str) why there is none."""
    try:
        slice8 = ct.read_slice(path, window)
        return np.asarray(Image.fromarray(slice8).resize((size, size), Image.Resampling.BILINEAR)), dhash(slice8)
    except ct.Unusable as error:
        return str(error)


def write_slices(data, out, decoded, size, skipped):
    """Write slices.npy and slices.csv in one pass; append to skipped. Returns the numbers of slices and volumes."""
    n, volumes = 0, set()
    with whole_file(out / "slices.npy") as array_file, whole_file(out / "slices.csv", text=True) as csv_file:
        write_npy_header(array_file, 0, size)
        writer = csv.writer(csv_file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for (volume, position, file), result in decoded:
            if isinstance(result, str):
                skipped.append((file, result))
                continue
            pixels, bits = result
            array_file.write(pixels.tobytes())
            writer.writerow([n, volume, position, file, bits])
            volumes.add(volume)
            n += 1
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
    slices = np.load(out / "slices.npy", mmap_mode="r")
    with open(out / "slices.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    if len(rows) != len(slices):
        fail(f"{out}: slices.npy holds {len(slices)} slices, slices.csv {len(rows)}; delete {out} to build it again")
    members = {}
    for row, line in enumerate(rows):
        members.setdefault(line["volume"], []).append(row)
    with open(out / "skipped.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        skipped = sum(1 for _ in csv.DictReader(file))
    hashes = np.array([int(line["dhash"], 16) for line in rows], np.uint64)
    return Store(slices, hashes, list(members), [np.array(m) for m in members.values()], skipped)


def read_selection(path):
    """NAME.csv -> (slices.npy of the store beside it, memory-mapped; the kept rows, int array)."""
    path = Path(path)
    if not path.is_file():
        fail(f"{path}: no such selection: make one with reduce.py")
    if not (path.parent / "slices.npy").is_file():
        fail(f"{path}: no slices.npy beside it: a selection belongs in the folder where reduce.py wrote it")
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
