"""Which files make a volume, and their order along z. Knows headers and names, not pixels."""

import os
import re
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.ct import IMAGE_SUFFIXES
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
    found = []
    seen = set()

    def add(path):
        stat = os.stat(path) if os.path.exists(path) else os.lstat(path)
        found.append((Path(path).relative_to(data).as_posix(), stat.st_size, stat.st_mtime_ns))

    def add_unopened(error):
        add(error.filename)

    for folder, folders, names in os.walk(data, followlinks=True, onerror=add_unopened):
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

    data: folder. files: paths relative to it. map_files: a parallel `map` that keeps the order.
    Returns (volumes sorted by name, skipped as a list of (file, reason), warnings as a list of
    (volume, text)). DICOM is grouped by SeriesInstanceUID and ordered by the position along the
    slice normal, or, where that is not known of every slice, by InstanceNumber and name. Images
    are grouped by folder, or by the name before the last `_` where one folder holds several such
    names (the official code's flat layout), and ordered by the number in the name.
    """
    images = [file for file in files if is_image(file)]
    others = [file for file in files if not is_image(file)]
    series = {}
    skipped = []
    warnings = []
    headers = map_files(read_header, [os.path.join(data, file) for file in others])
    for file, header in zip(others, headers):
        if isinstance(header, str):
            skipped.append((file, header))
        else:
            series.setdefault(header.series, []).append((file, header))
    volumes = image_volumes(images)
    for uid, members in series.items():
        volume, left_out, texts = series_volume(uid, members)
        volumes.append(volume)
        skipped += left_out.items()
        warnings += [(uid, text) for text in texts]
    return sorted(volumes, key=lambda volume: volume.name), skipped, sorted(warnings)


def is_image(file):
    return Path(file).suffix.lower() in IMAGE_SUFFIXES


def series_volume(uid, members):
    """One DICOM series, a list of (file, Header), in z order, each slice once.

    Returns (Volume, {file left out: reason}, warnings).
    """
    left_out = {}
    for check in (repeated_instances, odd_orientations, odd_sizes):
        left_out |= check(members)
        members = [member for member in members if member[0] not in left_out]

    problem = position_problem([header.position for _, header in members])
    if problem:
        members.sort(key=by_number)
        warnings = [f"{problem}: ordered by {what_orders(members)}"]
        positions = [""] * len(members)
    else:
        members.sort(key=by_position)
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
    oriented = [member for member in members if member[1].axes]
    odd = odd_ones(oriented, same_axes)
    return {file: "orientation unlike most of its series" for file, _ in odd}


def odd_sizes(members):
    """{file: reason} of the slices whose size is unlike that of most of their series."""
    return {
        file: f"{header.rows} x {header.columns} pixels, unlike most of its series"
        for file, header in odd_ones(members, same_size)
    }


def odd_ones(members, similar):
    """The (file, Header)s outside the largest group; similar(a, b) compares two Headers."""
    groups = []
    for member in members:
        group = next((group for group in groups if similar(group[0][1], member[1])), None)
        if group is None:
            groups.append([member])
        else:
            group.append(member)
    groups.sort(key=len, reverse=True)
    return [member for group in groups[1:] for member in group]


def same_axes(a, b):
    return max(abs(x - y) for x, y in zip(a.axes, b.axes)) <= SAME_AXES


def same_size(a, b):
    return (a.rows, a.columns) == (b.rows, b.columns)


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
    return member[1].position, *by_number(member)


def what_orders(members):
    """What tells the slices apart where they have no positions: their numbers, or their names."""
    numbers = {header.number for _, header in members} - {None}
    if len(numbers) == len(members):
        return "InstanceNumber"
    return "file name, as InstanceNumber is missing or repeated"


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
    distances = np.diff(positions)
    if len(distances) < 2:
        return []
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
    """Images ordered by the last number in their names, those without one last."""
    numbered = sorted((image_number(file), file) for file in files)
    files = [file for _, file in numbered]
    positions = ["" if number == inf else str(number) for number, _ in numbered]
    return Volume(name, files, positions, [None] * len(files))


def image_number(file):
    numbers = re.findall(r"\d+", Path(file).stem)
    return int(numbers[-1]) if numbers else inf
