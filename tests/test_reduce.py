"""reduce.py, tiny, on toy CT: the files it writes, every strategy's rule, budgets, wrong flags."""

import csv
import json
import shutil

import imagehash
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

import reduce
from common import ct, reduction, similarity, toy
from common.encoder import load_encoder


@pytest.fixture(scope="module")
def made(tmp_path_factory, run):
    """ct/: a toy cohort of 3 patients with one file cut short; store/: its hash-6 selection."""
    folder = tmp_path_factory.mktemp("made")
    toy.write_cohort(folder / "ct", patients=3, slices=20)
    cut = sorted((folder / "ct").rglob("*.dcm"))[5]
    cut.write_bytes(cut.read_bytes()[:-500])
    done = run("reduce.py", folder / "ct", folder / "store", "--strategy", "hash", "--size", 32)
    return folder, cut, done.stdout


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder.pt with random weights."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    torch.save(load_encoder("scratch", "resnet18", 0).state_dict(), path)
    return path


@pytest.fixture
def selected(made, here):
    """selected(name, flags): what reduce.py, run in this process, wrote: (NAME.csv, NAME.json)."""

    def call(name, *flags):
        store = made[0] / "store"
        here("reduce.py", made[0] / "ct", store, "--size", 32, "--workers", 1, *flags)
        return table(store / f"{name}.csv"), summary_of(store / f"{name}.json")

    return call


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def summary_of(path):
    return json.loads(path.read_text())


def kept_rows(selection):
    return [row for row, line in enumerate(selection) if line["kept"] == "1"]


def rows_by_volume(store):
    volumes = {}
    for row, line in enumerate(table(store / "slices.csv")):
        volumes.setdefault(line["volume"], []).append(row)
    return volumes


def hashes_of(store):
    return np.array([int(line["dhash"], 16) for line in table(store / "slices.csv")], np.uint64)


def test_reduce_writes_the_contract(made):
    folder, cut, stdout = made
    store = folder / "store"
    slices = np.load(store / "slices.npy")
    rows = table(store / "slices.csv")
    selection = table(store / "hash-6.csv")
    files = list((folder / "ct").rglob("*.dcm"))
    assert slices.shape == (len(files) - 1, 32, 32) and slices.dtype == np.uint8
    assert list(rows[0]) == ["row", "volume", "position", "file", "dhash"]
    assert list(selection[0]) == ["row", "kept", "representative", "similarity"]
    assert len(rows) == len(selection) == len(slices)
    [skipped] = table(store / "skipped.csv")
    assert skipped["file"] == cut.relative_to(folder / "ct").as_posix()
    assert "pixel data" in skipped["reason"]
    assert "1 file skipped" in stdout
    hashes = [imagehash.hex_to_hash(row["dhash"]) for row in rows]
    for row, line in zip(rows, selection):
        representative = int(line["representative"])
        assert row["volume"] == rows[representative]["volume"]
        assert selection[representative]["kept"] == "1"
        assert int(line["similarity"]) == hashes[int(row["row"])] - hashes[representative] <= 6
        assert (line["kept"] == "1") == (representative == int(line["row"]))
        pixels = ct.read_slice(folder / "ct" / row["file"])
        assert row["dhash"] == str(imagehash.dhash(Image.fromarray(pixels)))
    for members in rows_by_volume(store).values():
        assert np.all(np.diff([float(rows[row]["position"]) for row in members]) > 0)
    summary = summary_of(store / "hash-6.json")
    assert summary["slices"] == len(slices)
    assert summary["kept"] == len(kept_rows(selection))
    assert set(reduce.CODE) == set(summary["code"])
    written = "".join(file.read_text() for file in store.glob("*.[cj]s*"))
    patient = str(pydicom.dcmread(files[0]).PatientName)
    assert patient and patient not in written
    assert Image.open(store / "hash-6.png").width > 1000


@pytest.mark.parametrize("strategy, threshold", [("ssim", 0.9), ("mi", 0.6), ("embedding", 0.999)])
def test_similarity_strategies_keep_the_rule(made, run, encoder, strategy, threshold):
    folder, store = made[0], made[0] / "store"
    flags = ["--strategy", strategy, "--size", 32]
    if strategy == "embedding":
        flags += ["--encoder", encoder]
    run("reduce.py", folder / "ct", store, *flags, "--threshold", threshold)
    slices = np.load(store / "slices.npy")
    selection = table(store / f"{strategy}-{threshold}.csv")
    features = plain_features(encoder, slices)
    for rows in rows_by_volume(store).values():
        if strategy == "embedding":
            compare = similarity.cosine(features[rows])
        else:
            compare = similarity.MEASURES[strategy](slices[rows])
        kept = [i for i, row in enumerate(rows) if selection[row]["kept"] == "1"]
        for i, row in enumerate(rows):
            found = compare(i, kept)
            first = next((k for k, value in zip(kept, found) if value >= threshold and k < i), i)
            assert int(selection[row]["representative"]) == rows[first]
            expected = compare(i, [first])[0]
            assert float(selection[row]["similarity"]) == pytest.approx(expected, abs=1e-5)
    assert 0 < len(kept_rows(selection)) < len(slices)
    run("reduce.py", folder / "ct", store, *flags, "--keep", 0.25)
    summary = summary_of(store / f"{strategy}-keep-0.25.json")
    assert abs(summary["kept"] - 0.25 * summary["slices"]) <= 1
    assert summary["settings"]["threshold"] < 1


def plain_features(encoder, slices):
    network = load_encoder(encoder, "resnet18", 0).eval()
    grey = (torch.from_numpy(slices).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        return network(grey[:, None].expand(-1, 3, -1, -1)).numpy()


def test_features_are_made_again_when_the_code_was_edited(
    made, selected, encoder, tmp_path, monkeypatch
):
    """An edited encoder.py must not select by the features of the old one."""
    flags = ["--strategy", "embedding", "--encoder", encoder]
    selected("embedding-0.997", *flags)
    [features] = (made[0] / "store").glob("features-*.npy")
    right = features.read_bytes()
    wrong = bytearray(right)
    wrong[-40:] = bytes(40)
    features.write_bytes(wrong)
    selected("embedding-0.997", *flags)
    assert features.read_bytes() == wrong, "the same code reads them again"
    monkeypatch.setattr(reduce, "code_digest", lambda *names: dict.fromkeys(names, "edited"))
    _, summary = selected("embedding-0.997", *flags)
    assert features.read_bytes() == right
    assert "common/encoder.py" in summary["code"]


def test_hash_to_a_budget_and_over_the_data_set(made, selected):
    hashes = hashes_of(made[0] / "store")
    kept = {t: len(set(reduction.select_hash(hashes, t))) for t in range(65)}
    flags = ["--strategy", "hash", "--scope", "dataset", "--keep"]
    for budget, target in ((0.3, 0.3 * len(hashes)), (17, 17)):
        _, summary = selected(f"hash-keep-{budget}-dataset", *flags, budget)
        closest = min(kept.values(), key=lambda count: abs(count - target))
        assert summary["kept"] == kept[summary["settings"]["threshold"]] == closest


def test_a_budget_is_a_share_up_to_1_and_a_number_of_slices_from_2(made, selected):
    n = len(hashes_of(made[0] / "store"))
    for strategy in ("random", "every-n"):
        for budget, kept in (("7", 7), ("30", 30), ("0.5", round(n / 2)), ("1", n), ("1.0", n)):
            name = f"{strategy}-keep-{budget.removesuffix('.0')}"
            selection, summary = selected(name, "--strategy", strategy, "--keep", budget)
            assert summary["kept"] == len(kept_rows(selection)) == kept
            assert summary["settings"]["keep"] == float(budget)


def test_random_every_n_and_redundant_keep_as_many_of_each_volume_as_another(made, selected):
    store = made[0] / "store"
    given = set(kept_rows(table(store / "hash-6.csv")))
    kept = {}
    for strategy in ("random", "every-n", "redundant"):
        name = f"{strategy}-like-hash-6"
        flags = ["--strategy", strategy, "--like", store / "hash-6.csv"]
        selection, summary = selected(name, *flags)
        kept[strategy] = kept_rows(selection)
        for rows in rows_by_volume(store).values():
            here = given.intersection(rows)
            stay = np.intersect1d(kept[strategy], rows)
            assert len(stay) == len(here)
            for row in rows:
                nearest = min(stay, key=lambda other: (abs(other - row), other))
                assert int(selection[row]["representative"]) == nearest
        assert summary["settings"]["like"] == "hash-6"
    assert len({tuple(rows) for rows in kept.values()} | {tuple(sorted(given))}) == 4
    flags = ["--strategy", "random", "--seed", 3, "--like", store / "hash-6.csv"]
    seed_3, _ = selected("random-like-hash-6-seed-3", *flags)
    assert len(kept_rows(seed_3)) == len(given) and kept_rows(seed_3) != kept["random"]


def test_every_selection_says_its_dose(made, selected):
    store = made[0] / "store"
    hashes = hashes_of(store)
    volumes = np.empty(len(hashes), int)
    for number, rows in enumerate(rows_by_volume(store).values()):
        volumes[rows] = number
    doses = {}
    for strategy in ("hash", "random", "redundant"):
        selection, summary = selected(f"{strategy}-keep-0.3", "--strategy", strategy, "--keep", 0.3)
        kept = kept_rows(selection)
        doses[strategy] = summary["dose"]
        expected = reduction.expected_dose(hashes[kept], volumes[kept])
        assert doses[strategy] == pytest.approx(expected, abs=1e-6)
    assert doses["hash"] < doses["random"] < doses["redundant"]
    assert summary_of(store / "hash-6.json")["dose"] == 0


def test_compare_prints_what_selections_share(made, selected, here, stopped, tmp_path):
    store = made[0] / "store"
    selected("all", "--strategy", "all")
    _, summary = selected("every-n-3", "--strategy", "every-n", "--threshold", 3)
    selected("every-n-6", "--strategy", "every-n", "--threshold", 6)
    names = ["all", "every-n-3", "every-n-6"]
    printed = here("reduce.py", "compare", *(store / f"{name}.csv" for name in names))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    share = summary["kept"] / summary["slices"]
    volume_shares = [volume["kept"] / volume["slices"] for volume in summary["volumes"].values()]
    assert cells[3] == [
        "every-n-3",
        str(summary["kept"]),
        f"{share:.1%}",
        f"{min(volume_shares):.1%} to {max(volume_shares):.1%}",
        f"{summary['dose']:.2f}",
    ]
    sets = [set(kept_rows(table(store / f"{name}.csv"))) for name in names]
    assert cells[6] == ["Jaccard", *names]
    for name, mine, row in zip(names, sets, cells[8:], strict=True):
        assert row == [name, *(f"{len(mine & other) / len(mine | other):.2f}" for other in sets)]
    shutil.copytree(store, tmp_path / "other")
    for path, line in (("other/all.csv", "another store"), ("none.csv", "no such selection")):
        assert line in stopped("reduce.py", "compare", store / "all.csv", tmp_path / path)


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--strategy", "ssim", "--scope", "dataset"], "--scope dataset is for"),
        (["--strategy", "embedding"], "--encoder belong together"),
        (["--strategy", "ssim", "--threshold", "nan"], "a similarity is between -1 and 1"),
        (["--strategy", "mi", "--threshold", 5], "a similarity is between -1 and 1"),
        (["--strategy", "random", "--seed", -1], "--seed -1: must be at least 0"),
        (["--strategy", "hash", "--workers", 0], "--workers 0: must be at least 1"),
        (["--strategy", "embedding", "--encoder", "nowhere.pt"], "no such file"),
        (["--strategy", "embedding", "--encoder", "imagenet"], "cannot be downloaded"),
        (["--strategy", "hash", "--threshold", 2.5], "whole number"),
        (["--strategy", "every-n", "--threshold", 0], "whole number"),
        (["--strategy", "mi", "--threshold", 0.5, "--keep", 0.1], "exclude each other"),
        (["--strategy", "random", "--threshold", 3], "use --keep"),
        (["--strategy", "all", "--keep", 0.5], "keeps every slice"),
        (["--strategy", "hash", "--keep", 1.5], "not a share"),
        (["--strategy", "hash", "--keep", 0], "not a share"),
        (["--strategy", "random", "--keep", 2], "each of the 3 volumes keeps at least one"),
        (["--strategy", "random", "--keep", 9999], "there are only"),
        (["--strategy", "redundant", "--threshold", 3], "use --keep"),
        (["--strategy", "redundant", "--scope", "dataset"], "within a volume"),
        (["--strategy", "hash", "--like", "{store}/hash-6.csv"], "not for hash"),
        (["--strategy", "random", "--like", "{store}/hash-6.csv", "--keep", 5], "exclude each"),
        (["--strategy", "random", "--like", "{store}/hash-5.csv"], "no such selection"),
        (["--strategy", "random", "--like", "{store}/../other/a.csv"], "another store"),
        (["--strategy", "random", "--like", "{store}/empty.csv"], "keeps no slice of 2 volumes"),
        (
            ["--strategy", "random", "--like", "{store}/hash-6.csv", "--scope", "dataset"],
            "does not go with --scope dataset",
        ),
    ],
)
def test_wrong_flags_of_reduce_get_one_line(made, stopped, tmp_path, monkeypatch, flags, line):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers: as without internet
    store = made[0] / "store"
    write_selection_of_one_volume(store)
    flags = [str(flag).format(store=store) for flag in flags]
    assert line in stopped("reduce.py", made[0] / "ct", store, "--size", 32, *flags)


def write_selection_of_one_volume(store):
    """store/empty.csv keeps slice 0 alone; other/a.csv lies elsewhere."""
    summary = summary_of(store / "hash-6.json")
    (store / "empty.json").write_text(json.dumps(summary))
    lines = ["row,kept,representative,similarity"]
    lines += [f"{row},{int(row == 0)},0,0" for row in range(summary["slices"])]
    (store / "empty.csv").write_text("\n".join(lines))
    (store / "../other").mkdir(exist_ok=True)
    (store / "../other/a.csv").touch()
