"""The downstream data sets: images, labels and splits. Knows nothing of encoders."""

import csv
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.ct import read_image, scale_to_uint8
from common.dicom import Unusable
from common.files import fail
from common.reduction import dhash, hamming

SPLITS = ["train", "val", "test"]
DUPLICATE_BITS = 4  # head-ct: images whose dHash differs by no more count as the same head (our choice, by looking)


class Task(NamedTuple):
    images: np.ndarray  # uint8 [N, size, size]
    labels: np.ndarray  # int [N], 0..classes-1
    split: np.ndarray | None  # "train", "val" or "test" [N]; None: made from the seed, see split_of
    groups: np.ndarray  # int [N], images of one group stay on one side of a made split
    mean: float  # published, of the values in 0..1; used by fine-tuning
    std: float
    vertical_flip: bool  # the published augmentation

    @property
    def classes(self):
        return int(self.labels.max()) + 1

    @property
    def digest(self):
        """Changes with any pixel, label or published split."""
        parts = [self.images, self.labels] + ([] if self.split is None else [self.split])
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()[:8]


def load_task(name, data, size):
    """covid-ct, organ, head-ct, toy-lesion or toy-organ from its folder (npz tasks: or file), resized to size."""
    data = Path(data)
    if not data.exists():
        fail(f"{data}: no such file or folder")
    if name == "covid-ct":
        return load_covid_ct(data, size)
    if name == "head-ct":
        return load_head_ct(data, size)
    return load_npz(name, data, size)


def load_covid_ct(data, size):
    """COVID-CT with its official split files Data-split/{COVID,NonCOVID}/{train,val,test}CT_*.txt; 1 is COVID."""
    files, labels, split = [], [], []
    for label, kind in enumerate(["NonCOVID", "COVID"]):
        for part in SPLITS:
            listing = find_one(data, f"{part}CT_{kind}.txt")
            names = [line.strip() for line in listing.read_text().splitlines() if line.strip()]
            for name in names:
                file = data / f"CT_{kind}" / name
                if not file.is_file():
                    fail(f"{listing}: lists {name}, which {file.parent} does not hold")
                files.append(file)
                labels.append(label)
                split.append(part)
    twice = {file for file in files if files.count(file) > 1}
    if twice:
        fail(f"{data}: {min(twice).name} is listed twice in the split files")
    images = read_images(files, size)
    return checked(Task(images, np.array(labels), np.array(split), np.arange(len(files)), 0.56, 0.2907, True), data)


def load_head_ct(data, size):
    """Head CT haemorrhage, labels.csv (`id, hemorrhage`) and images 000.png...; near-duplicates share a group."""
    with open(find_one(data, "labels.csv"), newline="") as file:
        rows = [{key.strip(): value.strip() for key, value in row.items()} for row in csv.DictReader(file)]
    try:
        names, labels = [f"{int(row['id']):03d}.png" for row in rows], [int(row["hemorrhage"]) for row in rows]
    except (KeyError, ValueError) as error:
        fail(f"{data / 'labels.csv'}: needs the columns id and hemorrhage in whole numbers ({error})")
    files = [find_one(data, name) for name in names]
    hashes = np.array([int(dhash(read_grey(file)), 16) for file in files], np.uint64)
    groups = duplicate_groups(hashes)
    return checked(Task(read_images(files, size), np.array(labels), None, groups, 0.5, 0.5, False), data)


def load_npz(name, data, size):
    """A MedMNIST npz: {train,val,test}_images uint8 [N, h, w] and _labels [N, 1]; data is the file or its folder."""
    pattern = "*organ*.npz" if name == "organ" else f"{name}.npz"
    file = find_one(data, pattern) if data.is_dir() else data
    try:
        arrays = dict(np.load(file, allow_pickle=False))
        images = [arrays[f"{part}_images"] for part in SPLITS]
        labels = [arrays[f"{part}_labels"].reshape(-1).astype(int) for part in SPLITS]
    except (KeyError, ValueError, OSError) as error:
        fail(f"{file}: not a MedMNIST npz with images and labels of train, val and test ({error})")
    split = np.repeat(SPLITS, [len(part) for part in labels])
    resized = np.stack([resize(image, size) for part in images for image in part])
    return checked(Task(resized, np.concatenate(labels), split, np.arange(len(split)), 0.5, 0.5, False), file)


def split_of(task, seed):
    """{"train": rows, "val": rows, "test": rows}: the published split, or a stratified 60/20/20 % made from the seed."""
    if task.split is not None:
        return {part: np.flatnonzero(task.split == part) for part in SPLITS}
    rng = np.random.default_rng(seed)
    rows = {part: [] for part in SPLITS}
    for label in range(task.classes):
        members = np.flatnonzero(task.labels == label)
        done = 0
        for group in rng.permutation(np.unique(task.groups[members])):
            chosen = members[task.groups[members] == group]
            share = done / len(members)
            rows["test" if share < 0.2 else "val" if share < 0.4 else "train"].extend(chosen)
            done += len(chosen)
    return {part: np.sort(np.array(members, int)) for part, members in rows.items()}


def duplicate_groups(hashes):
    """uint64 [n] -> int [n]: images linked by dHash distances <= DUPLICATE_BITS carry the same number."""
    groups = np.arange(len(hashes))
    for i, j in np.argwhere(np.triu(hamming(hashes[:, None], hashes) <= DUPLICATE_BITS, 1)):
        groups[groups == groups[j]] = groups[i]
    return groups


def leaks(task, split):
    """Rows of the test split that have a near-duplicate (dHash within DUPLICATE_BITS) in the training split."""
    hashes = np.array([int(dhash(image), 16) for image in task.images], np.uint64)
    train = np.unique(hashes[split["train"]])
    return [row for row in split["test"] if (hamming(train, hashes[row]) <= DUPLICATE_BITS).any()]


def checked(task, source):
    """The task, after making sure that each split holds at least two images of every class."""
    for part, rows in split_of(task, 0).items():
        counts = np.bincount(task.labels[rows], minlength=task.classes)
        if counts.min() < 2:
            fail(f"{source}: the {part} split holds {counts.min()} images of class {counts.argmin()}, at least 2 are needed")
    return task


def find_one(folder, pattern):
    """The only file below folder that fits the pattern."""
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        fail(f"{folder}: holds {len(found)} files {pattern}, one is needed")
    return found[0]


def read_images(files, size):
    return np.stack([resize(read_grey(file), size) for file in files])


def read_grey(file):
    try:
        grey = read_image(file)
    except (Unusable, OSError, ValueError, SyntaxError) as error:
        fail(f"{file}: cannot be read as an image: {error}")
    return grey if grey.dtype == np.uint8 else scale_to_uint8(grey)


def resize(image, size):
    """uint8 [h, w] -> uint8 [size, size], antialiased, aspect ratio given up (official code: torchvision's Resize)."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
