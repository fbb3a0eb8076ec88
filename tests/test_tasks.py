"""The downstream data sets, in the layouts in which they are published, and what is refused by name."""

import numpy as np
import pytest
from PIL import Image

from common.hashing import hamming
from common.tasks import DUPLICATE_BITS, leaks, load_task, near_pairs, split_of


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
    assert {part: len(rows) for part, rows in split_of(task, 0).items()} == {
        "train": 8,
        "val": 4,
        "test": 6,
    }
    assert task.images.shape == (18, 24, 24) and task.labels.sum() == 9 and task.vertical_flip
    assert task.names[0] == "CT_NonCOVID/train 0.png" and task.names[-1] == "CT_COVID/test 2.png"


def test_a_head_seen_twice_stays_on_one_side_of_every_split(head):
    task = load_task("head-ct", head, 24)
    assert near_pairs(task.hashes) == [(28, 29, 0)] and task.names[28] == "head_ct/028.png"
    for seed in range(20):
        split = split_of(task, seed)
        assert sorted(np.concatenate(list(split.values()))) == list(range(40))
        assert any({28, 29} <= set(rows) for rows in split.values())
        assert all(4 <= task.labels[split[part]].sum() <= 12 for part in split)
    assert any(
        not np.array_equal(split_of(task, 0)["test"], split_of(task, s)["test"])
        for s in range(1, 5)
    )


def test_leaks_are_the_nearest_training_images(tmp_path, organ):
    organ["train_images"][7] = organ["test_images"][2] // 2
    organ["train_images"][8] = organ["train_images"][7]
    organ["train_images"][8][:, :4] = 0  # alike, but less so
    np.savez(tmp_path / "organ.npz", **organ)
    task = load_task("organ", tmp_path, 24)
    split = split_of(task, 0)
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
        words = "labels.csv: class 1 holds no image"
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
