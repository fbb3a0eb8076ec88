"""The downstream data sets, in the layouts in which they are published, and what is refused by name."""

import numpy as np
import pytest
from PIL import Image

from common.hashing import hamming
from common.tasks import (
    DUPLICATE_BITS,
    Task,
    checked,
    checked_folds,
    covid_ct_source,
    duplicate_groups,
    leaks,
    load_task,
    make_folds,
    near_pairs,
    split_of,
)


def picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def covid(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("COVID", "NonCOVID"):
        for part, n in (("train", 4), ("val", 2), ("test", 3)):
            listing = tmp_path / "Data-split" / kind / f"{part}CT_{kind}.txt"
            listing.parent.mkdir(parents=True, exist_ok=True)
            listing.write_text("".join(f"{part} {i}.png\n" for i in range(n)))
            for i in range(n):
                picture(
                    tmp_path / f"CT_{kind}" / f"{part} {i}.png",
                    rng.integers(0, 256, (40, 30), dtype=np.uint8),
                )
    return tmp_path


@pytest.fixture
def head(tmp_path):
    """40 heads, of which 28 and 29 are the same."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 40, 30), dtype=np.uint8)
    images[29] = images[28]
    for i, image in enumerate(images):
        picture(tmp_path / "head_ct" / f"{i:03d}.png", image)
    (tmp_path / "labels.csv").write_text(
        "id, hemorrhage\n" + "".join(f"{i},{int(i < 20)}\n" for i in range(40))
    )
    return tmp_path


@pytest.fixture
def organ():
    """What an organ.npz holds."""
    rng = np.random.default_rng(0)
    counts = {"train": 12, "val": 6, "test": 6}
    images = {
        f"{part}_images": rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for part, n in counts.items()
    }
    return images | {
        f"{part}_labels": np.arange(n, dtype=np.uint8)[:, None] % 3 for part, n in counts.items()
    }


def test_covid_ct_has_its_published_split(covid):
    task = load_task("covid-ct", covid, 24)
    sizes = {part: len(rows) for part, rows in split_of(task).items()}
    assert sizes == {"train": 8, "val": 4, "test": 6}
    assert task.images.shape == (18, 24, 24) and task.labels.sum() == 9 and task.vertical_flip
    assert task.names[0] == "CT_NonCOVID/train 0.png" and task.names[-1] == "CT_COVID/test 2.png"


def test_a_head_seen_twice_stays_on_one_side_of_every_split(head):
    task = load_task("head-ct", head, 24)
    assert near_pairs(task.hashes) == [(28, 29, 0)] and task.names[28] == "head_ct/028.png"
    assert task.groups[28] == task.groups[29] and len(set(task.groups)) == 39
    for seed in range(20):
        folds = make_folds(task, 5, seed)
        assert sorted(np.concatenate(folds)) == list(range(40))
        assert any({28, 29} <= set(rows) for rows in folds)
        assert all(3 <= task.labels[rows].sum() <= 5 for rows in folds)
    assert any(
        not np.array_equal(make_folds(task, 5, 0)[0], make_folds(task, 5, seed)[0])
        for seed in range(1, 5)
    )
    split = split_of(task)
    assert sorted(np.concatenate(list(split.values()))) == list(range(40))
    assert any({28, 29} <= set(rows) for rows in split.values())
    assert all(4 <= task.labels[split[part]].sum() <= 12 for part in split)


def made_task(labels, groups):
    """A Task of blank images, all that a split depends on."""
    n = len(labels)
    images = np.zeros((n, 8, 8), np.uint8)
    classes = [str(label) for label in np.unique(labels)]
    return Task(images, np.array(labels), classes, None, np.array(groups), [], np.zeros(n, int))


def test_a_group_of_two_classes_stays_on_one_side():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 3, 120), np.repeat(np.arange(40), 3)
    assert sum(len(set(labels[groups == group])) > 1 for group in range(40)) > 20
    task = checked(made_task(labels, groups), "labels.csv")
    for parts in (split_of(task).values(), make_folds(task, 5, 1)):
        sides = [set(groups[rows]) for rows in parts]
        assert sum(map(len, sides)) == 40  # no group on two sides
        assert all(set(labels[rows]) == {0, 1, 2} for rows in parts)


def test_a_chain_of_near_duplicates_does_not_swallow_the_set():
    """2,481 images, 1,407 of them linked, each two bits from the last."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 2481, np.uint64)
    for i in range(1, 1407):
        flipped = rng.choice(64, 2, replace=False)
        hashes[i] = hashes[i - 1] ^ np.uint64(sum(1 << int(bit) for bit in flipped))
    bits = hamming(hashes[:1407, None], hashes[:1407])
    assert (np.diag(bits, 1) <= DUPLICATE_BITS).all()  # one chain
    groups = duplicate_groups(hashes)
    for group in np.unique(groups):
        members = hashes[groups == group]
        assert hamming(members[:, None], members).max() <= DUPLICATE_BITS
    assert np.bincount(groups).max() < 20
    labels = rng.integers(0, 2, 2481)
    task = checked(made_task(labels, groups), "labels.csv")
    shares = {part: len(rows) / 2481 for part, rows in split_of(task).items()}
    assert shares == pytest.approx({"train": 0.6, "val": 0.2, "test": 0.2}, abs=0.02)
    assert all(0.4 < labels[rows].mean() < 0.6 for rows in split_of(task).values())


def test_a_large_group_is_for_training():
    """Even 1,407 images that are all alike leave enough to validate and to test."""
    labels = np.arange(2481) % 2
    task = checked(made_task(labels, np.r_[np.zeros(1407, int), 1 + np.arange(1074)]), "labels.csv")
    split = split_of(task)
    assert set(range(1407)) <= set(split["train"])
    assert all(len(split[part]) > 200 for part in ("val", "test"))


def test_a_split_without_a_class_is_refused_before_anything_is_trained():
    few = made_task(np.r_[np.zeros(50, int), np.ones(4, int)], np.arange(54))
    with pytest.raises(SystemExit, match="labels.csv: class 1 holds 4 images"):
        checked(few, "labels.csv")
    one_patient = made_task(np.r_[np.zeros(50, int), np.ones(20, int)], [*range(50), *[99] * 20])
    with pytest.raises(SystemExit, match="split holds 0 images of class 1"):
        checked(one_patient, "labels.csv")
    with pytest.raises(SystemExit, match="class 1 holds only 4 images: use fewer folds"):
        checked_folds(few, 5, 1)
    with pytest.raises(SystemExit, match="class 1, whose images are of 1 groups"):
        checked_folds(one_patient, 5, 1)
    assert [len(repeat) for repeat in checked_folds(few, 4, 3)] == [4, 4, 4]


@pytest.mark.parametrize(
    "name, source",
    [
        ("2020.03.01.20029769-p21-73_1%0.png", "2020.03.01.20029769"),
        ("2020.03.22.20040782-p24-1533-4.png", "2020.03.22.20040782"),
        (
            "2019-novel-dist_2020_International-Jour-p3-89%0.png",
            "2019-novel-dist_2020_International-Jour",
        ),
        ("kjr-21-e24-p2-8.png", "kjr-21-e24"),
        ("PIIS0140673620301549_0%1.png", "PIIS0140673620301549.png"),
        ("PIIS0140673620303603%8.png", "PIIS0140673620303603.png"),
        ("39%8.jpg", "39.jpg"),
        ("12.jpg", "12.jpg"),
    ],
)
def test_the_source_of_a_covid_ct_image(name, source):
    assert covid_ct_source(name) == source


def test_numbered_images_of_covid_ct_are_grouped_by_runs(covid):
    names = ["7.png", "8.png", "9.png", "11.png", "8.jpg", "8%1.jpg"]
    listing = covid / "Data-split" / "NonCOVID" / "trainCT_NonCOVID.txt"
    listing.write_text("\n".join(names))
    for name in names:
        picture(covid / "CT_NonCOVID" / name, np.zeros((20, 20), np.uint8))
    task = load_task("covid-ct", covid, 24)
    group = dict(zip(task.names, task.groups))
    groups = [group[f"CT_NonCOVID/{name}"] for name in names]
    assert groups[0] == groups[1] == groups[2] and groups[4] == groups[5]
    assert len(set(groups)) == 3


@pytest.fixture
def folder(tmp_path):
    """A folder for the task images: 36 images, three classes, two images a patient."""
    rng = np.random.default_rng(0)
    lines = ["file,label,split,group"]
    for i in range(36):
        picture(tmp_path / "scans" / f"{i}.png", rng.integers(0, 256, (20, 30), dtype=np.uint8))
        part = ["train", "val", "test"][i // 12]
        lines.append(f"scans/{i}.png,{[10, 9, 2][i % 3]},{part},patient {i // 2}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def without(folder, *columns):
    """Take columns out of labels.csv."""
    lines = [line.split(",") for line in (folder / "labels.csv").read_text().splitlines()]
    stay = [i for i, name in enumerate(lines[0]) if name not in columns]
    text = "".join(",".join(line[i] for i in stay) + "\n" for line in lines)
    (folder / "labels.csv").write_text(text)


def test_any_folder_with_labels_is_a_task(folder):
    task = load_task("images", folder, 16)
    assert task.classes == ["2", "9", "10"] and task.labels[:4].tolist() == [2, 1, 0, 2]
    assert task.names[5] == "scans/5.png" and task.images.shape == (36, 16, 16)
    sizes = {part: len(rows) for part, rows in split_of(task).items()}
    assert sizes == {"train": 12, "val": 12, "test": 12}
    assert len(set(task.groups)) == 18 and (task.groups[::2] == task.groups[1::2]).all()
    (folder / "labels.csv").write_text(
        (folder / "labels.csv").read_text().replace(",9,", ",benign,")
    )
    assert load_task("images", folder, 16).classes == ["10", "2", "benign"]


def test_groups_and_split_of_images_are_optional(folder):
    without(folder, "split", "group")
    picture(folder / "scans" / "7.png", np.asarray(Image.open(folder / "scans" / "3.png")) // 2)
    task = load_task("images", folder, 16)
    assert task.split is None and task.groups[3] == task.groups[7]
    assert len(set(task.groups)) == 35
    assert sorted(np.concatenate(list(split_of(task).values()))) == list(range(36))


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("scans/5.png,2,", "scans/5.png,,", "labels.csv: line 7: label empty"),
        ("train,patient 2", "dev,patient 2", "labels.csv: line 6: split 'dev' train, val or test"),
        ("train,patient 2", ",patient 2", "labels.csv: line 6: split empty"),
        ("patient 2", "", "labels.csv: line 6: group empty"),
        ("scans/5.png", "scans/4.png", "labels.csv: line 7: scans/4.png line 6 already"),
        ("scans/5.png", "scans/99.png", "labels.csv: line 7: scans/99.png"),
        ("scans/5.png", "scans/5,5.png", "labels.csv: line 7: more cells quote"),
        ("file,label", "image,label", "labels.csv: columns file label image"),
    ],
)
def test_bad_labels_of_images_are_named(folder, old, new, words):
    edit(folder / "labels.csv", old, new)
    refused("images", folder, *words.split())


def test_leaks_are_the_nearest_training_images(tmp_path, organ):
    organ["train_images"][7] = organ["test_images"][2] // 2
    organ["train_images"][8] = organ["train_images"][7]
    organ["train_images"][8][:, :4] = 0  # alike, but less so
    np.savez(tmp_path / "organ.npz", **organ)
    task = load_task("organ", tmp_path, 24)
    split = split_of(task)
    found = leaks(task, split)
    bits = {
        (i, j): int(hamming(task.hashes[i], task.hashes[j]))
        for i in split["test"]
        for j in split["train"]
    }
    nearest = {i: min(split["train"], key=lambda j: bits[i, j]) for i in split["test"]}
    assert found == [(i, j, bits[i, j]) for i, j in nearest.items() if bits[i, j] <= DUPLICATE_BITS]
    assert [(task.names[i], task.names[j]) for i, j, _ in found] == [("test 2", "train 7")]


def refused(name, data, *words):
    with pytest.raises(SystemExit) as caught:
        load_task(name, data, 24)
    message = str(caught.value)
    assert (
        message.startswith(f"error: {data}")
        and "\n" not in message
        and all(word in message for word in words)
    ), message


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("5,1\n", "5,2\n", "labels.csv: line 7: 5 2"),
        ("5,1\n", "5,yes\n", "labels.csv: line 7: 5 yes"),
        ("5,1\n", "5\n", "labels.csv: line 7: 5"),
        ("5,1\n", "5,\n", "labels.csv: line 7: 5"),
        ("5,1\n", "five,1\n", "labels.csv: line 7: five"),
        ("5,1\n", "4,1\n", "labels.csv: line 7: 4 again"),
        ("5,1\n", "99,1\n", "099.png"),
        ("hemorrhage", "label", "labels.csv: columns hemorrhage id,label"),
        (",1\n", ",0\n", None),
    ],
)
def test_bad_labels_of_head_ct_are_named(head, old, new, words):
    edit(head / "labels.csv", old, new)
    if words is None:  # a class of fewer than the splits need
        (head / "labels.csv").write_text((head / "labels.csv").read_text().replace(",1\n", ",0\n"))
        words = "labels.csv: all images are of class 0"
    refused("head-ct", head, *words.split())


@pytest.mark.parametrize("content", [b"", b"id,hemorrhage\n", b"\xff\xfe\x00junk"])
def test_a_labels_file_of_nothing_is_named(head, content):
    (head / "labels.csv").write_bytes(content)
    refused("head-ct", head, "labels.csv")


@pytest.mark.parametrize("harm", ["cut short", "empty", "text", "missing"])
def test_a_broken_image_is_named(head, harm):
    file = head / "head_ct" / "007.png"
    whole = file.read_bytes()
    file.unlink()
    if harm != "missing":
        file.write_bytes(
            {"cut short": whole[: len(whole) // 2], "empty": b"", "text": b"junk"}[harm]
        )
    refused("head-ct", head, "007.png")


@pytest.mark.parametrize(
    "file, text, words",
    [
        (
            "COVID/trainCT_COVID.txt",
            "train 0.png\ntrain 0.png\n",
            "trainCT_COVID.txt: train 0.png already",
        ),
        (
            "COVID/testCT_COVID.txt",
            "train 0.png\n",
            "testCT_COVID.txt: train 0.png trainCT_COVID.txt already",
        ),
        ("COVID/valCT_COVID.txt", "nowhere.png\n", "valCT_COVID.txt: nowhere.png"),
        ("COVID/valCT_COVID.txt", "val 0.png\n", "the val split holds 1 images of class 1"),
        ("COVID/valCT_COVID.txt", "\n", "valCT_COVID.txt: no image"),
        ("COVID/valCT_COVID.txt", None, "valCT_COVID.txt"),
    ],
)
def test_bad_split_files_of_covid_ct_are_named(covid, file, text, words):
    listing = covid / "Data-split" / file
    listing.unlink()
    if text is not None:
        listing.write_text(text)
    refused("covid-ct", covid, *words.split())


@pytest.mark.parametrize(
    "key, change, words",
    [
        ("train_labels", lambda a: a.astype(int) - 1, "train_labels int64 not negative"),
        ("val_labels", lambda a: a + 0.5, "val_labels float"),
        ("val_labels", lambda a: np.where(a == 1, np.nan, a), "val_labels float"),
        ("val_labels", lambda a: a.astype(str), "val_labels <U"),
        ("test_labels", lambda a: a[1:], "test_labels [5, 1] 6 images"),
        ("test_labels", lambda a: np.zeros_like(a), "test split 0 images of class 1"),
        ("train_labels", lambda a: a.astype(object), "damaged"),
        ("train_images", lambda a: a / 255, "train_images float64"),
        ("train_images", lambda a: np.stack([a] * 3, -1), "train_images [12, 28, 28, 3]"),
        ("val_images", lambda a: a[:0], "val_images [0, 28, 28]"),
        ("val_images", None, "val_images"),
    ],
)
def test_bad_arrays_of_an_npz_are_named(tmp_path, organ, key, change, words):
    organ[key] = None if change is None else change(organ[key])
    np.savez(
        tmp_path / "organ.npz",
        **{name: array for name, array in organ.items() if array is not None},
    )
    refused("organ", tmp_path, "organ.npz", *words.split())


@pytest.mark.parametrize(
    "classes, words", [([0, 0, 0], "class 1"), ([0, 1, 3], "class 2"), ([1, 2, 3], "class 0")]
)
def test_missing_classes_of_an_npz_are_named(tmp_path, organ, classes, words):
    for part in ("train", "val", "test"):
        organ[f"{part}_labels"] = np.array(classes)[organ[f"{part}_labels"]]
    np.savez(tmp_path / "organ.npz", **organ)
    refused("organ", tmp_path, "organ.npz", words, "holds no image")


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[:-100],
        lambda data: data[:3000] + b"junk" + data[3004:],
        lambda data: b"",
        lambda data: b"no zip at all",
    ],
)
def test_a_damaged_npz_is_named(tmp_path, organ, harm):
    np.savez_compressed(tmp_path / "organ.npz", **organ)
    (tmp_path / "organ.npz").write_bytes(harm((tmp_path / "organ.npz").read_bytes()))
    refused("organ", tmp_path, "organ.npz", "damaged")
