"""CT slices: find the volumes in a folder, order them along z, read HU, scale to 8 bit.

Knows DICOM, PNG and JPEG and what is wrong with a file; knows nothing of strategies or training.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from PIL import Image

AIR_HU = -1000.0  # what padding outside the field of view becomes, see stored_to_hu
PAINTED_PADDING = -2000  # the scanner's fill value outside the field of view (official code)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
HEADER_TAGS = [
    "SeriesInstanceUID", "SOPInstanceUID", "Modality", "ImageType", "NumberOfFrames", "InstanceNumber",
    "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept", "PhotometricInterpretation",
]  # fmt: skip


class Unusable(ValueError):
    """A file that cannot become a slice; its message is the reason that skipped.csv lists."""


class Volume(NamedTuple):
    name: str  # SeriesInstanceUID, or the folder (or name prefix) of an image stack; never a patient's name
    files: list[str]  # relative to the data folder, in z order
    positions: list[str]  # mm along the slice normal, or the number in an image's name; "" where unknown


class Header(NamedTuple):
    series: str
    instance: str  # SOPInstanceUID
    position: float | None  # mm along the slice normal
    number: float  # InstanceNumber


def list_files(data):
    """All files below data as (path relative to data, bytes, modification time in ns), sorted by path.

    Linked folders are followed, each real folder once; a folder that cannot be opened is listed as if it were a file.
    """
    found, seen = [], set()

    def add(path):
        stat = os.stat(path) if os.path.exists(path) else os.lstat(path)
        found.append((Path(path).relative_to(data).as_posix(), stat.st_size, stat.st_mtime_ns))

    for folder, folders, names in os.walk(data, followlinks=True, onerror=lambda error: add(error.filename)):
        folders.sort()
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        for name in names:
            add(os.path.join(folder, name))
    return sorted(found)


def find_volumes(data, files, map_files=map):
    """Group files into volumes in z order.

    data: folder. files: paths relative to it. map_files: a parallel, order-keeping `map`, if there is one.
    Returns (volumes sorted by name, skipped as a list of (file, reason)).
    DICOM is grouped by SeriesInstanceUID and ordered by the position along the slice normal, then by
    InstanceNumber, then by name. Images are grouped by folder, or by the name before the last `_` where one
    folder holds several such names (the official code's flat layout), and ordered by the number in the name.
    """
    images = [file for file in files if Path(file).suffix.lower() in IMAGE_SUFFIXES]
    others = [file for file in files if Path(file).suffix.lower() not in IMAGE_SUFFIXES]
    series, skipped = {}, []
    for file, header in zip(others, map_files(read_header, [Path(data, file) for file in others])):
        if isinstance(header, str):
            skipped.append((file, header))
        else:
            series.setdefault(header.series, []).append((file, header))
    volumes = image_volumes(images)
    for uid, members in series.items():
        volume, repeated = series_volume(uid, members)
        volumes.append(volume)
        skipped += repeated
    return sorted(volumes), skipped


def series_volume(uid, members):
    """One DICOM series, a list of (file, Header), as (Volume, [(file, reason)]): sorted, each instance used once."""
    first, skipped = {}, []
    for file, header in members:
        if header.instance in first:
            skipped.append((file, f"same SOPInstanceUID as {first[header.instance]}"))
        else:
            first[header.instance] = file
    kept = [(file, header) for file, header in members if first[header.instance] == file]
    located = all(header.position is not None for _, header in kept)
    kept.sort(key=lambda m: (m[1].position if located else 0, m[1].number, m[0]))
    positions = [f"{header.position:.4f}" if located else "" for _, header in kept]
    return Volume(uid, [file for file, _ in kept], positions), skipped


def image_volumes(files):
    """PNG and JPEG files as Volumes: a folder each, or a `<volume>_` prefix each where a folder holds several."""
    folders = {}
    for file in files:
        folders.setdefault(Path(file).parent.as_posix(), []).append(file)
    volumes = {}
    for folder, members in folders.items():
        prefixes = [re.fullmatch(r"(.+)_\d+", Path(file).stem) for file in members]
        flat = all(prefixes) and (len({p[1] for p in prefixes}) > 1 or folder == ".")
        for file, prefix in zip(members, prefixes):
            name = (Path(folder) / prefix[1]).as_posix() if flat else folder
            volumes.setdefault(name, []).append(file)
    return [image_volume(name, members) for name, members in volumes.items()]


def image_volume(name, files):
    def number(file):
        numbers = re.findall(r"\d+", Path(file).stem)
        return int(numbers[-1]) if numbers else None

    files = sorted(files, key=lambda file: (number(file) is None, number(file) or 0, file))
    return Volume(name, files, ["" if number(file) is None else str(number(file)) for file in files])


def read_header(path):
    """The Header of a DICOM CT slice, or the reason (str) why the file is not one."""
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=HEADER_TAGS)
        check_is_slice(dataset)
        return Header(
            str(dataset.SeriesInstanceUID),
            str(dataset.get("SOPInstanceUID", path)),
            position_along_normal(dataset),
            float(dataset.get("InstanceNumber") or 0),
        )
    except Exception as error:  # whatever a broken file raises is its reason
        return reason(error)


def check_is_slice(dataset):
    """Raise Unusable unless the DICOM header is that of one CT slice with a rescale to HU."""
    modality = dataset.get("Modality") or "missing"
    if modality != "CT":
        raise Unusable(f"Modality is {modality}, not CT")
    if "SeriesInstanceUID" not in dataset:
        raise Unusable("SeriesInstanceUID is missing")
    if "LOCALIZER" in (dataset.get("ImageType") or []):
        raise Unusable("a localizer, not a slice")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise Unusable("a multi-frame image, not a slice: split it into single-frame files")
    if dataset.get("PhotometricInterpretation", "MONOCHROME2") != "MONOCHROME2":
        raise Unusable(f"PhotometricInterpretation is {dataset.PhotometricInterpretation}, not MONOCHROME2")
    for tag in ("RescaleSlope", "RescaleIntercept"):
        if dataset.get(tag) is None:
            raise Unusable(f"{tag} is missing, so the values cannot be brought to HU")
    if not (np.isfinite(float(dataset.RescaleIntercept)) and 0 < float(dataset.RescaleSlope) < np.inf):
        raise Unusable(f"rescale {dataset.RescaleSlope} x + {dataset.RescaleIntercept} does not give HU")


def position_along_normal(dataset):
    """mm: ImagePositionPatient projected on the normal of ImageOrientationPatient; None where either is missing."""
    corner, axes = dataset.get("ImagePositionPatient"), dataset.get("ImageOrientationPatient")
    if not corner or not axes:
        return None
    axes = np.asarray(axes, float)
    return float(np.dot(np.asarray(corner, float), np.cross(axes[:3], axes[3:])))


def read_slice(path, window=None):
    """Read a DICOM, PNG or JPEG file as an 8-bit grey slice, uint8 [height, width]; raises Unusable with a reason."""
    try:
        if Path(path).suffix.lower() in IMAGE_SUFFIXES:
            if window is not None:
                raise Unusable("--window needs HU, which a PNG or JPEG does not hold")
            with Image.open(path) as image:
                return scale_to_uint8(grey_values(image), window)
        dataset = pydicom.dcmread(path)
        check_is_slice(dataset)
        return scale_to_uint8(stored_to_hu(dataset), window)
    except Exception as error:
        raise Unusable(reason(error)) from error


def grey_values(image):
    """Pillow image -> grey values, [height, width]. 16-bit grey keeps its 16 bits; colour goes through luma."""
    return np.asarray(image if image.mode in ("L", "I", "F") or image.mode.startswith("I;16") else image.convert("L"))


def stored_to_hu(dataset):
    """Stored values of a DICOM slice -> HU, float64 [height, width].

    Padding outside the field of view (PixelPaddingValue or its range, or stored values <= -2000) counts as air.
    The official code sets -2000 to a stored 0, which is air at the usual intercepts of -1000 and -1024; at other
    intercepts (GE head scans store HU with an intercept of 0) a stored 0 would be water, so it is -1000 HU there.
    """
    stored = dataset.pixel_array
    if stored.ndim != 2:
        raise Unusable(f"pixel data has {stored.ndim} dimensions, not 2")
    stored = stored.astype(np.int32)
    intercept = float(dataset.RescaleIntercept)
    hu = stored * float(dataset.RescaleSlope) + intercept
    padding = stored <= PAINTED_PADDING
    if dataset.get("PixelPaddingValue") is not None:
        limits = [dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit") or dataset.PixelPaddingValue]
        if dataset.PixelRepresentation == 1:  # some scanners write -2000 as the unsigned 63536
            limits = [limit - 65536 if limit > 32767 else limit for limit in limits]
        padding |= (stored >= min(limits)) & (stored <= max(limits))
    hu[padding] = min(intercept, AIR_HU)
    return hu


def scale_to_uint8(values, window=None):
    """Values [height, width] -> uint8 of the same shape, rounded (paper: min-max of each slice, no window).

    window: (center, width) in HU clips to that window instead, the usual CT display, as an ablation.
    A constant slice becomes 0.
    """
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise Unusable("holds values that are not finite")
    if window is None:
        low, high = values.min(), values.max()
    else:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    if low == high:
        return np.zeros(values.shape, np.uint8)
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def reason(error):
    """An exception as one line of words for skipped.csv."""
    if isinstance(error, Unusable):
        return str(error)
    if isinstance(error, pydicom.errors.InvalidDicomError):
        return "neither DICOM nor PNG or JPEG"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
