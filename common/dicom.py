"""One DICOM CT slice: what its header says, what is wrong with it, and its stored values.

Knows nothing of volumes, HU images or strategies.
"""

from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

PIXEL_DATA = b"\xe0\x7f\x10\x00"  # the tag (7FE0,0010), little endian


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
    position: float | None  # mm along the slice normal
    number: float  # InstanceNumber
    slope: float
    intercept: float  # HU
    padding: tuple[int, int] | None  # stored values, both included
    native: Native | None  # None: for pydicom to decode


def read_header(path):
    """The Header of a DICOM CT slice, or the reason (str) why the file is not one."""
    try:
        with open(path, "rb") as file:
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
            check_is_slice(dataset)
            native = native_pixels(dataset, file)  # first: padding_range converts an element that it reads raw
            return Header(
                text(dataset, "SeriesInstanceUID"),
                text(dataset, "SOPInstanceUID") or str(path),
                position_along_normal(dataset),
                float(text(dataset, "InstanceNumber") or 0),
                float(text(dataset, "RescaleSlope")),
                float(text(dataset, "RescaleIntercept")),
                padding_range(dataset),
                native,
            )
    except Exception as error:  # whatever a broken file raises is its reason
        return reason(error)


def text(dataset, keyword):
    """An element as it stands in the file, "1\\2\\3" where it has several values, "" where it is missing or empty.

    pydicom's own conversion of the dozen elements needed here takes as long as reading the file.
    """
    element = dataset.get_item(keyword)
    if element is None or element.value is None:
        return ""
    return element.value.decode("latin-1").strip(" \0")


def check_is_slice(dataset):
    """Raise Unusable unless the DICOM header is that of one CT slice with a rescale to HU."""
    modality = text(dataset, "Modality")
    if modality != "CT":
        raise Unusable(f"Modality is {modality or 'missing'}, not CT")
    if not text(dataset, "SeriesInstanceUID"):
        raise Unusable("SeriesInstanceUID is missing")
    if "LOCALIZER" in text(dataset, "ImageType").split("\\"):
        raise Unusable("a localizer, not a slice")
    if int(text(dataset, "NumberOfFrames") or 1) != 1:
        raise Unusable("a multi-frame image, not a slice: split it into single-frame files")
    photometric = text(dataset, "PhotometricInterpretation")
    if photometric not in ("MONOCHROME2", ""):
        raise Unusable(f"PhotometricInterpretation is {photometric}, not MONOCHROME2")
    slope, intercept = text(dataset, "RescaleSlope"), text(dataset, "RescaleIntercept")
    for name, value in (("RescaleSlope", slope), ("RescaleIntercept", intercept)):
        if not value:
            raise Unusable(f"{name} is missing, so the values cannot be brought to HU")
    try:
        fine = np.isfinite(float(intercept)) and 0 < float(slope) < np.inf
    except ValueError:
        fine = False
    if not fine:
        raise Unusable(f"rescale {slope} x + {intercept} does not give HU")


def position_along_normal(dataset):
    """mm: ImagePositionPatient projected on the normal of ImageOrientationPatient; None where either is missing."""
    corner, axes = text(dataset, "ImagePositionPatient"), text(dataset, "ImageOrientationPatient")
    if not corner or not axes:
        return None
    x1, y1, z1, x2, y2, z2 = map(float, axes.split("\\"))
    normal = y1 * z2 - z1 * y2, z1 * x2 - x1 * z2, x1 * y2 - y1 * x2
    return sum(n * float(c) for n, c in zip(normal, corner.split("\\"), strict=True))


def padding_range(dataset):
    """PixelPaddingValue, or its range, as stored values (lowest, highest); None where the tag is missing."""
    if dataset.get("PixelPaddingValue") is None:
        return None
    limits = [dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit") or dataset.PixelPaddingValue]
    if dataset.PixelRepresentation == 1:  # some scanners write -2000 as the unsigned 63536
        limits = [limit - 65536 if limit > 32767 else limit for limit in limits]
    return min(limits), max(limits)


def native_pixels(dataset, file):
    """Native of a header read from the open file up to the pixel data; None where pydicom must decode (or complain)."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax not in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        return None
    elements = [dataset.get_item(name) for name in ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation")]
    if None in elements:
        return None
    rows, columns, allocated, bits, signed = (int.from_bytes(element.value, "little") for element in elements)
    head = file.read(8 if syntax == ImplicitVRLittleEndian else 12)
    if allocated != 16 or head[:4] != PIXEL_DATA or int.from_bytes(head[-4:], "little") != rows * columns * 2:
        return None
    return Native(file.tell(), rows, columns, bits, signed == 1)


def read_stored(path, native):
    """Stored values of a DICOM slice, integers [height, width], as pydicom's pixel_array gives them."""
    if native:
        count = native.rows * native.columns
        stored = np.fromfile(path, "<i2" if native.signed else "<u2", count, offset=native.offset)
        if len(stored) == count:
            unused = 16 - native.bits  # bits above BitsStored may hold anything, an overlay for one
            stored = stored.reshape(native.rows, native.columns)
            return stored << unused >> unused if unused else stored
    stored = pydicom.dcmread(path).pixel_array
    if stored.ndim != 2:
        raise Unusable(f"pixel data has {stored.ndim} dimensions, not 2")
    return stored


def reason(error):
    """An exception as one line of words for skipped.csv."""
    if isinstance(error, Unusable):
        return str(error)
    if isinstance(error, pydicom.errors.InvalidDicomError):
        return "neither DICOM nor PNG or JPEG"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
