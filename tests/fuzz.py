"""Damages real CT slices at random and looks whether reduce.py lists every one, without a crash or a wait.

python tests/fuzz.py DICOM_DIR --mutants 10000
"""

import argparse
import csv
import io
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, RLELossless

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common import ct, dicom  # noqa: E402

NASTY = [
    b"",
    b"\0",
    b"nan",
    b"-1e999",
    b"1\\2",
    b"\\",
    b"\xff\xfe",
    b"9" * 64,
    b"-01.024000E+03",
    b"MONOCHROME1",
    b"MR",
    b'\n\r,"',
]


def forms(dataset, number):
    """The slice as (suffix, bytes), with an instance and a position of its own, in one of four encodings."""
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.{number + 1}"
    dataset.ImagePositionPatient = [0, 0, number * 0.5]
    stream, kind = io.BytesIO(), number % 8
    if kind == 5:
        Image.fromarray(ct.scale_to_uint8(dataset.pixel_array)).save(
            stream, "PNG" if number % 16 == 5 else "JPEG"
        )
        return ".png" if number % 16 == 5 else ".jpg", stream.getvalue()
    if kind == 6:
        dataset = pydicom.dcmread(dataset.filename)
        dataset.compress(RLELossless)
    if kind == 7:
        dataset = pydicom.dcmread(dataset.filename)
        Image.fromarray(dataset.pixel_array.astype(np.uint16)).save(
            stream, "JPEG2000", no_jp2=True, irreversible=False
        )
        dataset.PixelData, dataset.file_meta.TransferSyntaxUID = (
            encapsulate([stream.getvalue()]),
            JPEG2000Lossless,
        )
        dataset["PixelData"].VR, stream = "OB", io.BytesIO()
    dataset.SOPInstanceUID = f"1.2.{number + 1}"
    dataset.save_as(stream, enforce_file_format=True)
    return ".dcm", stream.getvalue()


def damage(data, rng):
    """1 to 4 faults: bytes changed, cut out, doubled or put in, mostly in the header, or the end lost."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place = (
            int(rng.integers(min(len(data), 3000) if rng.random() < 0.85 else len(data)))
            if data
            else 0
        )
        length = int(rng.integers(1, 9))
        match rng.integers(7):
            case 0 | 1:
                data[place : place + length] = rng.bytes(length)
            case 2:
                data[place : place + 1] = (
                    bytes([data[place] ^ (1 << int(rng.integers(8)))]) if data else b""
                )
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + 10 * length]
            case 5:
                data[place : place + length] = NASTY[rng.integers(len(NASTY))]
            case 6:
                del data[place if rng.random() < 0.3 else len(data) - length * 50 :]
    return bytes(data)


def mutants(source, folder, first, count, seed):
    """Write `count` damaged slices into folder; the same seed and numbers give the same bytes."""
    files = sorted(
        file
        for file in Path(source).rglob("*")
        if file.is_file() and isinstance(dicom.read_header(file), dicom.Header)
    )
    for number in range(first, first + count):
        rng = np.random.default_rng([seed, number])
        suffix, data = forms(pydicom.dcmread(files[rng.integers(len(files))]), number)
        (folder / f"{number:06}{suffix}").write_bytes(damage(data, rng))


def slowest(folder):
    """Seconds of the slowest file, read in this process; stops at one that takes over 5 s."""
    worst = 0.0
    for file in folder.iterdir():
        started = time.perf_counter()
        try:
            ct.read_slice(file)
        except ct.Unusable:
            pass
        worst = max(worst, time.perf_counter() - started)
        if worst > 5:
            raise SystemExit(f"{file.name}: {worst:.0f} s")
    return worst


def reduced(folder, out):
    """Run reduce.py on folder: [(file, reason, or "" for a slice)]; raises unless it ends well and lists every file once."""
    done = subprocess.run(
        [sys.executable, "reduce.py", folder, out, "--strategy", "hash", "--size", "32"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"reduce.py failed on {folder}:\n{done.stderr[-2000:]}")
    found = []
    for name in ("slices", "skipped"):
        with open(
            out / f"{name}.csv", newline="", encoding="utf-8", errors="surrogateescape"
        ) as file:
            found += [(line["file"], line.get("reason", "")) for line in csv.DictReader(file)]
    if sorted(file for file, _ in found) != sorted(file.name for file in folder.iterdir()):
        raise SystemExit(f"{folder}: files and lists differ")
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="DICOM_DIR")
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kinds, worst = Counter(), 0.0
    for first in range(0, args.mutants, 500):
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work, "mutants")
            folder.mkdir()
            mutants(args.source, folder, first, min(500, args.mutants - first), args.seed)
            worst = max(worst, slowest(folder))
            kinds.update(
                re.sub(r"\d+", "N", reason)[:70] or "used"
                for _, reason in reduced(folder, Path(work, "out"))
            )
        print(
            f"{kinds.total()} mutants: {kinds['used']} used, slowest file {worst:.2f} s", flush=True
        )
    for reason, count in kinds.most_common(25):
        print(f"{count:6} {reason}")


if __name__ == "__main__":
    main()
