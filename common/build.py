"""Building a slice store: headers and pixels of every file read once, in parallel, in order."""

import re
import sys
from collections import Counter
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import ct
from common.files import atomic_write, csv_line, fail
from common.hashing import check_dhash, slice_hash
from common.volumes import find_volumes
from common.workers import in_order, worker_pool

BATCH = 16  # slices decoded at a time
SHOWN = 10  # kinds of skipped files, and warnings, on screen
COLUMNS = ["row", "volume", "position", "file", "dhash"]


def build_store(data, out, files, size, window, workers):
    """Decode every slice below data in parallel, in order, into slices.npy, slices.csv and skipped.csv."""
    with worker_pool(workers) as pool:

        def read_headers(read, paths):
            headers = chain.from_iterable(
                in_order(pool, partial(on_each, read), batches(paths, 64))
            )
            return tqdm(headers, "headers", len(paths), unit="file", disable=not paths)

        volumes, skipped, warnings = find_volumes(data, files, read_headers)
        places = [
            (v.name, position, file)
            for v in volumes
            for file, position in zip(v.files, v.positions)
        ]
        jobs = (
            (Path(data, file), header) for v in volumes for file, header in zip(v.files, v.headers)
        )
        decoded = in_order(pool, partial(decode, size=size, window=window), batches(jobs, BATCH))
        with tqdm(desc="slices", total=len(places), unit="slice", disable=not places) as progress:
            n, n_volumes = write_slices(data, out, places, decoded, progress, size, skipped)
    with atomic_write(out / "skipped.csv", text=True) as file:
        for row in [("file", "reason"), *sorted(skipped)]:
            csv_line(file, row)
    report(out, n, n_volumes, skipped, warnings)
    return warnings


def report(out, n, n_volumes, skipped, warnings):
    """What was found, on screen: a line a kind of reason for which files were skipped, and what is odd in the volumes."""
    left_out = f"{len(skipped)} file{'s' * (len(skipped) != 1)} skipped" + (
        f", see {out / 'skipped.csv'}" if skipped else ""
    )
    print(f"{n} slices of {n_volumes} volumes; {left_out}")
    kinds = {}
    for _, why in skipped:
        kinds.setdefault(re.split(":| as ", why)[0], []).append(why)
    for reasons in sorted(
        kinds.values(), key=lambda found: ("pip install" in found[0], len(found)), reverse=True
    )[:SHOWN]:
        print(f"  {len(reasons)} skipped: {reasons[0]}")
    for volume, text in warnings[:SHOWN]:
        print(f"warning: {volume}: {text}", file=sys.stderr)
    if len(warnings) > SHOWN:
        print(
            f"warning: {len(warnings) - SHOWN} more of these: see {out / 'store.json'}",
            file=sys.stderr,
        )


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
        if not pixels:
            check_dhash(slice8)
        image, bits = Image.fromarray(slice8), slice_hash(slice8)
        pixels.append(
            image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=1.0).tobytes()
        )
        found.append(bits)
    return b"".join(pixels), found


def write_slices(data, out, places, decoded, progress, size, skipped):
    """Write slices.npy and slices.csv in one pass; append to skipped. Returns the numbers of slices and volumes."""
    n, volumes, places = 0, set(), iter(places)
    with (
        atomic_write(out / "slices.npy") as array_file,
        atomic_write(out / "slices.csv", text=True) as csv_file,
    ):
        write_npy_header(array_file, 0, size)
        csv_line(csv_file, COLUMNS)
        for pixels, found in decoded:
            array_file.write(pixels)
            for result, (volume, position, file) in zip(found, places):
                if isinstance(result, ct.Unusable):
                    skipped.append((file, str(result)))
                    continue
                csv_line(csv_file, [n, volume, position, file, result])
                volumes.add(volume)
                n += 1
            progress.update(len(found))
        if n == 0:
            most = Counter(why for _, why in skipped).most_common(1)
            fail(
                f"{data}: no CT slice found"
                + (f"; {len(skipped)} files skipped, most: {most[0][0]}" if most else "")
            )
        array_file.seek(0)
        write_npy_header(
            array_file, n, size
        )  # same length: NumPy leaves room for the first axis to grow
    return n, len(volumes)


def write_npy_header(file, n, size):
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, size, size)}
    np.lib.format.write_array_header_1_0(file, header)
