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
SAME_POSITION = 0.001  # mm
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

    def add_unopened(error):
        paths.append(error.filename)

    for folder, folders, names in os.walk(data, followlinks=True, onerror=add_unopened):
        folders.sort()
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        paths += [os.path.join(folder, name) for name in names]
    found = []
    for path in paths:
        stat = os.stat(path) if os.path.exists(path) else os.lstat(path)
        found.append((Path(path).relative_to(data).as_posix(), stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def read_headers(paths):
    return [read_header(path) for path in paths]


def find_volumes(data, files, read_headers=read_headers):
    """Group files into volumes in z order.

    data: folder. files: paths relative to it. read_headers: a parallel one, in the same order.
    Returns (volumes sorted by name, skipped as a list of (file, reason), warnings as a list of
    (volume, text)). DICOM is grouped by SeriesInstanceUID and ordered by the position along the
    slice normal, or, where that is not known of every slice, by InstanceNumber and name. Images
    are grouped by folder, or by the name before the last `_` where one folder holds several such
    names (the official code's flat layout), and ordered by the number in the name.
    """
    volumes = image_volumes([file for file in files if is_image(file)])
    others = [file for file in files if not is_image(file)]
    headers = read_headers([os.path.join(data, file) for file in others])
    series = {}
    skipped = []
    warnings = []
    for file, header in zip(others, headers):
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
    """One DICOM series, a list of (file, Header), in z order, each slice once.

    Returns (Volume, {file left out: reason}, warnings).
    """
    left_out = {}
    for check in (repeated_instances, odd_orientations, odd_sizes):
        left_out |= check(members)
        members = [member for member in members if member[0] not in left_out]

    members.sort(key=by_number)
    problem = position_problem([header.position for _, header in members])
    if problem:
        order = "InstanceNumber"
        numbers = {header.number for _, header in members} - {None}
        if len(numbers) < len(members):
            order = "file name, as InstanceNumber is missing or repeated"
        warnings = [f"{problem}: ordered by {order}"]
        positions = [""] * len(members)
    else:
        members.sort(key=by_position)  # among equal ones the order by number stays
        left_out |= repeated_positions(members)
        members = [member for member in members if member[0] not in left_out]
        warnings = gaps([header.position for _, header in members])
        positions = [f"{header.position:.4f}" for _, header in members]
    files = [file for file, _ in members]
    headers = [header for _, header in members]
    return Volume(uid, files, positions, headers), left_out, warnings


def repeated_instances(members):
    """{file: reason} of the slices that a series holds already."""
    first = {}
    reasons = {}
    for file, header in members:
        if header.instance in first:
            reasons[file] = f"same SOPInstanceUID as {first[header.instance]}"
        else:
            first[header.instance] = file
    return reasons


def odd_orientations(members):
    """{file: reason} of the slices, such as scouts, that lie unlike most of their series."""
    axes = {file: header.axes for file, header in members if header.axes}
    return {file: "orientation unlike most of its series" for file in odd_ones(axes, SAME_AXES)}


def odd_sizes(members):
    """{file: reason} of the slices whose size is unlike that of most of their series."""
    sizes = {file: (header.rows, header.columns) for file, header in members}
    return {
        file: f"{sizes[file][0]} x {sizes[file][1]} pixels, unlike most of its series"
        for file in odd_ones(sizes, 0)
    }


def odd_ones(vectors, tolerance):
    """The files outside the largest group of {file: vector}, equal within the tolerance."""
    groups = {}
    for file, vector in vectors.items():
        for first in groups:
            if max(abs(a - b) for a, b in zip(first, vector)) <= tolerance:
                groups[first].append(file)
                break
        else:
            groups[tuple(vector)] = [file]
    largest_first = sorted(groups.values(), key=len, reverse=True)
    return [file for group in largest_first[1:] for file in group]


def position_problem(positions):
    """Why positions, in mm or None, cannot order their slices; None where they can."""
    missing = positions.count(None)
    if missing:
        return f"{missing} of {len(positions)} slices have no position"
    if len(positions) > 2 and max(positions) - min(positions) < SAME_POSITION:
        return f"all {len(positions)} slices have the same position"
    return None


def by_number(member):
    """Sort key of a (file, Header): InstanceNumber, those without one last, then the name."""
    file, header = member
    return inf if header.number is None else header.number, file


def by_position(member):
    return member[1].position


def repeated_positions(members):
    """{file: reason} of the (file, Header)s, in z order, that lie where another one does."""
    reasons = {}
    last_file, last = members[0]
    for file, header in members[1:]:
        if header.position - last.position < SAME_POSITION:
            reasons[file] = f"same position as {last_file}"
        else:
            last_file, last = file, header
    return reasons


def gaps(positions):
    """A warning, in a list, if some of the sorted positions, in mm, lie much wider than most."""
    if len(positions) < 3:
        return []
    distances = np.diff(positions)
    usual = np.median(distances)
    wide = int((distances > GAP * usual).sum())
    if not wide:
        return []
    return [
        f"{wide} gap{'s' * (wide > 1)} along z, the widest {distances.max():.1f} mm "
        f"where {usual:.1f} mm is usual: slices may be missing"
    ]


def image_volumes(files):
    """PNG and JPEG files as Volumes: one a folder, or one a `<volume>_` where it holds several."""
    folders = {}
    for file in sorted(files, key=by_image_number):
        folders.setdefault(Path(file).parent.as_posix(), []).append(file)
    volumes = {}
    for folder, members in folders.items():
        prefixes = [re.fullmatch(r"(.+)_\d+", Path(file).stem) for file in members]
        flat = all(prefixes) and (len({p[1] for p in prefixes}) > 1 or folder == ".")
        for file, prefix in zip(members, prefixes):
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


def by_image_number(file):
    number = image_number(file)
    return int(number) if number else inf, file
