"""The slice store: every readable slice of DATA, decoded once, and the selections beside it.

OUT/slices.npy (uint8 [N, size, size], volume after volume in z order), OUT/slices.csv,
OUT/skipped.csv and, written last, OUT/store.json, which says what the store was made from:
without it a store does not count as finished.

    python -m common.store OUT      # read all of a store: is it still as reduce.py wrote it?
"""

import argparse
import csv
import hashlib
import json
import os
import re
import sys
import zlib
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import ct
from common.dicom import read_header
from common.files import atomic_write, check_code, code_digest, csv_line, fail, run_script
from common.hashing import check_dhash, slice_hash
from common.volumes import find_volumes, list_files
from common.workers import in_order, worker_pool

CODE = (  # what decides a store
    "common/dicom.py",
    "common/ct.py",
    "common/volumes.py",
    "common/store.py",
    "common/hashing.py",
)
COLUMNS = ["row", "volume", "position", "file", "dhash"]
LARGE_FILES = ("slices.npy", "slices.csv")
NEEDS_DECODER = "pip install"  # in the reason of a file that a plug-in could decode
HEADERS_A_JOB = 64
SLICES_A_JOB = 32
SHOWN = 10  # kinds of skipped files, and warnings, on screen


class Store(NamedTuple):
    path: Path  # of slices.npy
    slices: np.ndarray  # uint8 [N, size, size], memory-mapped
    hashes: np.ndarray  # uint64 [N], slice_hash of the full-resolution slices
    names: list[str]  # of the volumes
    volumes: list[np.ndarray]  # the rows of each volume, in z order, one after the other
    skipped: int  # files left out, listed in skipped.csv

    @property
    def volume_index(self):
        """Which volume each row belongs to: int [N]."""
        return np.repeat(np.arange(len(self.volumes)), [len(rows) for rows in self.volumes])


class Selection(NamedTuple):
    store: Store
    kept: np.ndarray  # rows that stay, int [kept]
    representative: np.ndarray  # the kept row that stands for each row of the store, int [N]
    digest: str  # 16 hex digits: changes with the selection and with the store's table


def check_folders(data, out):
    """Stop with one line if DATA is no folder, or if DATA and OUT lie inside each other."""
    if not data.is_dir():
        fail(f"{data}: no such folder: DATA must be a folder that holds CT slices")
    if data.resolve() == out.resolve() or data.resolve() in out.resolve().parents:
        fail(
            f"{out} lies inside {data}: choose an OUT elsewhere, or its pictures would count as "
            "slices"
        )
    if out.resolve() in data.resolve().parents:
        fail(
            f"{data} lies inside {out}: choose an OUT of its own, so that deleting it deletes no "
            "data"
        )


def open_or_build_store(data, out, size, window, workers):
    """The Store in out, built from DATA unless out holds one already.

    size: pixels a side. window: (center, width) in HU, or None (see ct.scale_to_uint8).
    Stops with one line if the store is of other data, of other settings, or of other code.
    Prints what the store holds and what it left out.
    """
    files = list_files(data)
    made_from = {
        "files": len(files),
        "fingerprint": fingerprint(files),
        "size": size,
        "window": window,
    }
    reused = (out / "store.json").exists()
    if reused:
        check_made_from(out, made_from)
    else:
        build_store(data, out, [file for file, _, _ in files], made_from, workers)
    store = read_store(out)
    report(store)
    if reused:
        report_new_decoders(data, out)
    return store


def fingerprint(files):
    """Changes with the names, sizes and times of the files, as list_files gives them."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr(file).encode(errors="surrogateescape"))
    return digest.hexdigest()


def check_made_from(out, made_from):
    found = read_json(out / "store.json")
    changed = [key for key in made_from if found.get(key) != made_from[key]]
    if "fingerprint" in changed:
        changed = ["the files of DATA (names, sizes or times)"]
    if changed:
        fail(
            f"{out} was made from other input: {', '.join(changed)} changed; "
            "give another OUT, or delete this one"
        )


def build_store(data, out, files, made_from, workers):
    """Decode every slice below data in parallel, in order, into the files of a store.

    files: paths relative to data. made_from: the settings, and what store.json says of DATA.
    """
    for features in out.glob("features-*.npy"):  # of a store that was deleted
        features.unlink()
    with worker_pool(workers) as pool:

        def read_headers(read, paths):
            jobs = batches(paths, HEADERS_A_JOB)
            headers = chain.from_iterable(in_order(pool, partial(apply_to_each, read), jobs))
            return tqdm(headers, "headers", len(paths), unit="file", disable=not paths)

        volumes, skipped, warnings = find_volumes(data, files, read_headers)
        jobs = [
            (os.path.join(data, file), header)  # a Path would take long to send
            for volume in volumes
            for file, header in zip(volume.files, volume.headers)
        ]
        work = partial(decode, size=made_from["size"], window=made_from["window"])
        decoded = chain.from_iterable(in_order(pool, work, batches(jobs, SLICES_A_JOB)))
        decoded = tqdm(decoded, "slices", len(jobs), unit="slice", disable=not jobs)
        write_slices(data, out, volumes, decoded, made_from["size"], skipped)
    with atomic_write(out / "skipped.csv", text=True) as file:
        for row in [("file", "reason"), *sorted(skipped)]:
            csv_line(file, row)
    made = {
        "code": code_digest(*CODE),
        "crc32": {name: crc32(out / name) for name in LARGE_FILES},
        "bytes": {name: (out / name).stat().st_size for name in LARGE_FILES},
        "mtime_ns": {name: (out / name).stat().st_mtime_ns for name in LARGE_FILES},
        "warnings": warnings,
    }
    with atomic_write(out / "store.json", text=True) as file:
        json.dump(made_from | made, file, indent=1)


def batches(items, size):
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def apply_to_each(work, items):
    return [work(item) for item in items]


def decode(jobs, size, window):
    """A list of (path, Header or None) -> a list of (hash, pixels as bytes), or Unusable, of each.

    The hash is of the full resolution. Pixels are uint8 [size, size], resized with antialiasing,
    larger slices by a mean of whole pixels first (our choice).
    """
    results = []
    for n, (path, header) in enumerate(jobs):
        try:
            slice8 = ct.read_slice(path, window, header)
        except ct.Unusable as error:
            results.append(error)
            continue
        if n == 0:
            check_dhash(slice8)
        image = Image.fromarray(slice8)
        small = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=1.0)
        results.append((slice_hash(slice8), small.tobytes()))
    return results


def write_slices(data, out, volumes, decoded, size, skipped):
    """Write slices.npy and slices.csv from the results of decode; append to skipped."""
    row = 0
    with (
        atomic_write(out / "slices.npy") as array_file,
        atomic_write(out / "slices.csv", text=True) as csv_file,
    ):
        write_npy_header(array_file, 0, size)
        csv_line(csv_file, COLUMNS)
        for volume in volumes:
            # decoded comes last: zip takes nothing from it once the volume's files are at an end
            for file, position, result in zip(volume.files, volume.positions, decoded):
                if isinstance(result, ct.Unusable):
                    skipped.append((file, str(result)))
                    continue
                bits, pixels = result
                array_file.write(pixels)
                csv_line(csv_file, [row, volume.name, position, file, bits])
                row += 1
        if row == 0:
            fail(f"{data}: no CT slice found{most_skipped(skipped)}")
        array_file.seek(0)
        # as long as the first header: NumPy leaves room for the first axis to grow
        write_npy_header(array_file, row, size)


def most_skipped(skipped):
    if not skipped:
        return ""
    [(reason, _)] = Counter(reason for _, reason in skipped).most_common(1)
    return f"; {count(len(skipped), 'file')} skipped, most: {reason}"


def write_npy_header(file, n, size):
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, size, size)}
    np.lib.format.write_array_header_1_0(file, header)


def count(n, noun):
    return f"1 {noun}" if n == 1 else f"{n} {noun}s"


def report(store):
    """Print what a store holds, and a line for each kind of reason why files were left out.

    What is odd in its volumes goes to stderr.
    """
    out = store.path.parent
    left_out = f"{count(store.skipped, 'file')} skipped"
    if store.skipped:
        left_out += f", see {out / 'skipped.csv'}"
    held = f"{count(len(store.slices), 'slice')} of {count(len(store.names), 'volume')}"
    print(f"{held}; {left_out}")

    kinds = {}
    for line in read_lines(out / "skipped.csv"):
        kind = re.split(":| as ", line["reason"])[0]  # without the details of a file
        kinds.setdefault(kind, []).append(line["reason"])
    most_first = sorted(kinds.values(), key=len, reverse=True)
    most_first.sort(key=needs_decoder_first)
    for reasons in most_first[:SHOWN]:
        print(f"  {len(reasons)} skipped: {reasons[0]}")

    warnings = read_json(out / "store.json")["warnings"]
    for volume, text in warnings[:SHOWN]:
        print(f"warning: {volume}: {text}", file=sys.stderr)
    if len(warnings) > SHOWN:
        more = len(warnings) - SHOWN
        print(f"warning: {more} more of these: see {out / 'store.json'}", file=sys.stderr)


def needs_decoder_first(reasons):
    """Sort key of a list of reasons: those that the user can do something about come first."""
    return NEEDS_DECODER not in reasons[0]


def report_new_decoders(data, out):
    """Say how to take files in whose decoder has been installed since the store was built."""
    files = {}
    for line in read_lines(out / "skipped.csv"):
        if NEEDS_DECODER in line["reason"]:
            files.setdefault(line["reason"], []).append(line["file"])
    decodable = 0
    for reason, same_reason in files.items():
        if read_header(Path(data, same_reason[0])) != reason:
            decodable += len(same_reason)
    if decodable:
        print(
            f"{count(decodable, 'file')} skipped then can be decoded now: to take them in, "
            f"delete {out} or give another OUT"
        )


def read_store(out):
    """The Store in the folder out; stops with one line if it is damaged or of other code."""
    out = Path(out)
    description = read_json(out / "store.json")
    check_code(
        out, description.get("code"), code_digest(*CODE), "give another OUT, or delete this one"
    )
    check_undamaged(out, description)
    slices = np.load(out / "slices.npy", mmap_mode="r")
    hashes = np.empty(len(slices), np.uint64)
    names = []
    starts = []
    for row, line in enumerate(read_lines(out / "slices.csv")):
        hashes[row] = int(line["dhash"], 16)
        if line["volume"] not in names[-1:]:
            names.append(line["volume"])
            starts.append(row)
    volumes = np.split(np.arange(len(slices)), starts[1:])
    skipped = sum(1 for _ in read_lines(out / "skipped.csv"))
    return Store(out / "slices.npy", slices, hashes, names, volumes, skipped)


def read_json(path):
    """The object that reduce.py wrote into a .json file; stops with one line if it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        fail(
            f"{path}: damaged: it is not what reduce.py wrote; delete {path.parent} and run "
            "reduce.py again"
        )
    return found


def read_lines(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        yield from csv.DictReader(file)


def check_undamaged(out, description, thorough=False):
    """Stop with one line if slices.npy or slices.csv is not as reduce.py wrote it.

    description: what store.json holds. Sizes and modification times tell it at once. All of a
    file is read, for its CRC-32, only where its time differs, as after copying, or if thorough.
    An undamaged file gets its recorded time back, so that it is read only once.
    """
    for name in LARGE_FILES:
        path = out / name
        try:
            stat = path.stat()
        except OSError as error:
            fail(f"{path}: {error.strerror}: delete {out} and run reduce.py again")
        same_size = stat.st_size == description["bytes"][name]
        same_time = stat.st_mtime_ns == description["mtime_ns"][name]
        if same_size and same_time and not thorough:
            continue
        if not same_size or crc32(path) != description["crc32"][name]:
            fail(
                f"{path}: damaged: it is not what reduce.py wrote; delete {out} and run "
                "reduce.py again"
            )
        with suppress(OSError):  # somebody else's store: it is read again at the next start
            os.utime(path, ns=(stat.st_atime_ns, description["mtime_ns"][name]))


def crc32(path):
    found = 0
    with open(path, "rb") as file:
        while piece := file.read(2**24):
            found = zlib.crc32(piece, found)
    return found


def read_selection(path):
    """NAME.csv -> Selection, with the store that lies beside it.

    Stops with one line if it is no selection, or not one of that store.
    """
    path = Path(path)
    if not path.is_file():
        fail(f"{path}: no such selection: make one with reduce.py")
    if not (path.parent / "store.json").is_file():
        fail(
            f"{path}: no store beside it: leave a selection in the folder where reduce.py wrote it"
        )
    store = read_store(path.parent)
    try:
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
        row = np.array([int(line["row"]) for line in lines], int)
        kept = np.array([int(line["kept"]) for line in lines], int)
        representative = np.array([int(line["representative"]) for line in lines], int)
    except (KeyError, TypeError, ValueError, OverflowError):
        fail(
            f"{path}: not a selection: it needs the columns row, kept and representative, in "
            "whole numbers"
        )
    again = "make it again with reduce.py"
    if not np.array_equal(row, np.arange(len(store.slices))):
        last = len(store.slices) - 1
        fail(f"{path}: must list the rows 0 to {last} of slices.npy in order; {again}")
    if not np.array_equal(kept, representative == row):
        fail(f"{path}: kept must be 1 where a row represents itself and 0 elsewhere; {again}")
    if not np.isin(representative, np.flatnonzero(kept)).all():
        fail(f"{path}: a representative must be a kept row; {again}")
    summary = read_json(path.with_suffix(".json"))
    if summary.get("store") != read_json(path.parent / "store.json")["crc32"]["slices.csv"]:
        fail(f"{path}: was made for another store than the one in {path.parent}; {again}")
    table = path.read_bytes() + (path.parent / "slices.csv").read_bytes()
    digest = hashlib.sha256(table).hexdigest()[:16]
    return Selection(store, np.flatnonzero(kept), representative, digest)


def main():
    parser = argparse.ArgumentParser(
        description="Read all of a slice store and say whether it is as reduce.py wrote it."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the store")
    out = parser.parse_args().out
    if not (out / "store.json").is_file():
        fail(f"{out}: no slice store: make one with reduce.py")
    check_undamaged(out, read_json(out / "store.json"), thorough=True)
    print(f"{out}: undamaged: {' and '.join(LARGE_FILES)} have the recorded CRC-32")


if __name__ == "__main__":
    run_script(main)
