"""Damages CT slices at random: reduce.py must use or list every one, without a crash or a wait.

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

A_RUN = 500  # mutants for one run of reduce.py
SLOW = 5  # seconds that no file may take
NASTY = (b"", b"\0", b"nan", b"-1e999", b"1\\2", b"\\", b"\xff\xfe", b"9" * 64, b"MR", b'\n\r,"')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, metavar="DICOM_DIR")
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    files = sorted(file for file in args.source.rglob("*") if is_slice(file))
    if not files:
        raise SystemExit(f"{args.source}: holds no DICOM slice")
    reasons = Counter()
    slowest = 0.0
    for first in range(0, args.mutants, A_RUN):
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work, "mutants")
            folder.mkdir()
            for number in range(first, min(first + A_RUN, args.mutants)):
                write_mutant(files, folder, number, args.seed)
            slowest = max(slowest, *(seconds_to_read(file) for file in folder.iterdir()))
            for reason in reduced(folder, Path(work, "out")):
                reasons[re.sub(r"\d+", "N", reason)[:70]] += 1
        print(f"{reasons.total()} mutants: {reasons['used']} used, slowest file {slowest:.2f} s")
    for reason, count in reasons.most_common(25):
        print(f"{count:6} {reason}")


def is_slice(file):
    return file.is_file() and isinstance(dicom.read_header(file), dicom.Header)


def write_mutant(files, folder, number, seed):
    """Write a damaged slice in one of five encodings; the same seed and number, the same bytes."""
    rng = np.random.default_rng([seed, number])
    dataset = pydicom.dcmread(files[rng.integers(len(files))])
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.{number + 1}"
    dataset.ImagePositionPatient = [0, 0, number * 0.5]
    encoding = ("PNG", "JPEG", "RLE", "JPEG2000", "native", "native", "native")[number % 7]
    suffix = f".{encoding.lower()}" if encoding in ("PNG", "JPEG") else ".dcm"
    data = damage(encode(dataset, encoding), rng)
    (folder / f"{number:06}{suffix}").write_bytes(data)


def encode(dataset, encoding):
    """The bytes of a slice as a PNG, a JPEG, or a DICOM file with such pixels."""
    stream = io.BytesIO()
    if encoding in ("PNG", "JPEG"):
        Image.fromarray(ct.scale_to_uint8(dataset.pixel_array)).save(stream, encoding)
        return stream.getvalue()
    if encoding == "RLE":
        dataset.compress(RLELossless, generate_instance_uid=False)
    if encoding == "JPEG2000":
        image = Image.fromarray(dataset.pixel_array.astype(np.uint16))
        pixels = io.BytesIO()
        image.save(pixels, "JPEG2000", no_jp2=True, irreversible=False)
        dataset.PixelData = encapsulate([pixels.getvalue()])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def damage(data, rng):
    """1 to 4 faults, mostly in the header: bytes changed, cut out, doubled, put in, or cut off."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        reach = min(len(data), 3000) if rng.random() < 0.85 else len(data)
        start = int(rng.integers(reach + 1))
        length = int(rng.integers(1, 9))
        fault = rng.choice(["change", "change", "flip", "cut", "double", "nasty", "end"])
        if fault == "change":
            data[start : start + length] = rng.bytes(length)
        elif fault == "flip" and start < len(data):
            data[start] ^= 1 << int(rng.integers(8))
        elif fault == "cut":
            del data[start : start + length]
        elif fault == "double":
            data[start:start] = data[start : start + 10 * length]
        elif fault == "nasty":
            data[start : start + length] = NASTY[rng.integers(len(NASTY))]
        elif fault == "end":
            del data[start if rng.random() < 0.3 else len(data) - length * 50 :]
    return bytes(data)


def seconds_to_read(file):
    """Seconds to read the file, in this process; stops where they are too many."""
    started = time.perf_counter()
    try:
        ct.read_slice(file)
    except ct.Unusable:
        pass
    seconds = time.perf_counter() - started
    if seconds > SLOW:
        raise SystemExit(f"{file.name}: {seconds:.0f} s")
    return seconds


def reduced(folder, out):
    """Why reduce.py skipped each file of the folder, or "used"; stops if one is not listed."""
    command = [sys.executable, "reduce.py", folder, out, "--strategy", "hash", "--size", "32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"reduce.py failed on {folder}:\n{done.stderr[-2000:]}")
    listed = []
    reasons = []
    for name in ("slices", "skipped"):
        with open(out / f"{name}.csv", newline="") as file:
            for line in csv.DictReader(file):
                listed.append(line["file"])
                reasons.append(line.get("reason", "used"))
    if sorted(listed) != sorted(file.name for file in folder.iterdir()):
        raise SystemExit(f"{folder}: files and lists differ")
    return reasons


if __name__ == "__main__":
    main()
