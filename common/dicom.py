"""One DICOM CT slice: what its header says, what is wrong with it, and its stored values.

Knows nothing of volumes, HU images or strategies.
"""

import os
import stat
from contextlib import contextmanager
from math import isfinite
from typing import NamedTuple
from warnings import catch_warnings, simplefilter

import numpy as np
import pydicom
from PIL import Image
from pydicom.pixels import get_decoder
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, MediaStorageDirectoryStorage

PIXEL_DATA = b"\xe0\x7f\x10\x00"  # the tag (7FE0,0010), little endian
MAX_PIXELS = (
    8192 * 8192
)  # of a slice: no CT has more, and a few damaged bytes can ask for all of the memory
SCOUTS = ("LOCALIZER", "SCOUT", "TOPOGRAM")  # in ImageType


class Unusable(ValueError):
    """A file that cannot become a slice; its message is the reason that skipped.csv lists."""


class Native(NamedTuple):
    """Where uncompressed pixels lie in a file, 16 bits each, little endian."""

    offset: int  # bytes
    rows: int
    columns: int
    bits: int  # BitsStored
    signed: bool


class Header(NamedTuple):
    """All that reading a DICOM slice needs, so that no file is parsed twice."""

    series: str
    instance: str  # SOPInstanceUID
    axes: tuple[float, ...] | None  # ImageOrientationPatient, six numbers
    position: float | None  # mm along the slice normal
    number: float | None  # InstanceNumber
    rows: int
    columns: int
    slope: float
    intercept: float  # HU
    padding: tuple[int, int] | None  # stored values, both included
    native: Native | None  # None: for pydicom to decode


def read_header(path):
    """The Header of a DICOM CT slice, or the reason (str) why the file is not one."""
    try:
        check_is_file(path)
        with open(path, "rb") as file:
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
            check_is_slice(dataset)
            native = native_pixels(
                dataset, file
            )  # first: padding_range converts an element that it reads raw
            if not native:
                check_decodes(dataset)
            axes = orientation(dataset)
            return Header(
                text(dataset, "SeriesInstanceUID"),
                text(dataset, "SOPInstanceUID") or str(path),
                axes,
                position_along_normal(dataset, axes),
                numbers(dataset, "InstanceNumber", 1)[0],
                integer(dataset, "Rows"),
                integer(dataset, "Columns"),
                float(text(dataset, "RescaleSlope")),
                float(text(dataset, "RescaleIntercept")),
                padding_range(dataset),
                native,
            )
    except pydicom.errors.InvalidDicomError:
        return what_else(path)
    except (
        Exception
    ) as error:  # whatever a broken file raises; its own words could quote a patient's data
        return (
            words(error)
            or f"a DICOM header that cannot be read ({type(error).__name__}): damaged or cut short"
        )


def check_is_file(path):
    """Raise Unusable for a pipe or a device, OSError for what cannot be opened; reading a pipe would wait for ever."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        os.listdir(path)
    if not stat.S_ISREG(mode):
        raise Unusable("not a regular file, but a folder, pipe, socket or device")


def what_else(path):
    """What a file is that pydicom does not take for DICOM, in words."""
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        return "an empty file"
    if start == b"\x89PNG" or start[:3] == b"\xff\xd8\xff":
        return "a PNG or JPEG by its content, but not by its name: rename it"
    return "not a DICOM file (the mark DICM is missing), and not named .png, .jpg or .jpeg"


def text(dataset, keyword):
    """An element as it stands in the file, "1\\2\\3" where it has several values, "" where it is missing or empty.

    pydicom's own conversion of the dozen elements needed here takes as long as reading the file.
    """
    element = dataset.get_item(keyword)
    if element is None or element.value is None:
        return ""
    return element.value.decode("latin-1").strip(" \0")


def integer(dataset, keyword):
    """An element of type US, None where it is missing."""
    element = dataset.get_item(keyword)
    if element is None or not element.value:
        return None
    return int.from_bytes(element.value, "little" if element.is_little_endian else "big")


def numbers(dataset, keyword, n):
    """An element as n finite floats; n times None where it is missing or anything else."""
    try:
        found = [float(value) for value in text(dataset, keyword).split("\\")]
    except ValueError:
        found = []
    return found if len(found) == n and all(map(isfinite, found)) else [None] * n


def check_is_slice(dataset):
    """Raise Unusable unless the DICOM header is that of one CT slice with a rescale to HU."""
    if dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        raise Unusable("a DICOMDIR, not an image")
    modality = text(dataset, "Modality")
    if modality != "CT":
        raise Unusable(f"Modality is {modality[:16] or 'missing'}, not CT")
    if not text(dataset, "SeriesInstanceUID"):
        raise Unusable("SeriesInstanceUID is missing")
    if any(word in text(dataset, "ImageType").upper() for word in SCOUTS):
        raise Unusable("a localizer, not a slice")
    if text(dataset, "NumberOfFrames") and numbers(dataset, "NumberOfFrames", 1) != [1]:
        raise Unusable("a multi-frame image, not a slice: split it into single-frame files")
    photometric = text(dataset, "PhotometricInterpretation")
    if photometric not in ("MONOCHROME2", ""):
        raise Unusable(f"PhotometricInterpretation is {photometric[:16]}, not MONOCHROME2")
    slope, intercept = text(dataset, "RescaleSlope"), text(dataset, "RescaleIntercept")
    for name, value in (("RescaleSlope", slope), ("RescaleIntercept", intercept)):
        if not value:
            raise Unusable(f"{name} is missing, so the values cannot be brought to HU")
    try:
        fine = np.isfinite(float(intercept)) and 0 < float(slope) < np.inf
    except ValueError:
        fine = False
    if not fine:
        raise Unusable(f"rescale {slope[:16]} x + {intercept[:16]} does not give HU")
    if integer(dataset, "PixelRepresentation") not in (0, 1):
        raise Unusable("PixelRepresentation is missing, so the sign of the values is unknown")
    rows, columns = (integer(dataset, keyword) or 0 for keyword in ("Rows", "Columns"))
    if not 0 < rows * columns <= MAX_PIXELS:
        raise Unusable(f"{rows} x {columns} pixels: a slice has at least 1 and at most 8192 x 8192")


def check_decodes(dataset):
    """Raise Unusable, with the plug-in to install, if nothing here decodes the pixels' transfer syntax."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if not syntax:
        raise Unusable("TransferSyntaxUID is missing, so the pixels cannot be decoded")
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:  # so pydicom answers for a syntax that it has no decoders of
        raise Unusable(f"transfer syntax {syntax.name[:64]} is not one of images") from None
    if not available:
        plug_in = "pylibjpeg-openjpeg" if "2000" in syntax.name else "pylibjpeg-libjpeg"
        raise Unusable(f"{syntax.name} needs a decoder: pip install pylibjpeg {plug_in}")


def orientation(dataset):
    """ImageOrientationPatient, six numbers; None where it is missing or its axes are not two right-angled unit vectors."""
    axes = numbers(dataset, "ImageOrientationPatient", 6)
    if None in axes:
        return None
    lengths = [sum(value * value for value in axis) for axis in (axes[:3], axes[3:])]
    product = sum(a * b for a, b in zip(axes[:3], axes[3:]))
    return (
        tuple(axes) if max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(product)) < 0.05 else None
    )


def position_along_normal(dataset, axes):
    """mm: ImagePositionPatient projected on the normal of the orientation; None where either is missing."""
    corner = numbers(dataset, "ImagePositionPatient", 3)
    if axes is None or None in corner:
        return None
    x1, y1, z1, x2, y2, z2 = axes
    normal = y1 * z2 - z1 * y2, z1 * x2 - x1 * z2, x1 * y2 - y1 * x2
    return sum(n * c for n, c in zip(normal, corner))


def padding_range(dataset):
    """PixelPaddingValue, or its range, as stored values (lowest, highest); None where the tag is missing."""
    if dataset.get("PixelPaddingValue") is None:
        return None
    limits = [
        dataset.PixelPaddingValue,
        dataset.get("PixelPaddingRangeLimit") or dataset.PixelPaddingValue,
    ]
    if dataset.PixelRepresentation == 1:  # some scanners write -2000 as the unsigned 63536
        limits = [limit - 65536 if limit > 32767 else limit for limit in limits]
    return min(limits), max(limits)


def native_pixels(dataset, file):
    """Native of a header read from the open file up to the pixel data; None where pydicom must decode (or complain)."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax not in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        return None
    keywords = ["Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation"]
    rows, columns, allocated, bits, signed = found = [
        integer(dataset, keyword) for keyword in keywords
    ]
    if (
        None in found
        or allocated != 16
        or not 0 < bits <= 16
        or integer(dataset, "SamplesPerPixel") != 1
    ):
        return None
    head = file.read(8 if syntax == ImplicitVRLittleEndian else 12)
    if head[:4] != PIXEL_DATA or int.from_bytes(head[-4:], "little") != rows * columns * 2:
        return None
    there = (os.fstat(file.fileno()).st_size - file.tell()) // 2
    if there < rows * columns:
        raise Unusable(f"pixel data is cut short: {there} of {rows * columns} values")
    return Native(file.tell(), rows, columns, bits, signed == 1)


def read_stored(path, native):
    """Stored values of a DICOM slice, integers [height, width], as pydicom's pixel_array gives them."""
    if native:
        count = native.rows * native.columns
        stored = np.fromfile(path, "<i2" if native.signed else "<u2", count, offset=native.offset)
        unused = 16 - native.bits  # bits above BitsStored may hold anything, an overlay for one
        stored = stored.reshape(native.rows, native.columns)
        return stored << unused >> unused if unused else stored
    dataset = pydicom.dcmread(path)
    if "PixelData" not in dataset:
        raise Unusable("has no pixel data")
    with no_larger_than(dataset.Rows * dataset.Columns):
        stored = dataset.pixel_array
    if stored.ndim != 2:
        raise Unusable(f"pixel data has {stored.ndim} dimensions, not 2")
    return stored


@contextmanager
def no_larger_than(pixels):
    """Pillow, which decodes for pydicom, refuses larger images: a damaged size in a JPEG 2000 stream took it minutes."""
    before, Image.MAX_IMAGE_PIXELS = (
        Image.MAX_IMAGE_PIXELS,
        -(-pixels // 2),
    )  # Pillow warns above this, and refuses above twice
    try:
        with catch_warnings():
            simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def words(error):
    """An Unusable or an error of the file system in words, on one line; "" for any other."""
    if isinstance(error, Unusable):
        return " ".join(str(error).split())
    return error.strerror if isinstance(error, OSError) and error.strerror else ""
