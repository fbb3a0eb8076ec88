"""The slice store: every readable slice of DATA, decoded once, and the selections beside it.

OUT/slices.npy (uint8 [N, size, size], volume after volume in z order), OUT/slices.csv,
OUT/skipped.csv and, last, OUT/store.json, which says what made the store and that it is whole.
"""

import csv
import hashlib
import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import mode
from typing import NamedTuple

import numpy as np
from PIL import Image

from common import ct
from common.files import atomic_write, code, fail, read_json, refuse_other
from common.hashing import slice_hash
from common.volumes import find_volumes, folder_of, list_files
from common.workers import in_order

NOT_IN_STORE = ("reduce.py", "common/reduction.py", "common/similarity.py")  # they select
A_JOB = 32  # headers or slices, handed to a worker process at once
FEW = 4  # grey values: CT has more in every slice, a mask or a label map does not
SHOWN = 10  # kinds of skipped files, and warnings, on screen
REMEDY = "give another OUT, or delete this one"
AGAIN = "make it again with reduce.py"


class Store(NamedTuple):
    path: Path  # of slices.npy
    slices: np.ndarray  # uint8 [N, size, size], memory-mapped
    hashes: np.ndarray  # uint64 [N], slice_hash of the full-resolution slices
    names: list[str]  # of the volumes
    volumes: list[np.ndarray]  # the slices of each volume as indices, in z order

    @property
    def volume_index(self):
        """Which volume each slice belongs to: int [N]."""
        return np.repeat(np.arange(len(self.volumes)), [len(volume) for volume in self.volumes])


class Selection(NamedTuple):
    store: Store
    kept: np.ndarray  # indices of the slices that stay, int [kept]
    representative: np.ndarray  # the kept slice that stands for each slice of the store, int [N]
    digest: str  # 16 hex digits: changes with the selection and with the store


# --- Making a store.


def check_folders(data, out):
    """Stop with one line if DATA is no folder, or if DATA and OUT lie inside each other."""
    if not data.is_dir():
        fail(f"{data}: no such folder: DATA must be a folder that holds CT slices")
    for inner, outer in ((out, data), (data, out)):
        if inner.resolve().is_relative_to(outer.resolve()):
            fail(f"{inner} lies inside {outer}: choose another OUT, apart from DATA")


def open_or_build_store(data, out, size, window, workers):
    """The Store in out, built from DATA unless out holds one already; prints what is in it.

    size: pixels a side. window: [center, width] in HU, or None (see ct.scale_to_uint8). Stops with
    one line if the store was made otherwise.
    """
    files = list_files(data)  # with sizes and times
    fingerprint = hashlib.sha256(repr(files).encode(errors="surrogateescape")).hexdigest()[:8]
    settings = {"files": len(files), "fingerprint": fingerprint, "size": size, "window": window}
    if not (out / "store.json").exists():
        build_store(data, out, [file for file, _, _ in files], settings, workers)
    store = read_store(out, settings)
    report(store)
    return store


def build_store(data, out, files, settings, workers):
    """Decode every slice of the files, relative to data, in parallel and in order, into a store."""
    made = {"settings": settings, "code": code(*NOT_IN_STORE)}
    size = settings["size"]
    in_parallel = partial(in_order, workers=workers, batch=A_JOB)
    volumes, skipped, warnings = find_volumes(data, files, partial(in_parallel, unit="header"))
    jobs = [
        (volume.name, position, file, header)
        for volume in volumes
        for file, position, header in zip(*volume[1:], strict=True)
    ]
    work = partial(decode, data=str(data), size=size, window=settings["window"])
    lines, masks = [], {volume.name: folder_of(volume.files) for volume in volumes}
    with atomic_write(out / "slices.npy") as array:
        write_npy_header(array, len(jobs), size)
        results = in_parallel(work, jobs, unit="slice")
        for (name, position, file, _), result in zip(jobs, results, strict=True):
            if isinstance(result, ct.Unusable):
                skipped.append((file, str(result)))
                continue
            dhash, pixels, few = result
            if not few:
                masks.pop(name, None)
            array.write(pixels)
            lines.append((len(lines), name, position, file, dhash))
        if not lines:
            reasons = [reason for _, reason in skipped] or ["it is empty"]
            fail(f"{data}: no CT slice found, for most files: {mode(reasons)}")
        array.seek(0)
        write_npy_header(array, len(lines), size)
    text = f"no slice has more than {FEW} grey values: a mask, not CT? Move it out of DATA"
    warnings += [
        (name, f"in {masks[name]}: {text}") for name in {line[1] for line in lines} & {*masks}
    ]
    write_csv(out / "slices.csv", [("row", "volume", "position", "file", "dhash"), *lines])
    write_csv(out / "skipped.csv", [("file", "reason"), *sorted(skipped)])
    with atomic_write(out / "store.json", text=True) as file:
        json.dump(made | {"warnings": sorted(warnings)}, file, indent=1)


def decode(job, data, size, window):
    """A job of build_store -> (hash of the full resolution, pixels, has few values), or Unusable.

    Pixels: the bytes of uint8 [size, size], antialiased, larger slices by a mean of whole pixels
    first (ours).
    """
    _, _, file, header = job
    try:
        slice8 = ct.read_slice(os.path.join(data, file), window, header)
    except ct.Unusable as error:
        return error
    image = Image.fromarray(slice8)
    small = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=1.0)
    # a look at a part spares nearly all slices the whole
    few = np.bincount(slice8[::8, ::8].ravel()).astype(bool).sum() <= FEW
    few = few and image.getcolors(FEW) is not None
    return slice_hash(slice8), small.tobytes(), few


def write_npy_header(file, n, size):
    """Write a header of one length for any n: NumPy leaves room for the first axis to grow."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, size, size)}
    np.lib.format.write_array_header_1_0(file, header)


def write_csv(path, lines):
    with atomic_write(path, text=True) as file:
        for line in lines:
            # csv itself leaves names with a carriage return (macOS has them) unquoted
            quoting = csv.QUOTE_ALL if "\r" in "".join(map(str, line)) else csv.QUOTE_MINIMAL
            csv.writer(file, lineterminator="\n", quoting=quoting).writerow(line)


def report(store):
    """Print what a store holds, why files were left out and, on stderr, what is odd in it."""
    out = store.path.parent
    kinds = Counter(line["reason"].split(":")[0] for line in read_lines(out / "skipped.csv"))
    held = f"{len(store.slices)} slices, {len(store.names)} volumes; {kinds.total()} files skipped"
    print(f"{held}, see {out / 'skipped.csv'}")
    for kind, files in kinds.most_common(SHOWN):
        print(f"  {files} skipped: {kind}")
    warnings = read_json(out / "store.json")["warnings"]
    for volume, text in warnings[:SHOWN]:
        print(f"warning: {volume}: {text}", file=sys.stderr)
    if len(warnings) > SHOWN:
        print(f"warning: {len(warnings)} such: see {out / 'store.json'}", file=sys.stderr)


# --- Reading a store and its selections.


def read_store(out, settings=None):
    """The Store in out; one line if it is damaged, or was made otherwise (settings: if given)."""
    made = read_json(out / "store.json")
    refuse_other(out, made, settings or made.get("settings", {}), REMEDY)
    try:
        slices = np.load(out / "slices.npy", mmap_mode="r")
        lines = list(read_lines(out / "slices.csv"))
    except (OSError, ValueError, EOFError) as error:
        fail(f"{out}: damaged ({error}): {REMEDY}")
    if len(lines) != len(slices):
        fail(f"{out}: damaged: slices.npy and slices.csv differ in length: {REMEDY}")
    hashes = np.array([int(line["dhash"], 16) for line in lines], np.uint64)
    sizes = Counter(line["volume"] for line in lines)
    volumes = np.split(np.arange(len(lines)), np.cumsum([*sizes.values()])[:-1])
    return Store(out / "slices.npy", slices, hashes, [*sizes], volumes)


def store_digest(out):
    """8 hex digits that tell stores apart: the slices and their hashes, size, window and code."""
    made = read_json(out / "store.json")
    identity = [made["settings"]["size"], made["settings"]["window"], made["code"]]
    slices = (out / "slices.csv").read_bytes()
    return hashlib.sha256(json.dumps(identity).encode() + slices).hexdigest()[:8]


def read_lines(path):
    """The lines of a CSV file as dicts of text."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        yield from csv.DictReader(file)


def read_selection(path):
    """NAME.csv -> Selection, with the store beside it; one line if it is none, or of another."""
    path = Path(path)
    if not path.is_file() or not (path.parent / "store.json").is_file():
        fail(f"{path}: no such selection, or no store beside it: {AGAIN}")
    store = read_store(path.parent)
    this_store = store_digest(path.parent)
    made = read_json(path.with_suffix(".json"))
    refuse_other(path, made, made.get("settings", {}) | {"store": this_store}, AGAIN)
    try:
        lines = [(int(line["kept"]), int(line["representative"])) for line in read_lines(path)]
    except (KeyError, TypeError, ValueError):
        fail(f"{path}: not a selection, which has the columns kept and representative: {AGAIN}")
    kept = np.flatnonzero([stays for stays, _ in lines])
    representative = np.array([stands_for_it for _, stands_for_it in lines])
    itself = np.flatnonzero(representative == np.arange(len(lines)))
    if len(lines) != len(store.slices) or not np.array_equal(kept, itself):
        fail(f"{path}: damaged: not a line for each slice of the store: {AGAIN}")
    digest = hashlib.sha256(path.read_bytes() + this_store.encode()).hexdigest()[:16]
    return Selection(store, kept, representative, digest)
