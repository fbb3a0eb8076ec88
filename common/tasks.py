"""The downstream data sets: images, labels, groups and splits. Knows nothing of encoders."""

import csv
import hashlib
import re
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

from common.ct import is_image, read_image, scale_to_uint8
from common.files import fail
from common.hashing import BLOCK, SAME_IMAGE, near_duplicates, slice_hash

TASKS = ["covid-ct", "organ", "head-ct", "images", "toy-lesion", "toy-organ"]
SPLITS = ["train", "val", "test"]
NO_CLASSES = {*SPLITS, "training", "valid", "validate", "validation", "testing"}  # as folders
MADE_FOLDS = 5  # of a split that we make: one tests, one validates, the others train


class Task(NamedTuple):
    images: np.ndarray  # uint8 [N, size, size]
    labels: np.ndarray  # int [N], index into classes
    classes: list  # their names
    split: np.ndarray | None  # published: "train", "val" or "test" [N]; None: see split_of
    groups: np.ndarray  # int [N]; images of one group are not independent
    hashes: np.ndarray  # uint64 [N], of the images in their full size
    mean: float = 0.5  # of the values in 0..1; used by fine-tuning
    std: float = 0.5
    flip: bool = False  # left-right, in half of the views of fine-tuning

    @property
    def digest(self):
        """8 hex digits that change with images, labels, groups, split and augmentation."""
        identity = repr((self.mean, self.std, self.flip)).encode()
        arrays = [self.images, self.labels, self.groups, self.split]
        identity += b"".join(array.tobytes() for array in arrays if array is not None)
        return hashlib.sha256(identity).hexdigest()[:8]


class Listed(NamedTuple):
    """One image of a data set, as its list has it; what the list does not tell is empty."""

    file: Path
    label: str
    split: str = ""  # train, val or test
    group: str = ""  # a patient or paper


def load_task(name, data, size):
    """One of TASKS from its folder (npz tasks: or file), the images resized to size x size."""
    data = Path(data)
    lists = {"covid-ct": list_covid_ct, "head-ct": list_head_ct, "images": list_images}
    if name not in lists:
        return load_npz("*organ*.npz" if name == "organ" else f"{name}.npz", data, size)
    task = load_images(lists[name](data), data, size)
    if name == "images":
        return task
    # official code for COVID-CT and brain CT, one value for its three channels; it flips top and
    # bottom, but its loader has transposed the images
    return task._replace(mean=0.56, std=0.2907, flip=True)


def list_images(data):
    """Any folder with labels.csv, `file,label` and optionally `split,group`, or as list_folders."""
    if not (data / "labels.csv").is_file():
        return list_folders(data)
    lines = read_table(data / "labels.csv", ["file", "label"], ["split", "group"])
    return [Listed(**line | {"file": data / line["file"]}) for line in lines]


def list_folders(data):
    """A folder of images for each class; the folders in it, such as patients, are groups."""
    found = [path.relative_to(data) for path in sorted(data.rglob("*")) if path.is_file()]
    shown = [f for f in found if not any(part.startswith((".", "__")) for part in f.parts)]
    files = [file for file in shown if is_image(file) and len(file.parts) > 1]
    classes = Counter(file.parts[0] for file in files)
    if len(classes) < 2 or {name.casefold() for name in classes} <= NO_CLASSES:
        wanted = "lists file,label (and, if known, split and group: a patient)"
        fail(f"{data}: needs labels.csv, which {wanted}, or a folder of images for each class")
    counted = ", ".join(f"{name} ({images})" for name, images in classes.items())
    text = f"no labels.csv: a folder is a class: {counted}; {len(shown) - len(files)} other files"
    print(f"warning: {data}: {text}", file=sys.stderr)
    nested = any(len(file.parts) > 2 for file in files)
    return [Listed(data / f, f.parts[0], group=f.parts[1] if nested else "") for f in files]


def list_head_ct(data):
    """Head CT haemorrhage: labels.csv (`id, hemorrhage`) and images 000.png ..."""
    lines = read_table(find_one(data, "labels.csv"), ["id", "hemorrhage"])
    return [Listed(find_one(data, f"{line['id']:0>3}.png"), line["hemorrhage"]) for line in lines]


def list_covid_ct(data):
    """COVID-CT with its official Data-split/KIND/{train,val,test}CT_KIND.txt; class 1 is COVID."""
    listed = []
    for label, kind in [("0", "NonCOVID"), ("1", "COVID")]:
        for part in SPLITS:
            file = find_one(data, f"{part}CT_{kind}.txt")
            with readable(file):
                names = file.read_text(encoding="utf-8-sig").split()
            for name in names:
                group = f"{kind} {covid_ct_source(name)}"
                listed.append(Listed(data / f"CT_{kind}" / name, label, part, group))
    groups = {image.group for image in listed}
    return [image._replace(group=first_of_run(image.group, groups)) for image in listed]


def covid_ct_source(name):
    """The paper or figure that an image of COVID-CT was cut from, by its file name.

    Seen: PAPER-pPAGE-FIGURE%PART.png, FIGURE_0%PART.png, FIGURE%PART.jpg, NUMBER.png.
    """
    stem, dot, suffix = name.rpartition(".")
    if match := re.match(r"(.+)-p\d+-", stem):
        return match[1]
    return re.split("[_%]", stem)[0] + dot + suffix


def first_of_run(group, groups):
    """NonCOVID's 1046.png, 1047.png ...: runs of numbers, one group, show slices of one scan.

    A few also hold the next patient's, which costs nothing but a larger group.
    """
    while match := re.fullmatch(r"NonCOVID (\d+)\.png", group):
        earlier = f"NonCOVID {int(match[1]) - 1}.png"
        if earlier not in groups:
            break
        group = earlier
    return group


def load_images(listed, data, size):
    """The Task of listed images; near-duplicates are one group where the list has no groups."""
    if not listed:
        fail(f"{data}: its list names no image")
    file, times = Counter(image.file for image in listed).most_common(1)[0]
    if times > 1:
        fail(f"{file}: is listed {times} times: delete all but one")
    files, labels, split, groups = zip(*listed, strict=True)
    return make_task(data, [read_grey(file) for file in files], labels, split, groups, size)


def load_npz(pattern, data, size):
    """A MedMNIST npz: {train,val,test}_images uint8 [N, h, w] and _labels int [N, 1].

    data: the file, or its folder. It tells no patients: each image is a group of its own.
    """
    file = find_one(data, pattern) if data.is_dir() else data
    originals, labels, split = [], [], []
    with readable(file), np.load(file, allow_pickle=False) as arrays:
        for part in SPLITS:
            images, numbers = arrays[f"{part}_images"], arrays[f"{part}_labels"]
            grey = images.dtype == np.uint8 and images.ndim == 3
            if not (grey and numbers.dtype.kind in "iu" and numbers.size == len(images)):
                shapes = f"{images.dtype} {images.shape} and {numbers.dtype} {numbers.shape}"
                raise ValueError(f"{part}: {shapes} are no uint8 [N, h, w] and int [N, 1]")
            originals += list(images)
            labels += numbers.reshape(-1).astype(str).tolist()
            split += [part] * len(images)
    return make_task(file, originals, labels, split, range(len(labels)), size)


def make_task(source, originals, labels, split, groups, size):
    """The Task of images, uint8 [h, w] each; split and groups are empty texts where unknown."""
    classes = sorted(set(labels))
    with suppress(ValueError):
        classes.sort(key=float)  # numbers as numbers, anything else as text
    if len(classes) < 2:
        fail(f"{source}: all images are of class {', '.join(classes)}: at least two are needed")
    for texts in (labels, groups):
        check_spelling(source, {*map(str, texts)})
    if any(split) and set(split) != set(SPLITS):
        fail(f"{source}: its splits are {sorted(set(split))}: needed are train, val and test")
    hashes = np.array([int(slice_hash(image), 16) for image in originals], np.uint64)
    known_groups = np.unique(groups, return_inverse=True)[1]
    pictures = map(Image.fromarray, originals)
    # antialiased; ours: the official code's "area" (MONAI) changes AUC by -0.006 to +0.004 on organ
    # and covid-ct, in 16 pairs of linear lines
    bilinear = Image.Resampling.BILINEAR
    return Task(
        images=np.stack([picture.resize((size, size), bilinear) for picture in pictures]),
        labels=np.array([classes.index(label) for label in labels]),
        classes=classes,
        split=np.array(split) if any(split) else None,
        groups=known_groups if any(groups) else duplicate_groups(hashes),
        hashes=hashes,
    )


def check_spelling(source, names):
    """Stop with one line at an empty name (in pandas: NaN), or one in two spellings."""
    for name, times in Counter(name.casefold().removesuffix(".0") for name in names).items():
        if times > 1 or name == "nan":
            fail(f"{source}: the label or group {name} is empty, or spelled in several ways")


def with_positive(task, name):
    """The task with this one of its two classes last: AUC and F1 are those of it."""
    if name not in task.classes or len(task.classes) != 2:
        fail(f"--positive {name}: is not one of two classes: {', '.join(task.classes)}")
    if name == task.classes[1]:
        return task
    return task._replace(classes=task.classes[::-1], labels=1 - task.labels)


def check_parts(task, source, parts, least):
    """Stop with one line unless each of the parts, {name: images}, has `least` of every class."""
    for name, images in parts.items():
        counts = np.bincount(task.labels[images], minlength=len(task.classes))
        if counts.min() < least:
            label = counts.argmin()
            groups = task.groups[task.labels == label]
            fail(
                f"{source}: class {task.classes[label]} ({len(groups)} images of "
                f"{len(np.unique(groups))} groups) has {counts.min()} in {name}, needed are {least}"
            )


def check_split(task, source):
    """Stop with one line unless each part of the split has two images of every class."""
    if task.split is None:
        check_parts(task, source, {"all": slice(None)}, MADE_FOLDS)
    check_parts(task, f"{source} (--folds may do, or another split)", split_of(task), 2)


def split_of(task):
    """{"train", "val", "test": images}, int [n]: the published split, or one of about 60/20/20 %.

    A made split trains on the largest folds, so that a large group does not become the test set.
    """
    if task.split is not None:
        return {part: np.flatnonzero(task.split == part) for part in SPLITS}
    test, val, *train = sorted(make_folds(task, MADE_FOLDS, seed=0), key=len)
    return {"train": np.sort(np.concatenate(train)), "val": val, "test": test}


def make_folds(task, folds, seed):
    """The images of each fold: stratified by class, whole groups, drawn from the seed."""
    groups = len(np.unique(task.groups))
    if groups < folds:
        more = f"give --protocol linear --folds {groups}, or a column split"
        fail(f"{folds} folds of whole groups need {folds} groups, not {groups}: {more}")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return [test for _, test in splitter.split(task.labels, task.labels, task.groups)]


def checked_folds(task, folds, repeats):
    """make_folds for every repeat, each fold with an image of every class, or one line."""
    source = f"--folds {folds} are too many"
    check_parts(task, source, {"all": slice(None)}, folds)
    made = [make_folds(task, folds, seed) for seed in range(repeats)]
    for repeat in made:
        check_parts(task, source, {f"fold {i}": images for i, images in enumerate(repeat)}, 1)
    return made


def draw_labels(task, train, share, draw):
    """A stratified share of the training images, at least one a class, for all encoders alike."""
    rng = np.random.default_rng(draw)
    classes = range(len(task.classes))
    shuffled = [rng.permutation(train[task.labels[train] == label]) for label in classes]
    return np.sort(np.concatenate([of[: max(1, round(share * len(of)))] for of in shuffled]))


def duplicate_groups(hashes):
    """uint64 [n] -> int [n]: near-duplicates by complete linkage, so that chains stay apart."""
    groups = np.arange(len(hashes))
    for image in range(len(hashes)):
        [near] = near_duplicates(hashes[image : image + 1], SAME_IMAGE, hashes[:image])
        for group in np.unique(groups[:image][near]):
            if near[groups[:image] == group].all():
                groups[image] = group
                break
    return groups


def report(name, task, folds):
    """Print what a task holds, and how far the images that are tested depend on others.

    folds: checked_folds, or None for the task's split.
    """
    groups = len(np.unique(task.groups))
    print(f"{name}: {len(task.labels)} images, {groups} groups, classes {', '.join(task.classes)}")
    if len(task.classes) == 2:
        print(f"{name}: AUC and F1 are those of class {task.classes[1]}")
    everything = np.arange(len(task.labels))
    if folds:  # of whole groups
        tested, of_group = everything, 0
        sides = [sum(i * np.isin(everything, fold) for i, fold in enumerate(of)) for of in folds]
    else:
        train, val, tested = split_of(task).values()
        of_group = np.isin(task.groups[tested], task.groups[np.concatenate([train, val])]).sum()
        sides = [np.isin(everything, train)]
    pairs = near_pairs(task.hashes)
    across = [pairs[:, side[pairs[0]] != side[pairs[1]]] for side in sides]
    near = np.mean([np.isin(tested, leaking).sum() for leaking in across])
    print(
        f"{name}: {near:.0f} of {len(tested)} test images have a near-duplicate (hashes within "
        f"{SAME_IMAGE} bits) among the training images, {of_group} are of a group of the training "
        "or validation images"
    )
    if pairs.size:
        joining = np.mean(task.labels[pairs[0]] != task.labels[pairs[1]])
        print(f"{name}: {joining:.0%} of {pairs.shape[1]} near-duplicate pairs join two classes")
        if name == "images" and joining > 0.1:
            print(
                f"{name}: so hashes find the same level, not the same scan, and grouping by them "
                "is no protection: give labels.csv a column group, such as the patient"
            )


def near_pairs(hashes):
    """Which two images are near-duplicates, int [2, pairs]."""
    pairs = []
    for start in range(0, len(hashes), BLOCK):
        near = near_duplicates(hashes[start : start + BLOCK], SAME_IMAGE, hashes[start:])
        pairs.append(np.add(np.nonzero(np.triu(near, 1)), start))
    return np.concatenate(pairs, axis=1)


def find_one(folder, pattern):
    """The only file below folder that fits the pattern."""
    files = [file for file in sorted(folder.rglob(pattern)) if not file.name.startswith("._")]
    if len(files) != 1:
        named = ", ".join(str(file.relative_to(folder)) for file in files[:3])
        fail(f"{folder}: holds {len(files)} files {pattern}, one is needed: {named}")
    return files[0]


@contextmanager
def readable(file):
    """One line for whatever a damaged file makes a library raise."""
    try:
        yield
    except Exception as error:
        said = getattr(error, "strerror", None) or str(error)
        fail(f"{file}: cannot be used: {' '.join(said.split())}")


def read_table(path, needed, optional=()):
    """The lines of a CSV file, {column: text}: needed columns, and optional ones that it has."""
    lines = []
    with readable(path), open(path, encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restval="")
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        if missing := [name for name in needed if name not in reader.fieldnames]:
            raise ValueError(f"its first line lacks {', '.join(missing)} (or commas between)")
        if optional and (other := {*reader.fieldnames} - {*needed, *optional}):
            unused = f"columns not used: {', '.join(sorted(other))}; known: {', '.join(optional)}"
            print(f"warning: {path}: {unused}", file=sys.stderr)
        for line in reader:
            if None not in line and not any(map(str.strip, line.values())):
                continue
            cells = {name: line[name].strip() for name in (*needed, *optional) if name in line}
            if None in line or "" in cells.values():
                where = f"{path}: line {reader.line_num}: {line}"
                fail(f"{where} must tell {' and '.join(cells)}, commas in quotes, and no more")
            lines.append(cells)
    return lines


def read_grey(file):
    """An image file as grey values, uint8 [h, w]."""
    with readable(file):
        grey = read_image(file)
    return grey if grey.dtype == np.uint8 else scale_to_uint8(grey)
