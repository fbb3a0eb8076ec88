"""Which files make a volume, and their order along z. Knows headers and names; knows nothing of pixels."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.ct import IMAGE_SUFFIXES
from common.dicom import read_header

SAME_AXES, SAME_PLACE, GAP = (
    0.05,
    0.001,
    1.5,
)  # difference of cosines; mm; times the usual distance of two slices


class Volume(NamedTuple):
    name: str  # SeriesInstanceUID, or the folder (or name prefix) of an image stack; never a patient's name
    files: list[str]  # relative to the data folder, in z order
    positions: list[
        str
    ]  # mm along the slice normal, or the number in an image's name; "" where unknown
    headers: list  # a Header each, or None for an image


def list_files(data):
    """All files below data as (path relative to data, bytes, modification time in ns), sorted by path.

    Linked folders are followed, each real folder once; a folder that cannot be opened is listed as if it were a file.
    """
    found, seen = [], set()

    def add(path):
        stat = os.stat(path) if os.path.exists(path) else os.lstat(path)
        found.append((Path(path).relative_to(data).as_posix(), stat.st_size, stat.st_mtime_ns))

    for folder, folders, names in os.walk(
        data, followlinks=True, onerror=lambda error: add(error.filename)
    ):
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
    Returns (volumes sorted by name, skipped as a list of (file, reason), warnings as a list of (volume, text)).
    DICOM is grouped by SeriesInstanceUID and ordered by the position along the slice normal, or, where that is not
    known of every slice, by InstanceNumber and name. Images are grouped by folder, or by the name before the last `_` where one
    folder holds several such names (the official code's flat layout), and ordered by the number in the name.
    """
    images = [file for file in files if Path(file).suffix.lower() in IMAGE_SUFFIXES]
    others = [file for file in files if Path(file).suffix.lower() not in IMAGE_SUFFIXES]
    series, skipped, warnings = {}, [], []
    for file, header in zip(others, map_files(read_header, [Path(data, file) for file in others])):
        if isinstance(header, str):
            skipped.append((file, header))
        else:
            series.setdefault(header.series, []).append((file, header))
    volumes = image_volumes(images)
    for uid, members in series.items():
        volume, left_out, found = series_volume(uid, members)
        volumes.append(volume)
        skipped += left_out
        warnings += [(uid, text) for text in found]
    return sorted(volumes, key=lambda volume: volume.name), skipped, sorted(warnings)


def series_volume(uid, members):
    """One DICOM series, a list of (file, Header), as (Volume, [(file, reason)], [warning]): sorted, each slice once."""
    first, reasons = {}, {}
    for file, header in members:
        if first.setdefault(header.instance, file) != file:
            reasons[file] = f"same SOPInstanceUID as {first[header.instance]}"
    kept = [member for member in members if member[0] not in reasons]
    for file, _ in odd_ones([member for member in kept if member[1].axes], same_axes):
        reasons[file] = "orientation unlike most of its series"
    kept = [member for member in kept if member[0] not in reasons]
    for file, header in odd_ones(kept, same_size):
        reasons[file] = f"{header.rows} x {header.columns} pixels, unlike most of its series"
    kept = [member for member in kept if member[0] not in reasons]

    places = [header.position for _, header in kept]
    missing = places.count(None)
    same = not missing and len(kept) > 2 and max(places) - min(places) < SAME_PLACE
    located = not missing and not same
    kept.sort(
        key=lambda m: (m[1].position if located else 0, m[1].number is None, m[1].number or 0, m[0])
    )
    if located:
        kept, repeated = one_a_place(kept)
        reasons |= repeated
        warnings = gaps([header.position for _, header in kept])
    else:
        what = (
            f"all {len(kept)} slices have the same position"
            if same
            else f"{missing} of {len(kept)} slices have no position"
        )
        numbered = len({header.number for _, header in kept} - {None}) == len(kept)
        warnings = [
            f"{what}: ordered by {'InstanceNumber' if numbered else 'file name, as InstanceNumber is missing or repeated'}"
        ]
    positions = [f"{header.position:.4f}" if located else "" for _, header in kept]
    return (
        Volume(uid, [file for file, _ in kept], positions, [header for _, header in kept]),
        list(reasons.items()),
        warnings,
    )


def odd_ones(members, alike):
    """The (file, Header)s unlike most of the others; alike(a, b) compares two Headers."""
    groups = []
    for member in members:
        for group in groups:
            if alike(group[0][1], member[1]):
                group.append(member)
                break
        else:
            groups.append([member])
    return [member for group in sorted(groups, key=len, reverse=True)[1:] for member in group]


def same_axes(a, b):
    return max(abs(x - y) for x, y in zip(a.axes, b.axes)) <= SAME_AXES


def same_size(a, b):
    return (a.rows, a.columns) == (b.rows, b.columns)


def one_a_place(members):
    """Of (file, Header)s in z order, the first of each position, and {file: reason} of the others."""
    kept, repeated = members[:1], {}
    for file, header in members[1:]:
        if header.position - kept[-1][1].position < SAME_PLACE:
            repeated[file] = f"same position as {kept[-1][0]}"
        else:
            kept.append((file, header))
    return kept, repeated


def gaps(positions):
    """A warning, in a list, if some of the sorted positions, in mm, lie much further apart than most."""
    distances = np.diff(positions)
    if len(distances) < 2:
        return []
    usual = np.median(distances)
    wide = int((distances > GAP * usual).sum())
    found = f"{wide} gap{'s' * (wide > 1)} along z, the widest {distances.max():.1f} mm where {usual:.1f} mm is usual"
    return [f"{found}: slices may be missing"] if wide else []


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
    return Volume(
        name,
        files,
        ["" if number(file) is None else str(number(file)) for file in files],
        [None] * len(files),
    )
