"""One DICOM CT slice: what its header says, what is wrong with it, and its stored values.

Knows nothing of volumes, HU images or strategies.
"""

import os
import stat
from math import inf
from typing import NamedTuple

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
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses, for pydicom too, twice as many
SCOUTS = ("LOCALIZER", "SCOUT", "TOPOGRAM")  # in ImageType
LARGE = 2**16  # bytes: larger elements, such as the pixels, are no part of a header
UNDEFINED_LENGTH = 0xFFFFFFFF  # of compressed pixel data


class Unusable(ValueError):
    """A file that cannot become a slice; its message is the reason that skipped.csv lists."""


class Header(NamedTuple):
    """What ordering a DICOM slice and bringing it to HU needs, apart from its pixels."""

    series: str
    instance: str  # SOPInstanceUID
    axes: list[float] | None  # ImageOrientationPatient, six numbers
    position: float | None  # mm along the slice normal
    number: float  # InstanceNumber; infinite where missing
    rows: int
    columns: int
    signed: bool
    slope: float
    intercept: float  # HU
    padding: tuple[int, int] | None  # stored values, both included
    plain: tuple[int, int] | None = None  # see plain_pixels


def read_header(path):
    """The Header of a DICOM CT slice, or the reason (str) why the file is not one."""
    try:
        check_is_file(path)
        dataset = pydicom.dcmread(path, defer_size=LARGE)
        check_is_slice(dataset)
        check_has_pixels(dataset, os.path.getsize(path))
        axes, position = geometry(dataset)
        return Header(
            series=str(dataset.SeriesInstanceUID),
            instance=str(dataset.get("SOPInstanceUID") or path),
            axes=axes,
            position=position,
            number=number(dataset, "InstanceNumber", inf),
            rows=dataset.Rows,
            columns=dataset.Columns,
            signed=dataset.PixelRepresentation == 1,
            slope=number(dataset, "RescaleSlope"),
            intercept=number(dataset, "RescaleIntercept"),
            padding=padding_range(dataset),
            plain=plain_pixels(dataset),
        )
    except pydicom.errors.InvalidDicomError:
        return "not a DICOM file (the mark DICM is missing), and not named .png, .jpg or .jpeg"
    except Exception as error:  # whatever a damaged file raises
        kind = type(error).__name__
        return reason(error) or f"a DICOM header that cannot be read ({kind}): damaged or cut short"


def reason(error):
    """What an Unusable or an OSError says; "" for others, which could quote a patient's data."""
    said = str(error) if isinstance(error, Unusable) else getattr(error, "strerror", None) or ""
    return " ".join(said.split())


def check_is_file(path):
    """Raise Unusable for a pipe, whose reader waits for ever, OSError for what has no access."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Unusable("not a regular file: a folder that cannot be opened, a pipe or a device")


def check_is_slice(dataset):
    """Raise Unusable unless the DICOM header is that of one grey CT slice, with a way to HU."""
    if dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        raise Unusable("a DICOMDIR, not an image")
    if not dataset:  # so pydicom answers where compressed pixels, or another element, have no end
        raise Unusable("cut short, or damaged, inside of an element")
    modality = str(dataset.get("Modality") or "missing")[:16]
    image_type = str(dataset.get("ImageType")).upper()
    frames = dataset.get("NumberOfFrames") or 1
    colour = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")[:16]
    slope, intercept = number(dataset, "RescaleSlope", 0), number(dataset, "RescaleIntercept")
    sign = dataset.get("PixelRepresentation")
    for refused, why in [
        (modality != "CT", f"Modality is {modality}, not CT"),
        (not dataset.get("SeriesInstanceUID"), "SeriesInstanceUID is missing"),
        (any(scout in image_type for scout in SCOUTS), "a localizer, not a slice"),
        (frames != 1, "a multi-frame image, not a slice: split it into single-frame files"),
        (colour != "MONOCHROME2", f"PhotometricInterpretation is {colour}, not MONOCHROME2"),
        (
            slope <= 0 or intercept is None,
            "RescaleSlope or RescaleIntercept is missing, or gives no HU",
        ),
        (
            sign not in (0, 1),
            "PixelRepresentation is missing, so the sign of the values is unknown",
        ),
    ]:
        if refused:
            raise Unusable(why)


def check_has_pixels(dataset, file_size):
    """Raise Unusable if the pixels are missing, cut short or too many, or nothing decodes them."""
    rows = dataset.get("Rows") or 0
    columns = dataset.get("Columns") or 0
    if not 0 < rows * columns <= MAX_PIXELS:
        raise Unusable(f"{rows} x {columns} pixels: a slice has at least 1 and at most 8192 x 8192")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if not syntax:
        raise Unusable("TransferSyntaxUID is missing, so the pixels cannot be decoded")
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:  # so pydicom answers for a syntax that it has no decoders of
        raise Unusable(f"transfer syntax {syntax.name[:64]} is not one of images") from None
    if not available:
        plug_in = "pylibjpeg-openjpeg" if "2000" in syntax.name else "pylibjpeg-libjpeg"
        raise Unusable(f"{syntax.name} needs pip install pylibjpeg {plug_in}")
    if "PixelData" not in dataset:
        raise Unusable("has no pixel data")
    pixels = dataset.get_item("PixelData", keep_deferred=True)
    if pixels.length == UNDEFINED_LENGTH or syntax.is_deflated:
        return
    present = (file_size - pixels.value_tell) // (dataset.BitsAllocated // 8)
    if present < rows * columns:
        raise Unusable(f"pixel data is cut short: {present} of {rows * columns} values")


def numbers(dataset, keyword, count):
    """An element as so many finite floats; None where it is missing or holds anything else."""
    try:
        values = np.array(dataset.get(keyword), float).ravel()  # None becomes NaN
    except Exception:  # whatever pydicom raises for a damaged value
        return None
    return values.tolist() if len(values) == count and np.isfinite(values).all() else None


def number(dataset, keyword, missing=None):
    [value] = numbers(dataset, keyword, 1) or [missing]
    return value


def geometry(dataset):
    """(ImageOrientationPatient, mm along the slice normal); None where missing or no such thing."""
    axes = numbers(dataset, "ImageOrientationPatient", 6)
    corner = numbers(dataset, "ImagePositionPatient", 3)
    pair = np.reshape(axes or [0] * 6, (2, 3))
    if np.abs(pair @ pair.T - np.eye(2)).max() >= 0.05:  # no right-angled unit vectors
        return None, None
    x1, y1, z1, x2, y2, z2 = axes
    normal = y1 * z2 - z1 * y2, z1 * x2 - x1 * z2, x1 * y2 - y1 * x2
    return axes, corner and sum(n * c for n, c in zip(normal, corner, strict=True))


def padding_range(dataset):
    """PixelPaddingValue, or its range, as stored values (lowest, highest); None where missing."""
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return None
    limits = [first, dataset.get("PixelPaddingRangeLimit") or first]
    if dataset.PixelRepresentation == 1:  # some scanners write -2000 as the unsigned 63536
        limits = [limit - 65536 if limit > 32767 else limit for limit in limits]
    return min(limits), max(limits)


def plain_pixels(dataset):
    """(offset in the file in bytes, bits stored) of uncompressed little-endian 16-bit pixels.

    None where the pixels are anything else.
    """
    pixels = dataset.get_item("PixelData", keep_deferred=True)
    plain = (
        dataset.file_meta.TransferSyntaxUID in (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
        and dataset.get("SamplesPerPixel") == 1
        and dataset.BitsAllocated == 16
        and dataset.get("BitsStored") in range(1, 17)
        and pixels.length == 2 * dataset.Rows * dataset.Columns
    )
    return (pixels.value_tell, dataset.BitsStored) if plain else None


def read_stored(path, header):
    """Stored values of a DICOM slice with this Header, integers [height, width]."""
    if header.plain:  # as pydicom would read them, but without parsing the header again
        offset, bits = header.plain
        kind = "<i2" if header.signed else "<u2"
        stored = np.fromfile(path, kind, header.rows * header.columns, offset=offset)
        stored <<= 16 - bits  # what lies in the unused high bits is no part of a value
        stored >>= 16 - bits
        return stored.reshape(header.rows, header.columns)
    # named, since check_is_slice lets it be missing, and pydicom does not
    stored = pixel_array(pydicom.dcmread(path), photometric_interpretation="MONOCHROME2")
    if stored.ndim != 2:
        raise Unusable(f"pixel data has {stored.ndim} dimensions, not 2")
    return stored
