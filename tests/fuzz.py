"""Damages CT slices at random: reduce.py must use or list every one, without a crash or a wait.

python tests/fuzz.py DICOM_DIR --mutants 10000
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from warnings import simplefilter

import numpy as np
import pydicom
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, RLELossless

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common import ct  # noqa: E402
from common.store import read_lines  # noqa: E402

SLOW = 5  # seconds that no file may take
NASTY = (b"", b"\0", b"nan", b"-1e999", b"1\\2", b"\\", b"\xff\xfe", b"9" * 64, b"MR", b'\n\r,"')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, metavar="DICOM_DIR")
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    simplefilter("ignore")  # pydicom's, of what is damaged
    files = sorted(args.source.rglob("*.dcm"))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "mutants")
        folder.mkdir()
        for number in range(args.mutants):
            write_mutant(files, folder, number, args.seed)
        slowest = max(map(seconds_to_read, folder.iterdir()))
        used = number_used(folder, Path(work, "out"))
    print(f"{args.mutants} mutants: {used} used, slowest file {slowest:.2f} s")


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
    stream, pixels = io.BytesIO(), io.BytesIO()
    if encoding in ("PNG", "JPEG"):
        Image.fromarray(ct.scale_to_uint8(dataset.pixel_array)).save(stream, encoding)
        return stream.getvalue()
    if encoding == "RLE":
        dataset.compress(RLELossless, generate_instance_uid=False)
    if encoding == "JPEG2000":
        image = Image.fromarray(dataset.pixel_array.astype(np.uint16))
        image.save(pixels, "JPEG2000", no_jp2=True, irreversible=False)
        dataset.PixelData = encapsulate([pixels.getvalue()])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def damage(data, rng):
    """1 to 4 faults, mostly in the header: bytes changed, cut out or doubled; or an early end."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        reach = min(len(data), 3000) if rng.random() < 0.85 else len(data)
        start = int(rng.integers(reach + 1))
        span = slice(start, start + int(rng.integers(1, 80)))
        faults = [rng.bytes(4), b"", bytes(2 * data[span]), NASTY[rng.integers(len(NASTY))]]
        data[span] = faults[rng.integers(4)]
    if rng.random() < 0.2:
        del data[rng.integers(len(data)) :]
    return bytes(data)


def seconds_to_read(file):
    """Seconds to read the file, in this process; stops where they are too many."""
    started = time.perf_counter()
    with suppress(ct.Unusable):
        ct.read_slice(file)
    seconds = time.perf_counter() - started
    if seconds > SLOW:
        raise SystemExit(f"{file.name}: {seconds:.0f} s")
    return seconds


def number_used(folder, out):
    """How many files reduce.py used; stops if it fails or if a file is not listed."""
    command = [sys.executable, "reduce.py", folder, out, "--strategy", "hash", "--size", "32"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    used = [line["file"] for line in read_lines(out / "slices.csv")]
    skipped = [line["file"] for line in read_lines(out / "skipped.csv")]
    if sorted(used + skipped) != sorted(file.name for file in folder.iterdir()):
        raise SystemExit(f"{folder}: files and lists differ")
    return len(used)


if __name__ == "__main__":
    main()
