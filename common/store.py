"""The slice store: what it holds, whether it is whole and fits, and the selections that lie beside it.

OUT/slices.npy (uint8 [N, size, size], volume after volume in z order), OUT/slices.csv, OUT/skipped.csv and, written
last, OUT/store.json, which says what the store was made from: without it a store does not count as finished.
"""

import csv
import hashlib
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.build import build_store
from common.files import atomic_write, fail
from common.volumes import list_files


class Store(NamedTuple):
    path: Path  # of slices.npy
    slices: np.ndarray  # uint8 [N, size, size], memory-mapped
    hashes: np.ndarray  # uint64 [N], dHash of the full-resolution slices
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
    if not data.is_dir():
        fail(f"{data}: no such folder: DATA must be a folder that holds CT slices")
    if data.resolve() == out.resolve() or data.resolve() in out.resolve().parents:
        fail(
            f"{out} lies inside {data}: choose an OUT elsewhere, or its pictures would count as slices"
        )
    if out.resolve() in data.resolve().parents:
        fail(
            f"{data} lies inside {out}: choose an OUT of its own, so that deleting it deletes no data"
        )


def open_or_build_store(data, out, size, window, workers):
    """The Store in out; decodes data only if out holds none yet, refuses a store of other data or settings."""
    files = list_files(data)
    made_from = {
        "files": len(files),
        "fingerprint": fingerprint(files),
        "size": size,
        "window": window,
    }
    if (out / "store.json").exists():
        found = read_json(out / "store.json")
        changed = [key for key in made_from if found.get(key) != made_from[key]]
        if changed:
            what = (
                "the files of DATA (names, sizes or times)"
                if "fingerprint" in changed
                else ", ".join(changed)
            )
            fail(
                f"{out} was made from other input: {what} changed; give another OUT, or delete this one"
            )
    else:
        for old in out.glob("features-*.npy"):  # of a store that was deleted
            old.unlink()
        warnings = build_store(data, out, [file for file, _, _ in files], size, window, workers)
        with atomic_write(out / "store.json", text=True) as file:
            json.dump(made_from | {"crc32": checksums(out), "warnings": warnings}, file, indent=1)
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
        expected, found = read_json(out / "store.json")["crc32"], checksums(out)
    except (OSError, KeyError):
        fail(f"{out}: holds no whole slice store: delete it and run reduce.py again")
    damaged = [name for name in expected if found.get(name) != expected[name]]
    if damaged:
        fail(
            f"{out / damaged[0]}: damaged: it is not what reduce.py wrote; delete {out} and run reduce.py again"
        )


def fingerprint(files):
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr(file).encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_store(out):
    """The Store in the folder out."""
    check_store(out)
    slices = read_slices(out)
    hashes, names, starts = np.empty(len(slices), np.uint64), [], []
    n = -1
    for n, line in enumerate(read_lines(out / "slices.csv")):
        if n < len(slices):
            hashes[n] = int(line["dhash"], 16)
            if not names or line["volume"] != names[-1]:
                names.append(line["volume"])
                starts.append(n)
    if n + 1 != len(slices):
        fail(
            f"{out}: slices.npy holds {len(slices)} slices, slices.csv {n + 1}; delete {out} to build it again"
        )
    skipped = sum(1 for _ in read_lines(out / "skipped.csv"))
    return Store(
        out / "slices.npy", slices, hashes, names, np.split(np.arange(n + 1), starts[1:]), skipped
    )


def read_json(path):
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        fail(
            f"{path}: damaged: it is not what reduce.py wrote; delete {path.parent} and run reduce.py again"
        )
    return found


def read_slices(out):
    """slices.npy, uint8 [N, size, size], memory-mapped."""
    try:
        slices = np.load(out / "slices.npy", mmap_mode="r")
        if slices.dtype == np.uint8 and slices.ndim == 3:
            return slices
    except (OSError, ValueError, EOFError):
        pass
    fail(f"{out / 'slices.npy'}: not an array of slices, uint8 [N, size, size]")


def read_lines(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        yield from csv.DictReader(file)


def read_selection(path):
    """NAME.csv -> Selection, with the store that lies beside it."""
    path = Path(path)
    if not path.is_file():
        fail(f"{path}: no such selection: make one with reduce.py")
    if not (path.parent / "store.json").is_file():
        fail(
            f"{path}: no store beside it: a selection belongs in the folder where reduce.py wrote it"
        )
    store = read_store(path.parent)
    columns = ("row", "kept", "representative")
    try:
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
        row, kept, representative = (
            np.array([int(line[column]) for line in lines], int) for column in columns
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        fail(
            f"{path}: not a selection: it needs the columns row, kept and representative, in whole numbers"
        )
    again = "make it again with reduce.py"
    if not np.array_equal(row, np.arange(len(store.slices))):
        fail(
            f"{path}: must list the rows 0 to {len(store.slices) - 1} of slices.npy in order; {again}"
        )
    if not np.array_equal(kept, representative == row):
        fail(f"{path}: kept must be 1 where a row represents itself and 0 elsewhere; {again}")
    if not np.isin(representative, np.flatnonzero(kept)).all():
        fail(f"{path}: a representative must be a kept row; {again}")
    summary = read_json(path.with_suffix(".json"))
    if summary.get("store") != read_json(path.parent / "store.json")["crc32"]["slices.csv"]:
        fail(f"{path}: was made for another store than the one in {path.parent}; {again}")
    files = [path, path.parent / "slices.csv"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return Selection(store, np.flatnonzero(kept), representative, digest)
