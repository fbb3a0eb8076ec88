"""The downstream data sets: images, labels, groups and splits. Knows nothing of encoders."""

import csv
import hashlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

from common.ct import read_image, scale_to_uint8
from common.files import fail
from common.hashing import dhash, hamming

TASKS = ["covid-ct", "organ", "head-ct", "images", "toy-lesion", "toy-organ"]
SPLITS = ["train", "val", "test"]
MADE_FOLDS = 5  # of a split that we make: one tests, one validates, the others train
DUPLICATE_BITS = 4  # dHashes of near-duplicates differ by no more (our choice, by looking)


class Task(NamedTuple):
    images: np.ndarray  # uint8 [N, size, size]
    labels: np.ndarray  # int [N], index into classes
    classes: list  # their names
    split: np.ndarray | None  # published: "train", "val" or "test" [N]; None: see split_of
    groups: np.ndarray  # int [N]; images of one group are not independent
    names: list  # of the image files, below the data folder; in an npz "train 17"
    hashes: np.ndarray  # uint64 [N], dHash of the image in its full size
    mean: float = 0.5  # of the values in 0..1; used by fine-tuning
    std: float = 0.5
    vertical_flip: bool = False  # augmentation of fine-tuning

    @property
    def digest(self):
        """8 hex digits that change with images, labels, groups, split and augmentation."""
        found = hashlib.sha256(repr((self.mean, self.std, self.vertical_flip)).encode())
        for array in (self.images, self.labels, self.groups, self.split):
            if array is not None:
                found.update(array.tobytes())
        return found.hexdigest()[:8]


class Listed(NamedTuple):
    """One image of a data set, as its list has it."""

    name: str  # its file, below the data folder
    label: str
    split: str  # train, val or test; "" where none is published
    group: str  # a patient or paper; "" where none is known
    where: str  # the list that names it, and the line, for messages


def load_task(name, data, size):
    """One of TASKS from its folder (npz tasks: or file), the images resized to size x size."""
    data = Path(data)
    if not data.exists():
        fail(f"{data}: no such file or folder")
    if name == "covid-ct":
        task = load_images(list_covid_ct(data), data, size)
        return task._replace(
            mean=0.56, std=0.2907, vertical_flip=True
        )  # official code, one for its three channels
    if name == "head-ct":
        return load_images(list_head_ct(data), data, size)
    if name == "images":
        return load_images(list_images(data), data, size)
    return load_npz("*organ*.npz" if name == "organ" else f"{name}.npz", data, size)


def list_images(data):
    """Any folder with labels.csv: `file,label`, and optionally `split` and `group`.

    file: below the folder. label: any text. split: train, val or test, all three of which must
    occur. group: a patient or paper, whose images stay on one side of every split that is made.
    """
    listed = []
    for where, row in read_table(data / "labels.csv", ["file", "label"]):
        for column, text in row.items():
            if column in ("file", "label", "split", "group") and not text:
                fail(f"{where}: {column} is empty: fill it in, or leave the whole column out")
        split = row.get("split", "")
        if split not in ("", *SPLITS):
            fail(f"{where}: split {split!r} must be train, val or test")
        listed.append(Listed(row["file"], row["label"], split, row.get("group", ""), where))
    return listed


def list_head_ct(data):
    """Head CT haemorrhage: labels.csv (`id, hemorrhage`) and images 000.png ..."""
    listed = []
    for where, row in read_table(find_one(data, "labels.csv"), ["id", "hemorrhage"]):
        number, label = row["id"], row["hemorrhage"]
        if not number.isdecimal() or label not in ("0", "1"):
            fail(f"{where}: id {number!r} must be a whole number, hemorrhage {label!r} 0 or 1")
        file = find_one(data, f"{int(number):03d}.png")
        listed.append(Listed(file.relative_to(data).as_posix(), label, "", "", where))
    return listed


def list_covid_ct(data):
    """COVID-CT with its official Data-split/KIND/{train,val,test}CT_KIND.txt; class 1 is COVID."""
    listed = []
    for label, kind in [("0", "NonCOVID"), ("1", "COVID")]:
        for part in SPLITS:
            listing = find_one(data, f"{part}CT_{kind}.txt")
            names = [line.strip() for line in read_text(listing).splitlines() if line.strip()]
            if not names:
                fail(f"{listing}: lists no image: download it again")
            for name in names:
                group = f"{kind} {covid_ct_source(name)}"
                listed.append(Listed(f"CT_{kind}/{name}", label, part, group, str(listing)))
    return join_numbered(listed)


def covid_ct_source(name):
    """The paper or figure that an image of COVID-CT was cut from, by its file name.

    Seen in the 746 official names: most COVID images are PAPER-pPAGE-FIGURE%PART.png, such as
    2020.03.01.20029769-p21-73_1%0.png; the Lancet's are PIIS0140673620301549_0%0.png, without a
    page. NonCOVID's .jpg are FIGURE%PART.jpg, such as 39%8.jpg; its .png are numbers alone.
    """
    stem, dot, suffix = name.rpartition(".")
    if match := re.match(r"(.+)-p\d+-", stem):
        return match[1]
    return re.split("[_%]", stem)[0] + dot + suffix


def join_numbered(listed):
    """NonCOVID's 1046.png, 1047.png ... are one group as long as the numbers are consecutive.

    Runs of consecutive numbers show slices of one scan (seen: 1046-1050, 1210-1217, 2138-2145); a
    few also hold the next patient's, which costs nothing but a larger group.
    """
    numbered = re.compile(r"CT_NonCOVID/(\d+)\.png")
    numbers = {int(match[1]) for image in listed if (match := numbered.fullmatch(image.name))}
    joined = []
    for image in listed:
        if match := numbered.fullmatch(image.name):
            first = int(match[1])
            while first - 1 in numbers:
                first -= 1
            image = image._replace(group=f"NonCOVID {first}.png")
        joined.append(image)
    return joined


def load_images(listed, data, size):
    """The Task of listed images; near-duplicates are one group where the list has no groups."""
    earlier = {}
    for image in listed:
        if image.name in earlier:
            fail(
                f"{image.where}: lists {image.name} again, which {earlier[image.name]} lists "
                "already: delete one of the two lines"
            )
        earlier[image.name] = image.where
        if not (data / image.name).is_file():
            fail(f"{image.where}: lists {image.name}, which {data} does not hold: unpack it there")
    originals = [read_grey(data / image.name) for image in listed]
    hashes = hash_all(originals)
    classes = sorted_classes(image.label for image in listed)
    groups = duplicate_groups(hashes)
    if listed[0].group:
        groups = np.unique([image.group for image in listed], return_inverse=True)[1]
    task = Task(
        images=resize(originals, size),
        labels=np.array([classes.index(image.label) for image in listed]),
        classes=classes,
        split=np.array([image.split for image in listed]) if listed[0].split else None,
        groups=groups,
        names=[image.name for image in listed],
        hashes=hashes,
    )
    return checked(task, listed[0].where.split(": line")[0])


def sorted_classes(labels):
    """Names of the classes in their order: numbers as numbers, anything else as text."""
    classes = sorted(set(labels))
    try:
        return sorted(classes, key=float)
    except ValueError:
        return classes


def load_npz(pattern, data, size):
    """A MedMNIST npz: {train,val,test}_images uint8 [N, h, w] and _labels int [N, 1].

    data: the file, or the folder that holds one that fits the pattern. It tells no patients, so
    each image is a group of its own.
    """
    file = find_one(data, pattern) if data.is_dir() else data
    try:
        with np.load(file, allow_pickle=False) as arrays:
            parts = {part: (arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in SPLITS}
    except Exception as error:  # whatever a damaged file makes numpy and zipfile raise
        fail(
            f"{file}: damaged, or not a MedMNIST npz with images and labels of train, val and "
            f"test ({error})"
        )
    for part, (images, labels) in parts.items():
        grey = images.dtype == np.uint8 and images.ndim == 3 and images.size
        whole = labels.dtype.kind in "iu" and labels.size == len(images)
        if not grey or not whole or labels.min() < 0:
            fail(
                f"{file}: {part}_images is {images.dtype} {list(images.shape)}, {part}_labels "
                f"{labels.dtype} {list(labels.shape)}: needed are grey images, uint8 [N, h, w], "
                "and for each a whole number, not negative"
            )
    originals = [image for images, _ in parts.values() for image in images]
    labels = np.concatenate([labels.reshape(-1).astype(int) for _, labels in parts.values()])
    classes = range(max(2, len(np.unique(labels))))
    for label in classes:
        if label not in labels:
            fail(
                f"{file}: class {label} holds no image: classes must be numbered from 0 on, at "
                "least two"
            )
    task = Task(
        images=resize(originals, size),
        labels=labels,
        classes=[str(label) for label in classes],
        split=np.repeat(SPLITS, [len(images) for images, _ in parts.values()]),
        groups=np.arange(len(labels)),
        names=[f"{part} {i}" for part, (images, _) in parts.items() for i in range(len(images))],
        hashes=hash_all(originals),
    )
    return checked(task, file)


def checked(task, source):
    """The task, after making sure that every part of its split holds two images of every class."""
    if len(task.classes) < 2:
        fail(f"{source}: all images are of class {task.classes[0]}: at least two are needed")
    count, label = rarest_class(task)
    if task.split is None and count < 2 * MADE_FOLDS:
        fail(
            f"{source}: class {task.classes[label]} holds {count} images: a split needs at least "
            f"{2 * MADE_FOLDS}"
        )
    for part, rows in split_of(task).items():
        if len(rows) == 0:
            fail(f"{source}: its split has no {part} images: train, val and test are needed")
        count, label = rarest_class(task, rows)
        if count < 2:
            fail(
                f"{source}: the {part} split holds {count} images of class {task.classes[label]}, "
                "at least 2 are needed"
            )
    return task


def rarest_class(task, rows=slice(None)):
    """(number of its images, label) of the class with the fewest images among the rows."""
    counts = np.bincount(task.labels[rows], minlength=len(task.classes))
    return counts.min(), counts.argmin()


def split_of(task):
    """{"train": rows, "val": rows, "test": rows}: the published split, or one of about 60/20/20 %.

    The made split is the same for every encoder. It keeps groups on one side, and the largest
    folds for training, so that a large group does not become the test set.
    """
    if task.split is not None:
        return {part: np.flatnonzero(task.split == part) for part in SPLITS}
    test, val, *train = sorted(make_folds(task, MADE_FOLDS, seed=0), key=len)
    return {"train": np.sort(np.concatenate(train)), "val": val, "test": test}


def make_folds(task, folds, seed):
    """Rows of each fold: stratified by class, whole groups, drawn from the seed."""
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return [test for _, test in splitter.split(task.labels, task.labels, task.groups)]


def checked_folds(task, folds, repeats):
    """make_folds for every repeat, each fold with an image of every class, or one line."""
    count, label = rarest_class(task)
    if count < folds:
        fail(
            f"--folds {folds}: class {task.classes[label]} holds only {count} images: use fewer "
            "folds"
        )
    found = [make_folds(task, folds, seed) for seed in range(repeats)]
    for rows in sum(found, []):
        count, label = rarest_class(task, rows)
        if count == 0:
            groups = len(np.unique(task.groups[task.labels == label]))
            fail(
                f"--folds {folds}: a fold holds no image of class {task.classes[label]}, whose "
                f"images are of {groups} groups: use fewer folds"
            )
    return found


def near_pairs(hashes):
    """[(row, later row, bits)] of all near-duplicates, uint64 [n]."""
    pairs = []
    for row, value in enumerate(hashes):
        bits = hamming(hashes[row + 1 :], value)
        near = np.flatnonzero(bits <= DUPLICATE_BITS)
        pairs += [(row, row + 1 + int(i), int(bits[i])) for i in near]
    return pairs


def duplicate_groups(hashes):
    """uint64 [n] -> int [n]: one number for images that are all near-duplicates of each other.

    An image joins the first group of which every member is its near-duplicate (complete linkage),
    so that chains of near-duplicates, each a little other than the last, do not swallow the set.
    """
    groups = np.arange(len(hashes))
    for row in range(len(hashes)):
        near = hamming(hashes[:row], hashes[row]) <= DUPLICATE_BITS
        for group in np.unique(groups[:row][near]):
            if near[groups[:row] == group].all():
                groups[row] = group
                break
    return groups


def leaks(task, split):
    """[(test row, row of the nearest training image, bits)] of near-duplicates across the split."""
    train = task.hashes[split["train"]]
    found = []
    for row in split["test"]:
        bits = hamming(train, task.hashes[row])
        nearest = bits.argmin()
        if bits[nearest] <= DUPLICATE_BITS:
            found.append((int(row), int(split["train"][nearest]), int(bits[nearest])))
    return found


def find_one(folder, pattern):
    """The only file below folder that fits the pattern."""
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        fail(f"{folder}: holds {len(found)} files {pattern}, one is needed")
    return found[0]


def read_table(path, needed):
    """[("PATH: line 7", {column: text})] of a CSV file that has at least the needed columns."""
    try:
        reader = csv.DictReader(io.StringIO(read_text(path)), restval="")
        columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        lines = [(f"{path}: line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        fail(f"{path}: cannot be read as CSV: {error}")
    if not set(needed) <= set(columns):
        first = ",".join(columns) or "empty"
        fail(f"{path}: needs the columns {' and '.join(needed)}, its first line is {first}")
    if not lines:
        fail(f"{path}: lists no image: download it again")
    for where, row in lines:
        if None in row:
            fail(f"{where}: has more cells than the first line: quote names that hold a comma")
        row.update({column: text.strip() for column, text in row.items()})
    return lines


def read_text(file):
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file}: cannot be read as text: {error}")


def read_grey(file):
    """An image file as grey values, uint8 [h, w]."""
    try:
        grey = read_image(file)
    except Exception as error:  # whatever a damaged file makes Pillow raise
        fail(f"{file}: cannot be read as an image ({error}): download it again")
    return grey if grey.dtype == np.uint8 else scale_to_uint8(grey)


def hash_all(images):
    return np.array([int(dhash(image), 16) for image in images], np.uint64)


def resize(images, size):
    """A list of uint8 [h, w] -> uint8 [N, size, size], antialiased, aspect ratio given up.

    Official code: torchvision's Resize.
    """
    bilinear = Image.Resampling.BILINEAR
    return np.stack([Image.fromarray(image).resize((size, size), bilinear) for image in images])
