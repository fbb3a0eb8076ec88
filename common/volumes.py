"""Which files make a volume, and their order along z. Knows headers and names, not pixels."""

import os
import re
from collections import Counter
from decimal import Decimal
from itertools import chain, count, zip_longest
from typing import NamedTuple

import numpy as np

from common.ct import is_image
from common.dicom import ACQUISITION, read_header

SAME_AXES = 0.05  # difference of direction cosines
DIGITS = 3  # of a position in mm, in which two slices must differ
GAP = 1.5  # times the usual distance of two slices
OVERLAP = 1.2  # times the whole stretch of z are acquisitions of one place together
LONE = 3  # series of one slice in a study: no chance
# what most slices of a series have in common: key(Header), tolerance, and what it is
ODD = (
    (lambda header: header.axes, SAME_AXES, "orientation"),
    (lambda header: (header.rows, header.columns), 0, "{} x {} pixels,"),
)
# in a name: 7, 2.5, but not 1.2.840, and z_-10, but neither PAT-10 nor "slice -10"
NUMBER = re.compile(r"((?<![^\W_]|\s)-)?((?<!\d\.)\d+\.\d+(?![.\d])|\d+)")


class Volume(NamedTuple):
    name: str  # SeriesInstanceUID (and a number), or folder (and name) of images; no patient's name
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
    """Group files into volumes in z order, each one patient's one acquisition.

    data: folder. files: paths relative to it. map: perhaps a parallel one. Returns (volumes
    sorted by name, skipped as a list of (file, reason), warnings as a list of (volume, text)).
    """
    notes = [file for file in files if os.path.basename(file).startswith("._")]
    images = [file for file in files if is_image(file) and file not in notes]
    others = [file for file in files if not is_image(file) and file not in notes]
    headers = map(read_header, [os.path.join(data, file) for file in others])
    read = [*zip(others, headers, strict=True)]
    skipped = [(file, reason) for file, reason in read if isinstance(reason, str)]
    skipped += [(file, "what macOS notes on another file") for file in notes]
    volumes, warnings = image_volumes(images)
    slices = [member for member in read if not isinstance(member[1], str)]
    series = grouped(slices, lambda header: header.series)
    for members in series:
        volumes += series_volumes(members, skipped, warnings)
    lone = sum((members for members in series if len(members) == 1), [])
    for study in grouped(lone, lambda header: header.patient):
        if len(study) >= LONE:
            text = f"{len(study)} series of one slice: perhaps one scan, but each is a volume"
            warnings.append(in_folder(study, text))
    volumes.sort(key=lambda volume: volume.name)
    taken = set()
    for i, volume in enumerate(volumes):
        names = chain([volume.name], (f"{volume.name} {n}" for n in count(2)))
        volumes[i] = volume._replace(name=next(name for name in names if name not in taken))
        taken.add(volumes[i].name)
    return volumes, skipped, sorted(warnings)


def grouped(members, key):
    """Lists of the (file, Header)s of equal key(Header), in the order of their first ones."""
    groups = {}
    for member in members:
        groups.setdefault(key(member[1]), []).append(member)
    return [*groups.values()]


def parent(file, _=None):
    return os.path.dirname(file) or "."


def in_folder(members, text):
    """A warning on a series' (file, Header)s: (SeriesInstanceUID, text with their folder)."""
    return members[0][1].series, f"in {folder_of(file for file, _ in members)}: {text}"


def folder_of(files):
    return os.path.commonpath([f"DATA/{os.path.dirname(file)}" for file in files])


def series_volumes(members, skipped, warnings):
    """The Volumes of a series' (file, Header)s; adds to skipped and to warnings."""
    volumes, texts = [], []
    copies = grouped(
        members, lambda h: (h.instance, h.patient, h.position, h.number, h.acquisition)
    )
    for (original, _), *others in copies:
        skipped += [(file, f"same SOPInstanceUID as another: {original}") for file, _ in others]
    members = [first for first, *_ in copies]
    instances = len({header.instance for _, header in members})
    if instances < len(members):
        text = f"{len(members)} slices have {instances} different SOPInstanceUIDs"
        texts.append(f"{text}: all are kept, since their places differ")
    patients = grouped(members, lambda header: header.patient)
    if len(patients) > 1:
        texts.append(f"{len(patients)} patients or studies have one series UID: each is a volume")
    for of_patient in patients:
        for key, tolerance, what in ODD:
            unlike = odd(of_patient, key, tolerance, what)
            skipped += unlike.items()
            of_patient = [member for member in of_patient if member[0] not in unlike]
        of_patient.sort(key=lambda member: (member[1].number, member[0]))
        parts, told_by = acquisitions(of_patient)
        if len(parts) > 1:
            texts.append(f"several scans of one place: {len(parts)} volumes, by {told_by}")
        volumes += [in_z_order(part, texts) for part in parts]
    warnings += [in_folder(members, text) for text in texts]
    return volumes


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


def acquisitions(members):
    """([(file, Header)s of an acquisition], what tells them apart) of one patient's series.

    Acquisitions of one place, such as time points, are told apart by the first element of
    ACQUISITION that does so, or the second slice at each position makes a second volume ...
    """
    if not positions_known(members):
        return [members], ""
    for i, keyword in enumerate(ACQUISITION):
        parts = grouped(members, lambda header, i=i: header.acquisition[i])
        overlap = sum(map(extent, parts)) > OVERLAP * extent(members)
        if overlap and all(len(part) > 1 == len(by_turns(part)) for part in parts):
            return parts, keyword
    return by_turns(members), "InstanceNumber, then by name"


def extent(members):
    """mm along z; None where positions are missing."""
    places = [header.position for _, header in members]
    return None if None in places else np.ptp(np.round(places, DIGITS))


def positions_known(members):
    return extent(members) is not None and (len(members) < 3 or extent(members) > 0)


def by_turns(members):
    """Lists of the first (file, Header) at each position, of the second ones ..."""
    places = grouped(members, lambda header: round(header.position, DIGITS))
    turns = zip_longest(*places)
    return [[member for member in turn if member is not None] for turn in turns]


def in_z_order(members, texts):
    """The Volume of an acquisition's (file, Header)s, sorted by number and name; adds to texts."""
    numbers = len({header.number for _, header in members})
    if 1 < numbers < len(members):
        text = f"{len(members)} slices have {numbers} different InstanceNumbers"
        texts.append(f"{text}: perhaps they are several scans")
    if positions_known(members):
        members = sorted(members, key=lambda member: member[1].position)
        texts += gaps([header.position for _, header in members])
        positions = [f"{header.position:.4f}" for _, header in members]
    else:
        missing = sum(header.position is None for _, header in members)
        text = f"positions are missing ({missing} of {len(members)}) or all the same"
        texts.append(f"{text}: ordered by InstanceNumber, then by name")
        positions = [""] * len(members)
    files, headers = zip(*members, strict=True)
    return Volume(headers[0].series, list(files), positions, list(headers))


def gaps(positions):
    """A warning, in a list, if some of the sorted positions, in mm, lie much wider than most."""
    distances = np.diff(positions)
    usual = np.median(distances) if len(distances) else 0
    wide = (distances > GAP * usual).sum()
    text = (
        f"gaps along z: {wide}, the widest {distances.max(initial=0):.1f} mm where {usual:.1f} mm"
    )
    return [f"{text} is usual: slices may be missing"] if wide and len(distances) > 1 else []


def image_volumes(files):
    """(Volumes, warnings) of PNG and JPEG files.

    A folder is a volume; where most of its names, less their last number, are those of several
    files, each is one, as in the official code's flat layout, `<volume>_<number>`.
    """
    folders, volumes, ordered, warnings = {}, {}, [], []
    for file in files:
        folders.setdefault(parent(file), []).append(file)
    for folder, members in folders.items():
        names = [os.path.normpath(f"{folder}/{name_and_numbers(file)[0]}") for file in members]
        sizes = Counter(names)
        single = [*sizes.values()].count(1)
        official = all(re.fullmatch(r".+_\d+\.\w+", os.path.basename(file)) for file in members)
        by_name = single < len(members) / 2 if len(sizes) > 1 else official and folder == "."
        doubtful = by_name != official or (not by_name and len(sizes) - single > 1)
        if doubtful and len(sizes) > 1:
            what = f"{len(sizes)} volumes" if by_name else f"1 volume, not {len(sizes)}"
            text = f"{what} by file name ({', '.join([*sizes][:3])} ...), {single} of one file"
            warnings.append((folder, f"in {folder_of(members)}: {text}: right?"))
        for file, name in zip(members, names, strict=True):
            volumes.setdefault((folder, name if by_name else folder), []).append(file)
    for (_, name), members in volumes.items():
        in_order, numbers, text = in_number_order(members)
        ordered.append(Volume(name, in_order, numbers, [None] * len(members)))
        warnings += [(name, text)] if text else []
    return ordered, warnings


def name_and_numbers(file):
    """pat1_slice007.png -> (pat1_slice, [1, 7]), PAT_120_85_CT.png -> (PAT_120_CT, [120, 85])."""
    stem = re.sub(r"\.[A-Za-z]\w*$", "", os.path.basename(file))
    found = [*NUMBER.finditer(stem)]
    start, end = found[-1].span() if found else (len(stem), len(stem))
    return stem[:start].rstrip("-_ .") + stem[end:], [Decimal(match.group()) for match in found]


def in_number_order(files):
    """(files by last number, or by all where not all differ; the last ones as text; a warning)."""
    found = {file: name_and_numbers(file)[1] for file in files}
    by_all = sorted(files, key=lambda file: (not found[file], found[file], file))
    lasts = {file: found[file][-1:] for file in by_all}
    different = len({last for [last] in filter(None, lasts.values())})
    in_order, text = sorted(by_all, key=lasts.get), ""
    if different < len(files) > 1:
        in_order = by_all
        text = f"{different} last number(s) in {len(files)} names: ordered by all, then by name"
    elif in_order != by_all:
        text = "of several numbers in the names, the last one orders them"
    return in_order, ["".join(map(str, lasts[file])) for file in in_order], text
