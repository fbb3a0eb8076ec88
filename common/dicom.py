"""One DICOM CT slice: what its header says, what is wrong with it, and its stored values.

Knows nothing of volumes, HU images or strategies.
"""

import math
import os
import stat
from contextlib import contextmanager
from typing import NamedTuple
from warnings import catch_warnings, simplefilter

import numpy as np
import pydicom
from PIL import Image
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

# No CT slice has more, and a few damaged bytes can ask for all of the memory.
MAX_PIXELS = 8192 * 8192
SCOUTS = ("LOCALIZER", "SCOUT", "TOPOGRAM")  # in ImageType
LARGE = 2**16  # bytes: larger elements, such as the pixels, are no part of a header
UNDEFINED_LENGTH = 0xFFFFFFFF  # of compressed pixel data


class Unusable(ValueError):
    """A file that cannot become a slice; its message is the reason that skipped.csv lists."""


class Pixels(NamedTuple):
    """Where the pixels of an ordinary uncompressed slice lie in its file, and what they are."""

    offset: int  # bytes
    syntax: str  # TransferSyntaxUID
    bits_stored: int  # of 16
    signed: int  # PixelRepresentation


class Header(NamedTuple):
    """What ordering a DICOM slice and bringing it to HU needs, apart from its pixels."""

    series: str
    instance: str  # SOPInstanceUID
    axes: list[float] | None  # ImageOrientationPatient, six numbers
    position: float | None  # mm along the slice normal
    number: float | None  # InstanceNumber
    rows: int
    columns: int
    slope: float
    intercept: float  # HU
    padding: tuple[int, int] | None  # stored values, both included
    pixels: Pixels | None = None  # None where the pixels are compressed, or out of the ordinary


def read_header(path):
    """The Header of a DICOM CT slice, or the reason (str) why the file is not one."""
    try:
        check_is_file(path)
        dataset = pydicom.dcmread(path, defer_size=LARGE)
        check_is_slice(dataset)
        check_has_pixels(dataset, os.path.getsize(path))
        axes = orientation(dataset)
        return Header(
            series=str(dataset.SeriesInstanceUID),
            instance=str(dataset.get("SOPInstanceUID") or path),
            axes=axes,
            position=position_along_normal(dataset, axes),
            number=number(dataset, "InstanceNumber"),
            rows=dataset.Rows,
            columns=dataset.Columns,
            slope=number(dataset, "RescaleSlope"),
            intercept=number(dataset, "RescaleIntercept"),
            padding=padding_range(dataset),
            pixels=ordinary_pixels(dataset),
        )
    except pydicom.errors.InvalidDicomError:
        return what_else(path)
    except Exception as error:  # whatever a damaged file raises
        kind = type(error).__name__
        return reason(error) or f"a DICOM header that cannot be read ({kind}): damaged or cut short"


def reason(error):
    """What an Unusable or an error of the file system says, on one line; "" for other errors.

    Those could quote a patient's data.
    """
    if isinstance(error, Unusable):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return error.strerror or ""
    return ""


def check_is_file(path):
    """Raise Unusable for a pipe or a device, OSError for what cannot be opened.

    Reading a pipe would wait for ever.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        os.listdir(path)  # says why the folder cannot be opened
    if not stat.S_ISREG(mode):
        raise Unusable("not a regular file, but a folder, pipe, socket or device")


def what_else(path):
    """What a file is that pydicom does not take for DICOM."""
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        return "an empty file"
    if start == b"\x89PNG" or start[:3] == b"\xff\xd8\xff":
        return "a PNG or JPEG by its content, but not by its name: rename it"
    return "not a DICOM file (the mark DICM is missing), and not named .png, .jpg or .jpeg"


def check_is_slice(dataset):
    """Raise Unusable unless the DICOM header is that of one CT slice with a rescale to HU."""
    if dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        raise Unusable("a DICOMDIR, not an image")
    if not dataset:  # so pydicom answers where compressed pixels, or another element, have no end
        raise Unusable("cut short, or damaged, inside of an element")
    modality = str(dataset.get("Modality") or "missing")
    if modality != "CT":
        raise Unusable(f"Modality is {modality[:16]}, not CT")
    if not dataset.get("SeriesInstanceUID"):
        raise Unusable("SeriesInstanceUID is missing")
    image_type = str(dataset.get("ImageType")).upper()
    if any(scout in image_type for scout in SCOUTS):
        raise Unusable("a localizer, not a slice")
    if (dataset.get("NumberOfFrames") or 1) != 1:
        raise Unusable("a multi-frame image, not a slice: split it into single-frame files")
    photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")
    if photometric != "MONOCHROME2":
        raise Unusable(f"PhotometricInterpretation is {photometric[:16]}, not MONOCHROME2")
    slope = number(dataset, "RescaleSlope")
    intercept = number(dataset, "RescaleIntercept")
    for keyword, value in (("RescaleSlope", slope), ("RescaleIntercept", intercept)):
        if value is None:
            raise Unusable(
                f"{keyword} is missing or no number, so the values cannot be brought to HU"
            )
    if slope <= 0:
        raise Unusable("RescaleSlope is not above 0, which does not give HU")
    if dataset.get("PixelRepresentation") not in (0, 1):
        raise Unusable("PixelRepresentation is missing, so the sign of the values is unknown")
    rows = dataset.get("Rows") or 0
    columns = dataset.get("Columns") or 0
    if not 0 < rows * columns <= MAX_PIXELS:
        raise Unusable(f"{rows} x {columns} pixels: a slice has at least 1 and at most 8192 x 8192")


def check_has_pixels(dataset, file_size):
    """Raise Unusable if the pixels are missing or cut short, or if nothing here decodes them.

    file_size: bytes. The reason names the plug-in to install.
    """
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
    if "PixelData" not in dataset:
        raise Unusable("has no pixel data")
    pixels = dataset.get_item("PixelData", keep_deferred=True)
    if pixels.length == UNDEFINED_LENGTH or syntax.is_deflated:
        return
    values = dataset.Rows * dataset.Columns
    present = (file_size - pixels.value_tell) // (dataset.BitsAllocated // 8)
    if present < values:
        raise Unusable(f"pixel data is cut short: {present} of {values} values")


def numbers(dataset, keyword):
    """An element as a list of finite floats; None where it is missing or holds anything else."""
    try:
        values = np.array(dataset.get(keyword), float).ravel()  # None becomes NaN
    except Exception:  # whatever pydicom raises for a damaged value
        return None
    return values.tolist() if np.isfinite(values).all() else None


def number(dataset, keyword):
    """An element as one finite float; None where it is missing or holds anything else."""
    try:
        value = float(dataset.get(keyword))
    except Exception:  # whatever pydicom raises for a damaged value
        return None
    return value if math.isfinite(value) else None


def orientation(dataset):
    """ImageOrientationPatient: the directions of a row and of a column, six numbers.

    None where it is missing or its axes are not two right-angled unit vectors.
    """
    axes = numbers(dataset, "ImageOrientationPatient")
    if axes is None or len(axes) != 6:
        return None
    pair = np.reshape(axes, (2, 3))
    right_angled = np.abs(pair @ pair.T - np.eye(2)).max() < 0.05
    return axes if right_angled else None


def position_along_normal(dataset, axes):
    """mm: ImagePositionPatient projected on the slice normal; None where either is missing."""
    corner = numbers(dataset, "ImagePositionPatient")
    if axes is None or corner is None or len(corner) != 3:
        return None
    x1, y1, z1, x2, y2, z2 = axes
    normal = y1 * z2 - z1 * y2, z1 * x2 - x1 * z2, x1 * y2 - y1 * x2
    return sum(n * c for n, c in zip(normal, corner))


def padding_range(dataset):
    """PixelPaddingValue, or its range, as stored values (lowest, highest); None where missing."""
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return None
    last = dataset.get("PixelPaddingRangeLimit") or first
    limits = [first, last]
    if dataset.PixelRepresentation == 1:  # some scanners write -2000 as the unsigned 63536
        limits = [limit - 65536 if limit > 32767 else limit for limit in limits]
    return min(limits), max(limits)


def ordinary_pixels(dataset):
    """The Pixels of a dataset that passed the checks above; None unless 16 bits, uncompressed."""
    syntax = dataset.file_meta.TransferSyntaxUID
    pixels = dataset.get_item("PixelData", keep_deferred=True)
    bits_stored = dataset.get("BitsStored")
    if (
        syntax not in (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
        or dataset.get("SamplesPerPixel") != 1
        or dataset.BitsAllocated != 16
        or bits_stored not in range(1, 17)
        or pixels.length != 2 * dataset.Rows * dataset.Columns
    ):
        return None
    return Pixels(pixels.value_tell, str(syntax), bits_stored, dataset.PixelRepresentation)


def read_stored(path, header):
    """Stored values of a DICOM slice with this Header, integers [height, width]."""
    if header.pixels:
        return read_ordinary(path, header)
    with no_larger_than(header.rows * header.columns):
        # named, since check_is_slice lets it be missing, and pydicom does not
        stored = pixel_array(pydicom.dcmread(path), photometric_interpretation="MONOCHROME2")
    if stored.ndim != 2:
        raise Unusable(f"pixel data has {stored.ndim} dimensions, not 2")
    return stored


def read_ordinary(path, header):
    """As pixel_array, without parsing the header again: in a quarter of the time."""
    with open(path, "rb") as file:
        file.seek(header.pixels.offset)
        values = file.read(2 * header.rows * header.columns)
    stored, _ = get_decoder(header.pixels.syntax).as_array(
        values,
        rows=header.rows,
        columns=header.columns,
        samples_per_pixel=1,
        number_of_frames=1,
        bits_allocated=16,
        bits_stored=header.pixels.bits_stored,
        pixel_representation=header.pixels.signed,
        photometric_interpretation="MONOCHROME2",
        pixel_keyword="PixelData",
        pixel_vr="OW",
    )
    return stored


@contextmanager
def no_larger_than(pixels):
    """Let Pillow, which also decodes for pydicom, refuse images of more pixels.

    A damaged size in a JPEG 2000 stream took it minutes.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels
    try:
        with catch_warnings():
            simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
