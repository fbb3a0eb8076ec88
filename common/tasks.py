"""The downstream data sets: images, labels and splits. Knows nothing of encoders."""

import csv
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.ct import read_image, scale_to_uint8
from common.files import fail
from common.hashing import dhash, hamming

SPLITS = ["train", "val", "test"]
DUPLICATE_BITS = (
    4  # images whose dHash differs by no more count as near-duplicates (our choice, by looking)
)


class Task(NamedTuple):
    images: np.ndarray  # uint8 [N, size, size]
    labels: np.ndarray  # int [N], 0..classes-1
    split: np.ndarray | None  # "train", "val" or "test" [N]; None: made from the seed, see split_of
    groups: np.ndarray  # int [N], images of one group stay on one side of a made split
    names: list  # of the image files, below the data folder; of an npz "train 17", which is train_images[17]
    hashes: np.ndarray  # uint64 [N], dHash of the image in its own size
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
        return hashlib.sha256(
            b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        ).hexdigest()[:8]


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
    found = {}  # file: (label, split, the listing that names it)
    for label, kind in enumerate(["NonCOVID", "COVID"]):
        for part in SPLITS:
            listing = find_one(data, f"{part}CT_{kind}.txt")
            names = [line.strip() for line in read_text(listing).splitlines() if line.strip()]
            if not names:
                fail(f"{listing}: lists no image: download it again")
            for name in names:
                file = data / f"CT_{kind}" / name
                if not file.is_file():
                    fail(
                        f"{listing}: lists {name}, which {file.parent} does not hold: unpack it there"
                    )
                if file in found:
                    fail(
                        f"{listing}: lists {name}, which {found[file][2]} lists already: delete one of the two lines"
                    )
                found[file] = label, part, listing
    labels, split, _ = map(np.array, zip(*found.values()))
    names, images, hashes = read_images(list(found), data, size)
    return checked(
        Task(images, labels, split, np.arange(len(names)), names, hashes, 0.56, 0.2907, True), data
    )


def load_head_ct(data, size):
    """Head CT haemorrhage, labels.csv (`id, hemorrhage`) and images 000.png...; near-duplicates share a group."""
    listing = find_one(data, "labels.csv")
    reader = csv.DictReader(read_text(listing).splitlines())
    reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
    if not {"id", "hemorrhage"} <= set(reader.fieldnames):
        fail(
            f"{listing}: needs the columns id and hemorrhage, its first line is {','.join(reader.fieldnames) or 'empty'}"
        )
    labels = {}
    for row in reader:
        number, label = ((row[key] or "").strip() for key in ("id", "hemorrhage"))
        if not number.isdecimal() or label not in ("0", "1"):
            fail(
                f"{listing}: line {reader.line_num}: id {number!r} must be a whole number, hemorrhage {label!r} 0 or 1: mend it"
            )
        if int(number) in labels:
            fail(
                f"{listing}: line {reader.line_num}: lists id {number} again: delete one of the two lines"
            )
        labels[int(number)] = int(label)
    if not labels:
        fail(f"{listing}: lists no image: download it again")
    names, images, hashes = read_images(
        [find_one(data, f"{number:03d}.png") for number in labels], data, size
    )
    groups = duplicate_groups(hashes)
    return checked(
        Task(images, np.array(list(labels.values())), None, groups, names, hashes, 0.5, 0.5, False),
        listing,
    )


def load_npz(name, data, size):
    """A MedMNIST npz: {train,val,test}_images uint8 [N, h, w] and _labels int [N, 1]; data is the file or its folder."""
    file = (
        find_one(data, "*organ*.npz" if name == "organ" else f"{name}.npz")
        if data.is_dir()
        else data
    )
    try:
        with np.load(file, allow_pickle=False) as arrays:
            parts = {part: (arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in SPLITS}
    except Exception as error:  # whatever a damaged file makes numpy and zipfile raise
        fail(
            f"{file}: damaged, or not a MedMNIST npz with images and labels of train, val and test ({error})"
        )
    for part, (images, labels) in parts.items():
        if images.dtype != np.uint8 or images.ndim != 3 or not images.size:
            fail(
                f"{file}: {part}_images is {images.dtype} {list(images.shape)}, grey images, uint8 [N, h, w], are needed"
            )
        if labels.dtype.kind not in "iu" or labels.size != len(images) or labels.min() < 0:
            fail(
                f"{file}: {part}_labels is {labels.dtype} {list(labels.shape)}, a whole number, not negative, for each of the "
                f"{len(images)} images is needed"
            )
    split = np.repeat(SPLITS, [len(images) for images, _ in parts.values()])
    names = [f"{part} {i}" for part, (images, _) in parts.items() for i in range(len(images))]
    originals = [image for images, _ in parts.values() for image in images]
    labels = np.concatenate([labels.reshape(-1).astype(int) for _, labels in parts.values()])
    resized = np.stack([resize(image, size) for image in originals])
    return checked(
        Task(
            resized,
            labels,
            split,
            np.arange(len(split)),
            names,
            hash_all(originals),
            0.5,
            0.5,
            False,
        ),
        file,
    )


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


def near_pairs(hashes):
    """[(row, later row, bits)] of all images whose dHash differs by at most DUPLICATE_BITS. For small sets: uint64 [n]."""
    bits = hamming(hashes[:, None], hashes)
    return [
        (int(i), int(j), int(bits[i, j]))
        for i, j in np.argwhere(np.triu(bits <= DUPLICATE_BITS, 1))
    ]


def duplicate_groups(hashes):
    """uint64 [n] -> int [n]: images linked by near_pairs carry the same number."""
    groups = np.arange(len(hashes))
    for i, j, _ in near_pairs(hashes):
        groups[groups == groups[j]] = groups[i]
    return groups


def leaks(task, split):
    """[(test row, row of the nearest training image, bits)] of the test images with one within DUPLICATE_BITS."""
    train, found = task.hashes[split["train"]], []
    for row in split["test"]:
        bits = hamming(train, task.hashes[row])
        nearest = bits.argmin()
        if bits[nearest] <= DUPLICATE_BITS:
            found.append((int(row), int(split["train"][nearest]), int(bits[nearest])))
    return found


def checked(task, source):
    """The task, after making sure that there are two classes, and at least two images of each in every split."""
    gaps = np.setdiff1d(np.arange(min(task.classes, len(task.labels) + 1)), task.labels)
    if task.classes < 2 or len(gaps):
        fail(
            f"{source}: class {gaps[0] if len(gaps) else 1} holds no image: classes must be numbered from 0 on, at least two"
        )
    for part, rows in split_of(task, 0).items():
        counts = np.bincount(task.labels[rows], minlength=task.classes)
        if counts.min() < 2:
            fail(
                f"{source}: the {part} split holds {counts.min()} images of class {counts.argmin()}, at least 2 are needed"
            )
    return task


def find_one(folder, pattern):
    """The only file below folder that fits the pattern."""
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        fail(f"{folder}: holds {len(found)} files {pattern}, one is needed")
    return found[0]


def read_text(file):
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file}: cannot be read as text: {error}")


def read_images(files, data, size):
    """Names below the folder data, images of that size [N, size, size], and dHashes of the full images."""
    grey = [read_grey(file) for file in files]
    names = [file.relative_to(data).as_posix() for file in files]
    return names, np.stack([resize(image, size) for image in grey]), hash_all(grey)


def read_grey(file):
    try:
        grey = read_image(file)
    except Exception as error:  # whatever a damaged file makes Pillow raise
        fail(f"{file}: cannot be read as an image ({error}): download it again")
    return grey if grey.dtype == np.uint8 else scale_to_uint8(grey)


def hash_all(images):
    return np.array([int(dhash(image), 16) for image in images], np.uint64)


def resize(image, size):
    """uint8 [h, w] -> uint8 [size, size], antialiased, aspect ratio given up (official code: torchvision's Resize)."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
