"""One DICOM CT slice: what its header says, what is wrong with it, and its stored values."""

import hashlib
import os
import stat
from functools import cache
from math import inf, isfinite
from typing import NamedTuple

import numpy as np
import pydicom
from PIL import Image
from pydicom import uid
from pydicom.pixels import get_decoder, pixel_array
from pydicom.tag import Tag

# No CT slice has more, and a few damaged bytes can ask for all of the memory.
MAX_PIXELS = 8192 * 8192
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses, for pydicom too, twice as many
SCOUTS = ("LOCALIZER", "SCOUT", "TOPOGRAM")  # in ImageType
LARGE = 2**16  # bytes: larger elements, such as the pixels, are no part of a header
UNDEFINED_LENGTH = 0xFFFFFFFF  # of compressed pixel data
PAINTED = 2**16 - 2000  # padding of -2000 in unsigned words, also without an element that says so
PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID")
ACQUISITION = (
    "TemporalPositionIdentifier",
    "AcquisitionNumber",
    "AcquisitionTime",
    "SeriesNumber",
    "ConvolutionKernel",
)

tag_of = cache(Tag)  # looked up once, not for every file


class Unusable(ValueError):
    """A file that cannot become a slice; its message is the reason that skipped.csv lists."""


def refuse_if(wrong, why):
    """Raise Unusable(why) where something is wrong."""
    if wrong:
        raise Unusable(why)


class Header(NamedTuple):
    """What ordering a DICOM slice and bringing it to HU needs, apart from its pixels."""

    file: str  # relative to the data folder
    series: str
    patient: str  # hash of what PATIENT holds, so that no name gets out
    acquisition: tuple[bytes]  # what ACQUISITION holds, empty where missing
    instance: str  # SOPInstanceUID, or the path where that, or both number and position, lack
    axes: list[float] | None  # ImageOrientationPatient, six numbers
    position: float | None  # mm along the slice normal
    number: float  # InstanceNumber; infinite where missing
    shape: tuple[int, int]  # rows, columns
    bits: tuple[int, int]  # BitsStored, HighBit
    signed: bool
    slope: float
    intercept: float  # HU
    padding: tuple[int, int] | None  # stored values, both included
    plain: int | None = None  # see find_pixels


def read_header(file, data=""):
    """The Header of a DICOM CT slice, or the reason (str) why the file, below data, is not one."""
    path = os.path.join(data, file)
    try:
        check_is_file(path)
        dataset = pydicom.dcmread(path, defer_size=LARGE)
        slope, intercept = number(dataset, "RescaleSlope"), number(dataset, "RescaleIntercept")
        check_is_slice(dataset, slope, intercept)
        bits = value_bits(dataset)
        plain = find_pixels(dataset, os.path.getsize(path))
        axes, position = geometry(dataset)
        order = number(dataset, "InstanceNumber", inf)
        placed = position is not None or order < inf
        return Header(
            file=file,
            series=str(dataset.SeriesInstanceUID),
            patient=hashlib.sha256(repr(raw(dataset, PATIENT)).encode()).hexdigest(),
            acquisition=raw(dataset, ACQUISITION),
            instance=str(placed and dataset.get("SOPInstanceUID") or path),
            axes=axes,
            position=position,
            number=order,
            shape=(dataset.Rows, dataset.Columns),
            bits=bits,
            signed=dataset.PixelRepresentation == 1,
            slope=slope,
            intercept=intercept,
            padding=padding_range(dataset),
            plain=plain,
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
    other = "not a regular file: a folder that cannot be opened, a pipe or a device"
    refuse_if(not stat.S_ISREG(os.stat(path).st_mode), other)


def check_is_slice(dataset, slope, intercept):
    """Raise Unusable unless the DICOM header is that of one grey CT slice, with a way to HU."""
    kind = dataset.file_meta.get("MediaStorageSOPClassUID")
    refuse_if(kind == uid.MediaStorageDirectoryStorage, "a DICOMDIR, not an image")
    # so pydicom answers where compressed pixels, or another element, have no end
    refuse_if(not dataset, "cut short, or damaged, inside of an element")
    modality = str(dataset.get("Modality") or "missing")[:16].strip().upper()
    image_type = str(dataset.get("ImageType")).upper()
    frames = dataset.get("NumberOfFrames") or 1
    colour = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")[:16]
    sign = dataset.get("PixelRepresentation")
    series = dataset.get("SeriesInstanceUID")
    no_hu = slope is None or slope <= 0 or intercept is None
    refuse_if(modality != "CT", f"Modality is {modality}, not CT")
    refuse_if(not series, "SeriesInstanceUID is missing")
    refuse_if(any(scout in image_type for scout in SCOUTS), "a localizer, not a slice")
    refuse_if(frames != 1, "a multi-frame image, not a slice: split it into single-frame files")
    refuse_if(colour != "MONOCHROME2", f"PhotometricInterpretation is {colour}, not MONOCHROME2")
    refuse_if(no_hu, "RescaleSlope or RescaleIntercept is missing, or gives no HU")
    unknown = "PixelRepresentation is missing, so the sign of the values is unknown"
    refuse_if(sign not in (0, 1), unknown)


def find_pixels(dataset, file_size):
    """Where uncompressed little-endian 16-bit pixels begin, in bytes; None for any other pixels.

    Raises Unusable if they are missing, cut short or too many, or if nothing decodes them.
    """
    rows = dataset.get("Rows") or 0
    columns = dataset.get("Columns") or 0
    size = rows * columns
    limits = "a slice has at least 1 and at most 8192 x 8192"
    refuse_if(not 0 < size <= MAX_PIXELS, f"{rows} x {columns} pixels: {limits}")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    refuse_if(not syntax, "TransferSyntaxUID is missing, so the pixels cannot be decoded")
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:  # so pydicom answers for a syntax that it has no decoders of
        raise Unusable(f"transfer syntax {syntax.name[:64]} is not one of images") from None
    plug_in = "pylibjpeg-openjpeg" if "2000" in syntax.name else "pylibjpeg-libjpeg"
    refuse_if(not available, f"{syntax.name} needs pip install pylibjpeg {plug_in}")
    refuse_if("PixelData" not in dataset, "has no pixel data")
    pixels = dataset.get_item("PixelData", keep_deferred=True)
    if pixels.length != UNDEFINED_LENGTH and not syntax.is_deflated:
        present = (file_size - pixels.value_tell) // (dataset.BitsAllocated // 8)
        refuse_if(present < size, f"pixel data is cut short: {present} of {size} values")
    plain = (
        syntax in (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian)
        and dataset.get("SamplesPerPixel") == 1
        and dataset.BitsAllocated == 16
        and pixels.length == 2 * size
    )
    return pixels.value_tell if plain else None


def value_bits(dataset):
    """(BitsStored, HighBit); raises Unusable where they do not tell which bits are the value."""
    allocated, stored, high = map(dataset.get, ("BitsAllocated", "BitsStored", "HighBit"))
    high = stored and stored - 1 if high is None else high
    said = f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {high}"
    fits = allocated in (8, 16, 32) and stored and 0 < stored <= high + 1 <= allocated
    refuse_if(not fits, f"{said}: no layout of pixels")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if high + 1 != stored and syntax and syntax.is_compressed and syntax != uid.RLELossless:
        raise Unusable(f"{said}: ambiguous in compressed pixels, decompress them first")
    return stored, high


def raw(dataset, keywords):
    """The bytes of elements, which pydicom would convert in ten times the time."""
    items = [dataset.get_item(tag_of(keyword)) for keyword in keywords]
    return tuple((getattr(item, "value", None) or b"").strip(b"\0 ") for item in items)


def numbers(dataset, keyword, count):
    """An element as so many finite floats; None where it is missing or holds anything else."""
    try:
        element = dataset.get_item(tag_of(keyword))
        if element.VR in ("DS", "IS") and isinstance(element.value, bytes):  # as in `raw`
            values = [float(text) for text in element.value.strip(b"\0 ").split(b"\\")]
        else:
            value = dataset[keyword].value
            words = element.VR == "OW"  # of a padding value, as some scanners write it
            values = np.array(np.frombuffer(value, "<i2") if words else value, float).ravel()
    except Exception:  # whatever a missing or a damaged value raises
        return None
    return [*map(float, values)] if len(values) == count and all(map(isfinite, values)) else None


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
    """PixelPaddingValue, or its range, as stored values (lowest, highest); None where missing.

    Seen: -2000 as the unsigned 63536, the reverse, or twice; a limit of 0 where there is no range.
    """
    padding = numbers(dataset, "PixelPaddingValue", 1) or numbers(dataset, "PixelPaddingValue", 2)
    if not padding:
        words = dataset.BitsAllocated == 16 and dataset.PixelRepresentation == 0
        return (PAINTED, PAINTED) if words else None
    limits = padding[0], number(dataset, "PixelPaddingRangeLimit") or padding[0]
    words = 2**dataset.BitsAllocated
    lowest = -words // 2 if dataset.PixelRepresentation == 1 else 0
    limits = [int(limit - lowest) % words + lowest for limit in limits]
    return min(limits), max(limits)


def read_stored(path, header):
    """Stored values of a DICOM slice with this Header, integers [height, width]."""
    if header.plain:  # as pydicom would read them, but without parsing the header again
        kind = "<i2" if header.signed else "<u2"
        words = np.fromfile(path, kind, np.prod(header.shape), offset=header.plain)
        return stored_of(words.reshape(header.shape), header)
    dataset = pydicom.dcmread(path)
    dataset.BitsStored = dataset.BitsAllocated  # the bits are cut out here, for all decoders alike
    dataset.HighBit = dataset.BitsAllocated - 1
    # named, since check_is_slice lets it be missing, and pydicom does not
    words = pixel_array(dataset, photometric_interpretation="MONOCHROME2")
    refuse_if(words.ndim != 2, f"pixel data has {words.ndim} dimensions, not 2")
    kind = "ui"[header.signed] + str(dataset.BitsAllocated // 8)  # of this machine's byte order
    return stored_of(words.astype(kind), header)


def stored_of(words, header):
    """The bits of the values alone, sign extended; overlays and the like lie in the other bits."""
    stored, high = header.bits
    below, size = high + 1 - stored, 8 * words.itemsize
    if below and words.max() < 2**stored and (words & (2**below - 1)).any():
        raise Unusable(f"HighBit is {high}, but the values lie in the lowest {stored} bits")
    lowest, highest = header.padding or (0, 0)
    outside = ()
    no_room = lowest < -(2**stored) // 2 or highest >= 2**stored  # in BitsStored
    if no_room and (lowest < 0 or words.max() >= lowest):
        outside = np.nonzero((words >= lowest) & (words <= highest))
    words <<= size - 1 - high
    words >>= size - stored
    if outside:
        words[outside] = lowest
    return words
