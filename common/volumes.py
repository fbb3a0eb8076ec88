"""Which files make a volume, and their order along z. Knows headers and names, not pixels."""

import os
import re
from decimal import Decimal
from functools import partial
from itertools import chain, count, zip_longest
from math import inf
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from common.ct import is_image
from common.dicom import ACQUISITION, read_header

SAME_AXES = 0.05  # difference of direction cosines
DIGITS = 2  # of a position in mm, in which two slices must differ
GAP = 1.5  # times the usual distance of two slices
OVERLAP = 1.2  # times the whole stretch of z is less than acquisitions of one place add up to
LONE = 3  # series of one slice, of one patient or in one folder, are hardly one scan each
# what most slices of a series have in common: in Header, tolerance, and what it is
ODD = (("axes", SAME_AXES, "orientation"), ("shape", 0, "{} x {} pixels,"))
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
    notes = {file for file in files if os.path.basename(file).startswith("._")}
    images = [file for file in files if is_image(file) and file not in notes]
    others = [file for file in files if not is_image(file) and file not in notes]
    read = [*zip(others, map(partial(read_header, data=data), others), strict=True)]
    skipped = [(file, reason) for file, reason in read if isinstance(reason, str)]
    skipped += [(file, "a macOS side file, no picture") for file in notes]
    volumes, warnings = image_volumes(images)
    slices = [header for _, header in read if not isinstance(header, str)]
    series = grouped(slices, attrgetter("series")).values()
    for members in series:
        volumes += series_volumes(members, skipped, warnings)
    lone = [members[0] for members in series if len(members) == 1]
    for alike in [*grouped(lone, attrgetter("patient")).values(), *grouped(lone, parent).values()]:
        if len(alike) >= LONE:
            text = f"{len(alike)} series of one slice: perhaps one scan, but each is a volume"
            warnings.append(in_folder(alike, f"{text}: give them one SeriesInstanceUID"))
    with_pictures = set(map(os.path.dirname, images))
    for folder, beside in grouped(slices, parent).items():
        if folder in with_pictures:
            warnings.append(in_folder(beside, "pictures beside DICOM: volumes of their own"))
    named = {}
    for volume in sorted(volumes, key=attrgetter("name")):
        names = chain([volume.name], (f"{volume.name} {n}" for n in count(2)))
        name = next(name for name in names if name not in named)
        named[name] = volume._replace(name=name)
    return [*named.values()], skipped, sorted(set(warnings))


def grouped(members, key):
    """{key(member): [members]}, in the order of their first ones."""
    groups = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return groups


def parent(header):
    return os.path.dirname(header.file)


def in_folder(members, text):
    """A warning on a series' Headers: (SeriesInstanceUID, text with their folder)."""
    return members[0].series, f"in {folder_of(header.file for header in members)}: {text}"


def folder_of(files):
    return os.path.commonpath([f"DATA/{os.path.dirname(file)}" for file in files])


def series_volumes(members, skipped, warnings):
    """The Volumes of a series' Headers; adds to skipped and to warnings."""
    volumes, texts = [], []
    named = grouped(members, attrgetter("instance")).values()
    for copies in named:
        if len(set(map(attrgetter("patient", "position", "number", "acquisition"), copies))) == 1:
            reason = f"same SOPInstanceUID and place as another: {copies[0].file}"
            skipped += [(header.file, reason) for header in copies[1:]]
            del copies[1:]  # but a UID of several places proves no copy
    members = [header for copies in named for header in copies]
    if len(named) < len(members):
        text = f"{len(members)} slices have {len(named)} different SOPInstanceUIDs"
        texts.append(f"{text}, some in several places: these prove no copies, all are kept")
    patients = grouped(members, attrgetter("patient")).values()
    if len(patients) > 1:
        text = f"{len(patients)} or more volumes"
        texts.append(f"PatientID, name, birth date or study differ: {text}")
    for of_patient in patients:
        for field, tolerance, what in ODD:
            unlike = odd(of_patient, field, tolerance, what)
            skipped += unlike.items()
            of_patient = [header for header in of_patient if header.file not in unlike]
        of_patient.sort(key=lambda h: (h.number, name_and_numbers(h.file)[1], h.file))
        parts, told_by = acquisitions(of_patient)
        if len(parts) > 1:
            texts.append(f"{len(parts)} scans of one place, told apart by {told_by}")
        volumes += [in_z_order(part, texts) for part in parts]
    warnings += [in_folder(members, text) for text in texts]
    return volumes


def odd(members, field, tolerance, what):
    """{file: reason} of the Headers unlike most: field known, and not in the largest group."""
    groups = {}  # by their first vector
    for header in members:
        vector = getattr(header, field)
        if vector is not None:
            alike = (first for first in groups if np.ptp([first, vector], 0).max() <= tolerance)
            groups.setdefault(next(alike, tuple(vector)), []).append((header.file, vector))
    most, *small = sorted(groups.values(), key=len, reverse=True) or [()]
    reason = f"{what} unlike {len(most)} slices of its series"
    return {file: reason.format(*vector) for group in small for file, vector in group}


def acquisitions(members):
    """([Headers of an acquisition], what tells them apart) of one patient's series.

    Acquisitions of one place, such as time points, are told apart by the first element of
    ACQUISITION that all have and that does so, else by folder, else as `by_turns` does.
    """
    if not positions_known(members):
        return [members], ""
    members = sorted(members, key=attrgetter("number", "acquisition"))
    for i, keyword in enumerate(ACQUISITION):
        parts = grouped(members, lambda header, i=i: header.acquisition[i]).values()
        if all(header.acquisition[i] for header in members) and are_scans(parts, members):
            return parts, keyword
    turns, folders = by_turns(members), grouped(members, parent).values()
    if len(turns) == len(folders) and are_scans(folders, members):
        return folders, "folder"
    return turns, "the order of InstanceNumber, acquisition and name alone: a guess, look"


def are_scans(parts, members):
    """Whether parts of these Headers overlap along z, each with one slice at a position."""
    overlap = sum(map(extent, parts)) > OVERLAP * extent(members)
    return overlap and all(len(part) > 1 and len(by_turns(part)) == 1 for part in parts)


def extent(members):
    """mm along z; None where positions are missing."""
    places = [header.position for header in members]
    return None if None in places else np.ptp(np.round(places, DIGITS))


def positions_known(members):
    return extent(members) is not None and (len(members) < 3 or extent(members) > 0)


def by_turns(members):
    """Lists of the first Header at each position, of the second ones ..."""
    places = grouped(members, lambda header: round(header.position, DIGITS))
    return [[header for header in turn if header] for turn in zip_longest(*places.values())]


def in_z_order(members, texts):
    """The Volume of an acquisition's Headers, sorted by number and name; adds to texts."""
    size = len(members)
    if positions_known(members):
        members = sorted(members, key=attrgetter("position"))
        texts += gaps([header.position for header in members])
        positions = [f"{header.position:.4f}" for header in members]
    else:
        missing = sum(header.position is None for header in members)
        text = f"{missing} of {size} positions missing" if missing else "all positions are the same"
        texts.append(f"{text}: ordered by InstanceNumber, then by name")
        positions = [""] * size
    different = len({header.number for header in members})
    steps = np.diff([header.number for header in members if header.number < inf])
    repeats = 1 < different < size
    if repeats or steps.min(initial=0) < 0 < steps.max(initial=0):
        text = f"repeats, {different} on {size} slices" if repeats else "rises and falls along z"
        texts.append(f"InstanceNumber {text}: perhaps they are several scans")
    return Volume(members[0].series, [header.file for header in members], positions, members)


def gaps(positions):
    """A warning, in a list, if some of the sorted positions, in mm, lie much wider than most."""
    distances = np.diff(positions)
    usual = np.median(distances) if len(distances) else 0
    wide, widest = (distances > GAP * usual).sum(), distances.max(initial=0)
    text = f"gaps along z: {wide}, the widest {widest:.1f} mm where {usual:.1f} mm is usual"
    return [f"{text}: slices may be missing"] if wide and len(distances) > 1 else []


def image_volumes(files):
    """(Volumes, warnings) of PNG and JPEG files.

    A folder is a volume; where most of its names, less their last number, are those of several
    files, each is one, as in the official code's flat layout, `<volume>_<number>`.
    """
    volumes, warnings = [], []
    for folder, members in grouped(files, lambda file: os.path.dirname(file) or ".").items():
        named = grouped(members, lambda file: name_and_numbers(file)[0])
        single = sum(len(alike) == 1 for alike in named.values())
        official = all(re.fullmatch(r".+_\d+\.\w+", os.path.basename(file)) for file in members)
        by_name = single < len(members) / 2 if len(named) > 1 else official and folder == "."
        doubtful = by_name != official or (not by_name and len(named) - single > 1)
        if doubtful and len(named) > 1:
            what = f"{len(named)} volumes" if by_name else f"1 volume, not {len(named)}"
            text = f"{what} by file name ({', '.join([*named][:3])} ...), {single} of one file"
            warnings.append((folder, f"in {folder_of(members)}: {text}: right?"))
        parts = named if by_name else {folder: members}
        volumes += [in_number_order(name, part, warnings) for name, part in parts.items()]
    return volumes, warnings


def name_and_numbers(file):
    """v/pat1_007.png -> (v/pat1, [1, 7]), PAT_120_85_CT.png -> (PAT_120_CT, [120, 85])."""
    folder, name = os.path.split(file)
    stem = re.sub(r"\.[A-Za-z]\w*$", "", name)
    found = [*NUMBER.finditer(stem)]
    start, end = found[-1].span() if found else (len(stem), len(stem))
    name = stem[:start].rstrip("-_ .") + stem[end:]
    return os.path.normpath(os.path.join(folder, name)), [Decimal(match.group()) for match in found]


def in_number_order(name, files, warnings):
    """The Volume of images by their last number, or by all where not all differ; adds warnings."""
    found = [(name_and_numbers(file)[1], file) for file in files]
    by_all = sorted(found, key=lambda pair: (not pair[0], pair))
    in_order = sorted(by_all, key=lambda pair: pair[0][-1:])
    different = len({numbers[-1] for numbers, _ in found if numbers})
    if different < len(files) > 1:
        in_order = by_all
        text = f"{different} last number(s) in {len(files)} names: ordered by all, then by name"
        warnings.append((name, text))
    elif in_order != by_all:
        warnings.append((name, "of several numbers in the names, the last one orders them"))
    positions = [str(numbers[-1]) if numbers else "" for numbers, _ in in_order]
    return Volume(name, [file for _, file in in_order], positions, [None] * len(files))
