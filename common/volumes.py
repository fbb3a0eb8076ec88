"""Which files make a volume, and their order along z. Knows headers and names, not pixels."""

import os
import re
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.ct import is_image
from common.dicom import read_header

SAME_AXES = 0.05  # difference of direction cosines
DIGITS = 3  # of a position in mm, in which two slices must differ
GAP = 1.5  # times the usual distance of two slices


class Volume(NamedTuple):
    name: str  # SeriesInstanceUID, or folder (or name prefix) of images; never a patient's name
    files: list[str]  # relative to the data folder, in z order
    positions: list[str]  # mm along the slice normal, or an image's number; "" where unknown
    headers: list  # a Header each, or None for an image


def list_files(data):
    """All files below data as (path relative to data, bytes, modification time in ns), sorted.

    Linked folders are followed, each real folder once. A folder that cannot be opened is listed
    as if it were a file, so that it ends up among the skipped ones.
    """
    paths = []
    seen = set()
    walk = os.walk(data, followlinks=True, onerror=lambda error: paths.append(error.filename))
    for folder, folders, names in walk:
        folders.sort()
        if os.path.realpath(folder) in seen:
            folders[:] = names[:] = []
        seen.add(os.path.realpath(folder))
        paths += [os.path.join(folder, name) for name in names]
    files = []
    for path in paths:
        stat = os.stat(path) if os.path.exists(path) else os.lstat(path)
        files.append((os.path.relpath(path, data), stat.st_size, stat.st_mtime_ns))
    return sorted(files)


def find_volumes(data, files, map=map):
    """Group files into volumes in z order.

    data: folder. files: paths relative to it. map: perhaps a parallel one. Returns (volumes
    sorted by name, skipped as a list of (file, reason), warnings as a list of (volume, text)).
    """
    volumes = image_volumes([file for file in files if is_image(file)])
    others = [file for file in files if not is_image(file)]
    headers = map(read_header, [os.path.join(data, file) for file in others])
    series, skipped, warnings = {}, [], []
    for file, header in zip(others, headers, strict=True):
        if isinstance(header, str):
            skipped.append((file, header))
        else:
            series.setdefault(header.series, []).append((file, header))
    for uid, members in series.items():
        volume, left_out, texts = series_volume(uid, members)
        volumes.append(volume)
        skipped += left_out.items()
        warnings += [(uid, text) for text in texts]
    return sorted(volumes, key=lambda volume: volume.name), skipped, sorted(warnings)


def series_volume(uid, members):
    """(Volume in z order, {file left out: reason}, warnings) of a series' (file, Header)s.

    Ordered by the position along the slice normal, or, where that is not known of every slice, by
    InstanceNumber and name.
    """
    left_out = {}

    def leave_out(reasons):
        left_out.update(reasons)
        members[:] = [member for member in members if member[0] not in left_out]

    leave_out(repeated(members, lambda header: header.instance, "SOPInstanceUID"))
    leave_out(odd(members, lambda header: header.axes, SAME_AXES, "orientation"))
    leave_out(odd(members, lambda header: (header.rows, header.columns), 0, "{} x {} pixels,"))
    members.sort(key=lambda member: (member[1].number, member[0]))
    places = [header.position for _, header in members]
    missing = places.count(None)
    if missing or (len(places) > 2 and np.ptp(np.round(places, DIGITS)) == 0):
        lack = f"positions are missing ({missing} of {len(places)}) or all the same"
        warnings = [f"{lack}: ordered by InstanceNumber, then by name"]
        positions = [""] * len(members)
    else:
        members.sort(key=lambda member: member[1].position)  # equal ones stay ordered by number
        leave_out(repeated(members, lambda header: round(header.position, DIGITS), "position"))
        warnings = gaps([header.position for _, header in members])
        positions = [f"{header.position:.4f}" for _, header in members]
    files, headers = zip(*members, strict=True)
    return Volume(uid, list(files), positions, list(headers)), left_out, warnings


def repeated(members, key, what):
    """{file: reason} of the (file, Header)s whose key(Header) an earlier one has."""
    first = {}
    reasons = {}
    for file, header in members:
        if first.setdefault(key(header), file) != file:
            reasons[file] = f"same {what} as another: {first[key(header)]}"
    return reasons


def odd(members, key, tolerance, what):
    """{file: reason} of the (file, Header)s unlike most: outside the largest group of equals.

    key(Header): numbers, equal within the tolerance, or None where they are not known.
    """
    groups = {}  # by their first vector
    for file, header in members:
        vector = key(header)
        if vector is not None:
            alike = (first for first in groups if np.ptp([first, vector], 0).max() <= tolerance)
            groups.setdefault(next(alike, tuple(vector)), []).append((file, vector))
    small = sorted(groups.values(), key=len, reverse=True)[1:]
    reason = f"{what} unlike most of its series"
    return {file: reason.format(*vector) for group in small for file, vector in group}


def gaps(positions):
    """A warning, in a list, if some of the sorted positions, in mm, lie much wider than most."""
    distances = np.diff(positions)
    usual = np.median(distances) if len(distances) else 0
    wide = (distances > GAP * usual).sum()
    if len(distances) < 2 or not wide:
        return []
    widest = f"the widest {distances.max():.1f} mm where {usual:.1f} mm is usual"
    return [f"gaps along z: {wide}, {widest}: slices may be missing"]


def image_volumes(files):
    """PNG and JPEG files as Volumes, ordered by the last number in the name.

    A folder is a volume; where all its names are `<volume>_<number>`, and it holds several volumes
    or is DATA itself, the name before the last `_` is one (the official code's flat layout).
    """
    folders = {}
    for file in sorted(files, key=number_in_name):
        folders.setdefault(Path(file).parent.as_posix(), []).append(file)
    volumes = {}
    for folder, members in folders.items():
        prefixes = [re.fullmatch(r"(.+)_\d+", Path(file).stem) for file in members]
        flat = all(prefixes) and (len({p[1] for p in prefixes}) > 1 or folder == ".")
        for file, prefix in zip(members, prefixes, strict=True):
            name = (Path(folder) / prefix[1]).as_posix() if flat else folder
            volumes.setdefault(name, []).append(file)
    return [
        Volume(name, members, [image_number(file) for file in members], [None] * len(members))
        for name, members in volumes.items()
    ]


def image_number(file):
    """The last number in an image's name, without leading zeros; "" where it has none."""
    numbers = re.findall(r"\d+", Path(file).stem)
    return str(int(numbers[-1])) if numbers else ""


def number_in_name(file):
    number = image_number(file)
    return int(number) if number else inf, file
