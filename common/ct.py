"""CT slices: find the volumes in a folder, order them along z, bring them to HU, scale to 8 bit.

Knows DICOM (through common/dicom.py), PNG and JPEG; knows nothing of strategies or training.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.dicom import Unusable, read_header, read_stored, reason

AIR_HU = -1000.0  # what padding outside the field of view becomes, see stored_to_hu
PAINTED_PADDING = -2000  # the scanner's fill value outside the field of view (official code)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}


class Volume(NamedTuple):
    name: str  # SeriesInstanceUID, or the folder (or name prefix) of an image stack; never a patient's name
    files: list[str]  # relative to the data folder, in z order
    positions: list[str]  # mm along the slice normal, or the number in an image's name; "" where unknown
    headers: list  # a Header each, or None for an image


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
    return sorted(volumes, key=lambda volume: volume.name), skipped


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
    return Volume(uid, [file for file, _ in kept], positions, [header for _, header in kept]), skipped


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
    return Volume(name, files, ["" if number(file) is None else str(number(file)) for file in files], [None] * len(files))


def read_slice(path, window=None, header=None):
    """Read a DICOM, PNG or JPEG file as an 8-bit grey slice, uint8 [height, width]; raises Unusable with a reason.

    header: read_header's, where it is at hand.
    """
    try:
        if Path(path).suffix.lower() in IMAGE_SUFFIXES:
            if window is not None:
                raise Unusable("--window needs HU, which a PNG or JPEG does not hold")
            with Image.open(path) as image:
                return scale_to_uint8(grey_values(image), window)
        header = header or read_header(path)
        if isinstance(header, str):
            raise Unusable(header)
        return stored_to_uint8(read_stored(path, header.native), header, window)
    except Exception as error:
        raise Unusable(reason(error)) from error


def grey_values(image):
    """Pillow image -> grey values, [height, width]. 16-bit grey keeps its 16 bits; colour goes through luma."""
    return np.asarray(image if image.mode in ("L", "I", "F") or image.mode.startswith("I;16") else image.convert("L"))


def stored_to_uint8(stored, header, window=None):
    """scale_to_uint8(stored_to_hu(...)), but by a table: both depend on the stored value alone, and few values occur."""
    if stored.dtype not in (np.int16, np.uint16):
        return scale_to_uint8(stored_to_hu(stored, header), window)
    low, high = int(stored.min()), int(stored.max())
    index = stored.view(np.uint16) - np.uint16(low & 0xFFFF)  # wraps around where stored - low would overflow
    values = np.arange(low, high + 1)
    if is_padding(values, header).any():  # which changes the smallest or largest HU, so only values that occur may count
        values = np.flatnonzero(np.bincount(index.ravel())) + low
    table = np.zeros(high - low + 1, np.uint8)
    table[values - low] = scale_to_uint8(stored_to_hu(values, header), window)
    return table.take(index, mode="clip")


def stored_to_hu(stored, header):
    """Stored values of a DICOM slice, integers of any shape, and its Header -> HU, float64.

    Padding outside the field of view (PixelPaddingValue or its range, or stored values <= -2000) counts as air.
    The official code sets -2000 to a stored 0, which is air at the usual intercepts of -1000 and -1024; at other
    intercepts (GE head scans store HU with an intercept of 0) a stored 0 would be water, so it is -1000 HU there.
    """
    hu = stored * header.slope + header.intercept
    hu[is_padding(stored, header)] = min(header.intercept, AIR_HU)
    return hu


def is_padding(stored, header):
    """Bool mask: which stored values lie outside the field of view."""
    padding = stored <= PAINTED_PADDING
    if header.padding:
        padding |= (stored >= header.padding[0]) & (stored <= header.padding[1])
    return padding


def scale_to_uint8(values, window=None):
    """Values [height, width] -> uint8 of the same shape, rounded (paper: min-max of each slice, no window).

    window: (center, width) in HU clips to that window instead, the usual CT display, as an ablation.
    A constant slice becomes 0.
    """
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():  # a NaN anywhere makes both NaN
        raise Unusable("holds values that are not finite")
    if window is not None:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
        values = np.clip(values, low, high)
    if low == high:
        return np.zeros(values.shape, np.uint8)
    return np.rint((values - low) / (high - low) * 255).astype(np.uint8)
