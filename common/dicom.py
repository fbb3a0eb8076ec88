"""One DICOM CT slice: what its header says, what is wrong with it, and its stored values.

Knows nothing of volumes, HU images or strategies.
"""

import os
import stat
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
    number: float | None  # InstanceNumber
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
        slope, intercept = rescale(dataset)
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
            signed=dataset.PixelRepresentation == 1,
            slope=slope,
            intercept=intercept,
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
    if isinstance(error, Unusable):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return error.strerror or ""
    return ""


def check_is_file(path):
    """Raise Unusable for a pipe, whose reader waits for ever, OSError for what has no access."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Unusable("not a regular file: a folder that cannot be opened, a pipe or a device")


def check_is_slice(dataset):
    """Raise Unusable unless the DICOM header is that of one grey CT slice."""
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


def rescale(dataset):
    """(RescaleSlope, RescaleIntercept in HU); raises Unusable where values cannot become HU."""
    slope = number(dataset, "RescaleSlope")
    intercept = number(dataset, "RescaleIntercept")
    if slope is None or slope <= 0 or intercept is None:
        raise Unusable("RescaleSlope or RescaleIntercept is missing, or gives no HU")
    if dataset.get("PixelRepresentation") not in (0, 1):
        raise Unusable("PixelRepresentation is missing, so the sign of the values is unknown")
    return slope, intercept


def check_has_pixels(dataset, file_size):
    """Raise Unusable if the pixels are missing, cut short or too many, or nothing decodes them.

    file_size: bytes. The reason names the plug-in to install.
    """
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


def number(dataset, keyword):
    """An element as one finite float; None where it is missing or holds anything else."""
    values = numbers(dataset, keyword, 1)
    return values and values[0]


def orientation(dataset):
    """ImageOrientationPatient, six numbers; None unless they are two right-angled unit vectors."""
    axes = numbers(dataset, "ImageOrientationPatient", 6)
    pair = np.reshape(axes or [0] * 6, (2, 3))
    right_angled = np.abs(pair @ pair.T - np.eye(2)).max() < 0.05
    return axes if right_angled else None


def position_along_normal(dataset, axes):
    """mm: ImagePositionPatient projected on the slice normal; None where either is missing."""
    corner = numbers(dataset, "ImagePositionPatient", 3)
    if axes is None or corner is None:
        return None
    x1, y1, z1, x2, y2, z2 = axes
    normal = y1 * z2 - z1 * y2, z1 * x2 - x1 * z2, x1 * y2 - y1 * x2
    return sum(n * c for n, c in zip(normal, corner, strict=True))


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
