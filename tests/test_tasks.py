"""The downstream sets: what is read, splits and folds, near-duplicates, what is refused."""

import io
import shutil

import imagehash
import numpy as np
import pytest
import torch
from conftest import write_covid_ct
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold
from torchvision.transforms.v2.functional import resize

from common import tasks
from common.hashing import SAME_IMAGE, hamming
from common.tasks import Task, load_task, split_of


def picture(path, seed):
    """Noise of its own at 40 x 30 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def covid(tmp_path):
    write_covid_ct(tmp_path / "covid", images=4)
    return tmp_path / "covid"


@pytest.fixture
def head(tmp_path):
    """40 heads, of which 28 and 29 are the same, with a haemorrhage in the first 20."""
    lines = ["id, hemorrhage"]
    for i in range(40):
        picture(tmp_path / "head_ct" / f"{i:03d}.png", 28 if i == 29 else i)
        lines.append(f"{i},{int(i < 20)}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def organ(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in {"train": 12, "val": 6, "test": 6}.items():
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.permutation(np.arange(n) % 3)[:, None]
    (tmp_path / "organ").mkdir()
    np.savez_compressed(tmp_path / "organ" / "organ.npz", **arrays)
    return tmp_path / "organ"


@pytest.fixture
def images(tmp_path):
    """36 images of three classes, two images a patient."""
    lines = ["file,label,split,group,note"]
    for i in range(36):
        picture(tmp_path / "scans" / f"{i}.png", i)
        label, part = [10, 9, 2][i % 3], ["train", "val", "test"][i // 12]
        lines.append(f"scans/{i}.png,{label},{part},patient {i // 2},")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def holds(task, i, file, label, part):
    """Whether image i of the task is this file, with its hash, class and part of the split."""
    original = np.array(Image.open(file))
    expected = resize(torch.from_numpy(original)[None], task.images.shape[1:], antialias=True)[0]
    assert np.abs(task.images[i] - expected.numpy().astype(int)).max() <= 1  # official code's
    assert f"{task.hashes[i]:016x}" == str(imagehash.dhash(Image.open(file)))
    assert task.classes[task.labels[i]] == label and i in split_of(task)[part]


def test_published_sets(covid, head, organ):
    """Each class, hash and part of the split is that of the file."""
    task = load_task("covid-ct", covid, 24)
    for i, image in enumerate(tasks.list_covid_ct(covid)):
        holds(task, i, image.file, image.label, image.split)
        assert (image.label == "1") == (image.file.parent.name == "CT_COVID")
        assert image.file.name.startswith(image.split)
    assert [len(of) for of in split_of(task).values()] == [8, 8, 8] and len(set(task.groups)) == 24
    assert (task.mean, task.std, task.flip) == (0.56, 0.2907, True)  # official code
    task = load_task("head-ct", head, 24)
    for i in (0, 19, 20, 39):
        [part] = [part for part, of in split_of(task).items() if i in of]
        holds(task, i, head / "head_ct" / f"{i:03d}.png", str(int(i < 20)), part)
    assert (task.mean, task.std, task.flip) == (0.56, 0.2907, True)  # those of COVID-CT there
    assert task.groups[28] == task.groups[29] and len(set(task.groups)) == 39
    task = load_task("organ", organ, 28)
    arrays = np.load(organ / "organ.npz")
    for part, of in split_of(task).items():
        assert np.array_equal(task.images[of], arrays[f"{part}_images"])
        assert np.array_equal(task.labels[of], arrays[f"{part}_labels"].ravel())
    assert (task.mean, task.std, task.flip) == (0.5, 0.5, False)
    assert task.classes == ["0", "1", "2"] and len(set(task.groups)) == 24
    assert load_task("organ", organ / "organ.npz", 28).digest == task.digest


def test_any_folder_with_labels_is_a_task(images, capsys):
    task = load_task("images", images, 16)
    for i in (0, 5, 13, 35):
        label = ["10", "9", "2"][i % 3]
        holds(task, i, images / "scans" / f"{i}.png", label, ["train", "val", "test"][i // 12])
    assert task.classes == ["2", "9", "10"]  # numbers as numbers
    assert (task.mean, task.std, task.flip) == (0.5, 0.5, False)  # not COVID-CT's
    assert len(set(task.groups)) == 18 and (task.groups[::2] == task.groups[1::2]).all()
    darker = np.array(Image.open(images / "scans" / "3.png")) // 2
    Image.fromarray(darker).save(images / "scans" / "7.png")
    deep = np.array(Image.open(images / "scans" / "8.png")).astype(np.uint16) * 100
    Image.fromarray(deep).save(images / "scans" / "8.png")
    labels = images / "labels.csv"
    text = labels.read_text().replace("group", "Group", 1).replace("/3.png,10", "/3.png, 10")
    labels.write_text(text, "utf-8-sig")  # as people, and spreadsheets, write it
    again = load_task("images", images, 16)
    assert len(set(again.groups)) == 18 and again.classes == task.classes
    holds(again, 7, images / "scans" / "7.png", "9", "train")  # as dark as it is
    assert np.abs(again.images[8] - task.images[8].astype(int)).max() <= 2  # min-max of 16 bits
    labels.write_text(labels.read_text().replace("Group", "patient_id", 1))
    load_task("images", images, 16)
    assert "columns not used: note, patient_id; known: split, group" in capsys.readouterr().err
    lines = labels.read_text().replace(",9,", ",benign,").splitlines()
    labels.write_text("\n".join(line.rsplit(",", 3)[0] for line in lines))
    task = load_task("images", images, 16)  # without groups and a split
    assert task.classes == ["10", "2", "benign"] and task.split is None
    assert task.groups[3] == task.groups[7] and len(set(task.groups)) == 35
    assert sorted(np.concatenate(list(split_of(task).values()))) == list(range(36))


def test_a_folder_is_a_class_where_there_is_no_list(images, capsys):
    (images / "labels.csv").unlink()
    for i, file in enumerate(sorted((images / "scans").iterdir())):
        folder = images / ["COVID", "non-COVID"][i % 2] / f"patient {i // 3}"  # of both classes
        folder.mkdir(parents=True, exist_ok=True)
        file.rename(folder / file.name)
        (folder / f"._{file.name}").write_bytes(b"of macOS")
        (folder / ".ipynb_checkpoints").mkdir(exist_ok=True)
        shutil.copy(folder / file.name, folder / ".ipynb_checkpoints")
        (folder / "series 2").mkdir(exist_ok=True)  # of the same patient
        if i % 4 > 1:
            (folder / file.name).rename(folder / "series 2" / file.name)
    (images / "notes.txt").touch()
    task = load_task("images", images, 16)
    warned = "a folder is a class: COVID (18), non-COVID (18); 1 other files"
    assert warned in capsys.readouterr().err
    assert task.labels.tolist() == [0] * 18 + [1] * 18 and len(set(task.groups)) == 12
    covid = tasks.with_positive(task, "COVID")  # of which AUC and F1 are
    assert covid.classes == ["non-COVID", "COVID"] and (covid.labels == 1 - task.labels).all()
    assert tasks.with_positive(task, "non-COVID") is task and covid.digest != task.digest
    with pytest.raises(SystemExit, match="--positive 1: is not one of two classes: COVID, non-"):
        tasks.with_positive(task, "1")
    alone = images / "COVID" / "patient 0" / "0.png"
    alone.rename(images / "COVID" / "0.png")  # a group of its own; the patients stay groups
    assert len(set(load_task("images", images, 16).groups)) == 13
    for old, new in (("COVID", "Train"), ("non-COVID", "TEST")):
        (images / old).rename(images / new)
    with pytest.raises(SystemExit, match="needs labels.csv"):  # parts of a split are no classes
        load_task("images", images, 16)


def test_a_last_batch_of_one_image_is_refused_where_it_cannot_be_trained(images, stopped):
    flags = ["--encoder", "scratch", "--arch", "resnet18", "--results", images / "a.csv"]
    flags += ["--size", 32, "--batch-size", 1]
    message = "--batch-size: 12 training images in batches of at most 1 leave one image alone"
    assert message in stopped("evaluate.py", "images", images, *flags)


def test_the_source_of_a_covid_ct_image_and_runs_of_numbers(covid):
    sources = {
        "2019-novel-dist_2020_Int-Jour-p3-89%0.png": "2019-novel-dist_2020_Int-Jour",
        "PIIS0140673620301549_0%1.png": "PIIS0140673620301549.png",
        "39%8.jpg": "39.jpg",
        "Lung-p38-MAPK-p3-89%0.png": "Lung-p38-MAPK",  # the last -p is the page
    }
    assert {name: tasks.covid_ct_source(name) for name in sources} == sources
    names = ["7.png", "8.png", "9.png", "11.png", "8.jpg", "8%1.jpg"]
    (covid / "Data-split" / "NonCOVID" / "trainCT_NonCOVID.txt").write_text(
        "\n".join(names), "utf-8-sig"
    )
    groups = {image.file.name: image.group for image in tasks.list_covid_ct(covid)}
    of = [groups[name] for name in names]
    assert of[0] == of[1] == of[2] and of[4] == of[5] and len(set(of)) == 3


def blank_task(labels, groups, split=None):
    """A Task of blank images, all that a split depends on."""
    labels, hashes = np.array(labels), np.arange(len(labels), dtype=np.uint64)
    blank = np.zeros((len(labels), 8, 8), np.uint8)
    return Task(blank, labels, [*map(str, np.unique(labels))], split, np.array(groups), hashes)


def test_a_group_of_two_classes_stays_on_one_side():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 3, 120), np.repeat(np.arange(40), 3)
    assert sum(len(set(labels[groups == group])) > 1 for group in range(40)) > 20
    task = blank_task(labels, groups)
    for parts in (split_of(task).values(), tasks.make_folds(task, 5, 1)):
        assert sum(len(set(groups[part])) for part in parts) == 40  # no group on two sides
        assert sorted(np.concatenate(list(parts))) == list(range(120))
        for part in parts:  # stratified
            shares = np.bincount(labels[part], minlength=3) / len(part)
            assert np.abs(shares - np.bincount(labels) / 120).max() < 0.1
    for seed, folds in enumerate(tasks.checked_folds(task, 5, 3)):
        reference = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for fold, (_, test) in zip(folds, reference.split(labels, labels, groups), strict=True):
            assert np.array_equal(fold, test)
    smallest = sorted(tasks.checked_folds(task, 5, 1)[0], key=len)  # of seed 0, just compared
    for part, fold in zip(("test", "val"), smallest, strict=False):
        assert np.array_equal(split_of(task)[part], fold)


def test_too_few_of_a_class_are_refused_before_anything_is_trained():
    few = blank_task([0] * 50 + [1] * 4, np.arange(54))
    one_patient = blank_task([0] * 50 + [1] * 20, [*range(50), *[99] * 20])
    for task, holds in ((few, "4 images of 4 groups"), (one_patient, "20 images of 1 groups")):
        originals = list(task.images)
        made = tasks.make_task("a", originals, task.labels, [""], 1 + task.groups, 8)
        with pytest.raises(SystemExit, match=f"labels.csv.* class 1 .{holds}. has . in (all|val)"):
            tasks.check_split(made, "labels.csv")
        with pytest.raises(SystemExit, match=f"--folds 5 are too many: class 1 .{holds}. has"):
            tasks.checked_folds(task, 5, 1)
    assert [len(repeat) for repeat in tasks.checked_folds(few, 4, 3)] == [4, 4, 4]
    three = blank_task([0, 1] * 12, np.arange(24) % 8 // 3)  # patients, each with both classes
    for check in (lambda: tasks.check_split(three, "a"), lambda: tasks.checked_folds(three, 5, 1)):
        with pytest.raises(SystemExit, match="5 folds of whole groups need 5 groups, not 3"):
            check()
    assert len(tasks.checked_folds(three, 3, 1)[0]) == 3


def test_a_draw_of_labels_is_a_share_of_each_class():
    labels = np.repeat([0, 1, 2], [200, 47, 3])
    task, train = blank_task(labels, labels), np.arange(8, 250)  # 19.2, 4.7 and 0.3 of the classes
    draws = [tasks.draw_labels(task, train, 0.1, draw).tolist() for draw in (0, 1, 2, 3, 3)]
    for drawn in draws:
        assert np.bincount(labels[drawn]).tolist() == [19, 5, 1] and set(drawn) <= set(train)
        assert len(set(drawn)) == 25
    assert len(set(map(tuple, draws))) == 4 and draws[3] == draws[4]  # for every encoder


def test_the_digest_changes_with_all_that_decides():
    task = blank_task([0, 1] * 6, range(12), np.repeat(["train", "val", "test"], 4))
    others = {"mean": 0.4, "std": 0.4, "flip": True, "images": task.images + 1}
    others |= {"groups": task.groups // 2}
    others |= {name: getattr(task, name)[::-1].copy() for name in ("labels", "split")}
    digests = {task._replace(**{name: value}).digest for name, value in others.items()}
    assert len({task.digest, *digests}) == 8


def flip_bits(value, bits):
    return value ^ np.uint64(sum(1 << int(bit) for bit in bits))


def test_a_chain_of_near_duplicates_does_not_swallow_the_set():
    """2,481 images, 1,407 of them linked, each two bits from the last."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 2481, np.uint64)
    for i in range(1, 1407):
        hashes[i] = flip_bits(hashes[i - 1], rng.choice(64, 2, replace=False))
    groups = tasks.duplicate_groups(hashes)
    for group in np.unique(groups):
        members = hashes[groups == group]
        assert hamming(members[:, None], members).max() <= SAME_IMAGE
    assert np.bincount(groups).max() < 20 and len(set(groups[:1407])) < 1000
    labels = rng.integers(0, 2, 2481)
    split = split_of(blank_task(labels, groups))
    shares = {part: len(of) / 2481 for part, of in split.items()}
    assert shares == pytest.approx({"train": 0.6, "val": 0.2, "test": 0.2}, abs=0.02)
    assert all(0.4 < labels[of].mean() < 0.6 for of in split.values())
    groups[:1407] = 0  # even were they all alike: a large group is for training
    train, val, test = split_of(blank_task(labels, groups)).values()
    assert set(range(1407)) <= set(train) and min(len(val), len(test)) > 200


def test_leaks_are_test_images_within_4_bits_of_a_training_image(capsys, monkeypatch):
    monkeypatch.setattr(tasks, "BLOCK", 7)  # so that there are several
    hashes = np.random.default_rng(0).integers(0, 2**64, 30, np.uint64)
    hashes[20] = hashes[5]
    hashes[21] = flip_bits(hashes[6], range(4))
    hashes[22] = flip_bits(hashes[7], range(5))  # too far
    hashes[23] = hashes[15]  # like a validation image only
    groups = np.arange(30)
    groups[[20, 25, 26]] = [5, 3, 13]
    task = blank_task([0, 1] * 15, groups, np.repeat(["train", "val", "test"], 10))
    hashes[24] = hashes[20]
    task = task._replace(hashes=hashes)
    tasks.report("mine", task, None)
    printed = capsys.readouterr().out
    assert "mine: 30 images, 27 groups, classes 0, 1\n" in printed
    assert "3 of 10 test images have a near-duplicate" in printed and ", 3 are of a" in printed
    pairs = [(5, 20), (5, 24), (20, 24), (6, 21), (15, 23)]
    assert [*zip(*tasks.near_pairs(hashes), strict=True)] == sorted(pairs)
    assert "60% of 5 near-duplicate pairs join two classes" in printed
    side = np.isin(np.arange(30), [5, 6, 20, 15, 23])  # so that 5 and 20 meet in one fold
    tasks.report("mine", task, [[np.flatnonzero(side), np.flatnonzero(~side)]] * 2)
    assert "5 of 30 test images have a near-duplicate" in capsys.readouterr().out


def replace(old, new):
    return lambda content: content.replace(old.encode(), new.encode(), 1)


def array(key, change):
    def edit(content):
        arrays = dict(np.load(io.BytesIO(content)))
        arrays[key] = change(arrays[key])
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    return edit


@pytest.mark.parametrize(
    "task, file, change, words",
    [
        ("images", "labels.csv", replace("patient 2", ""), "line 6 group ''"),
        ("images", "labels.csv", replace("scans/5", "scans,5"), "line 7 commas quotes"),
        ("images", "labels.csv", replace("file,label", "image,label"), "lacks file"),
        ("images", "labels.csv", replace("train,patient 2", "dev,patient 2"), "'dev' train, val"),
        ("images", "labels.csv", replace("scans/5", "scans/4"), "scans/4.png listed 2 times"),
        ("images", "labels.csv", replace("scans/5", "scans/99"), "scans/99.png"),
        ("images", "labels.csv", replace("5.png,2", "5.png,2.0"), "label 2 several ways"),
        ("images", "labels.csv", replace("5.png,2", "5.png,NaN"), "nan empty"),
        ("images", "labels.csv", None, "labels.csv file,label split group folder each class"),
        ("images", "5.png", lambda old: b"DICM" * 99, "5.png no picture"),
        ("head-ct", "labels.csv", replace("5,1\n", "5,2\n"), "class 2 1 images needed"),
        ("head-ct", "labels.csv", lambda old: b"", "first line lacks id, hemorrhage"),
        ("head-ct", "labels.csv", lambda old: b"\xff\xfe\x00junk", "labels.csv"),
        ("head-ct", "labels.csv", lambda old: old.replace(b",1\n", b",0\n"), "class 0"),
        ("head-ct", "007.png", lambda old: old[: len(old) // 2], "007.png"),
        ("covid-ct", "valCT_COVID.txt", lambda old: b"val0-p0-1%0.png\n", "class 1 1 in val"),
        ("covid-ct", "testCT_COVID.txt", replace("test0-p0", "train0-p0"), "listed 2 times"),
        ("covid-ct", "testCT_COVID.txt", None, "0 files testCT_COVID.txt"),
        (
            "organ",
            "organ.npz",
            lambda old: old[:3000] + b"junk" + old[3004:],
            "organ.npz used: CRC",
        ),
        ("organ", "organ.npz", array("val_labels", lambda a: a + 0.5), "organ.npz val float"),
        ("organ", "organ.npz", array("test_labels", lambda a: a[1:]), "test (6, 28, 28) (5, 1)"),
        ("organ", "organ.npz", array("test_labels", lambda a: 0 * a), "class 1 0 in test"),
        ("organ", "organ.npz", array("val_labels", lambda a: a.astype(object)), "used: pickle"),
        ("organ", "organ.npz", array("val_images", lambda a: a[..., None]), "val (6, 28, 28, 1)"),
    ],
)
def test_a_bad_file_is_named(request, task, file, change, words):
    data = request.getfixturevalue(task.replace("-ct", ""))
    [path] = data.rglob(file)
    before = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(before))
        assert path.read_bytes() != before
    with pytest.raises(SystemExit) as caught:
        tasks.check_split(load_task(task, data, 24), data)
    message = str(caught.value)
    assert message.startswith(f"error: {data}") and "\n" not in message
    assert all(word in message for word in words.split()), message
