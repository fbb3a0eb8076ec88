"""reduce.py, tiny, on toy CT: the files it writes, every strategy's rule, budgets, wrong flags."""

import json
import shutil

import imagehash
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

import reduce
from common import pictures, reduction, similarity
from common.encoder import load_encoder
from common.reduction import STRATEGIES, Strategy
from common.store import read_lines, read_selection, read_store


@pytest.fixture
def selected(store, here):
    """selected(name, flags): what reduce.py, run in this process, wrote: (NAME.csv, NAME.json)."""

    def call(name, flags, *more):
        flags = ["--size", 32, "--workers", 1, "--strategy", *flags.split(), *more]
        here("reduce.py", store.parent / "ct", store, *flags)
        return table(store / f"{name}.csv"), summary_of(store / f"{name}.json")

    return call


def table(path):
    return list(read_lines(path))


def summary_of(path):
    return json.loads(path.read_text())


def kept_slices(selection):
    return [i for i, line in enumerate(selection) if line["kept"] == "1"]


def slices_by_volume(store):
    return [volume.tolist() for volume in read_store(store).volumes]


def hashes_of(store):
    return [imagehash.hex_to_hash(line["dhash"]) for line in table(store / "slices.csv")]


def test_reduce_writes_the_contract(store):
    slices = np.load(store / "slices.npy")
    lines = table(store / "slices.csv")
    selection = table(store / "hash-6.csv")
    assert slices.shape == (59, 32, 32) and slices.dtype == np.uint8
    assert list(lines[0]) == ["row", "volume", "position", "file", "dhash"]
    assert list(selection[0]) == ["row", "kept", "representative", "similarity"]
    [skipped] = table(store / "skipped.csv")
    assert "pixel data" in skipped["reason"]
    hashes = hashes_of(store)
    for i, (line, chosen) in enumerate(zip(lines, selection, strict=True)):
        representative = int(chosen["representative"])
        assert int(line["row"]) == int(chosen["row"]) == i
        assert line["volume"] == lines[representative]["volume"]
        assert selection[representative]["kept"] == "1"
        assert int(chosen["similarity"]) == hashes[i] - hashes[representative] <= 6
        assert (chosen["kept"] == "1") == (representative == i)
    for volume in slices_by_volume(store):
        assert np.all(np.diff([float(lines[i]["position"]) for i in volume]) > 0)
    summary = summary_of(store / "hash-6.json")
    assert summary["slices"] == 59 and summary["kept"] == len(kept_slices(selection))
    assert {"reduce.py", "common/reduction.py", "common/ct.py"} <= summary["code"].keys()
    assert "common/encoder.py" not in summary["code"], "it had no part in it"
    written = "".join(file.read_text() for file in store.glob("*.[cj]s*"))
    patient = str(pydicom.dcmread(store.parent / "ct" / lines[0]["file"]).PatientName)
    assert patient and patient not in written


@pytest.mark.parametrize("strategy, threshold", [("ssim", 0.9), ("mi", 0.6), ("embedding", 0.999)])
def test_similarity_strategies_keep_the_rule(store, selected, encoder, strategy, threshold):
    flags = f"{strategy} --encoder {encoder}" if strategy == "embedding" else strategy
    selection, _ = selected(f"{strategy}-{threshold}", f"{flags} --threshold {threshold}")
    slices = np.load(store / "slices.npy")
    for volume in slices_by_volume(store):
        compare = measure(strategy, slices[volume], encoder)
        kept = [k for k, i in enumerate(volume) if selection[i]["kept"] == "1"]
        for k, i in enumerate(volume):
            alike = dict(zip(kept, compare(k, kept), strict=True))
            first = next((j for j in kept if j < k and alike[j] >= threshold), k)
            assert int(selection[i]["representative"]) == volume[first]
            [expected] = compare(k, [first])
            assert float(selection[i]["similarity"]) == pytest.approx(expected, abs=1e-5)
    assert 0 < len(kept_slices(selection)) < 59
    _, summary = selected(f"{strategy}-keep-0.25", f"{flags} --keep 0.25 --workers 2")
    assert abs(summary["kept"] - 0.25 * 59) <= 1
    assert summary["settings"]["threshold"] is None and summary["threshold"] < 1


def measure(strategy, slices, encoder):
    """compare(first, others) of a volume's slices."""
    if strategy == "ssim":
        return similarity.ssim(slices)
    if strategy == "mi":
        return similarity.mutual_information(slices)
    network = load_encoder(encoder, "resnet18", 0).eval()
    grey = (torch.from_numpy(slices).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        features = network(grey[:, None].expand(-1, 3, -1, -1)).numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return lambda first, others: unit[others] @ unit[first]


@pytest.mark.parametrize("budget", [0.3, 17])
def test_hash_to_a_budget_and_over_the_data_set(store, selected, budget):
    """The plain loop over all slices at once, at each of the 65 thresholds."""
    hashes = hashes_of(store)
    counts = []
    for threshold in range(65):
        kept = []
        for image in hashes:
            if all(image - other > threshold for other in kept):
                kept.append(image)
        counts.append(len(kept))
    name = f"hash-keep-{budget}-dataset"
    _, summary = selected(name, f"hash --scope dataset --keep {budget}")
    target = budget if budget > 1 else budget * len(hashes)
    assert summary["kept"] == min(counts, key=lambda count: abs(count - target))
    assert summary["kept"] == counts[summary["threshold"]]


@pytest.mark.parametrize("strategy", ["random", "every-n"])
def test_a_budget_is_a_share_a_number_or_as_many_as_a_selection_keeps(store, selected, strategy):
    as_hash = summary_of(store / "hash-6.json")["kept"]
    budgets = {"7": 7, "0.5": 30, "1": 59, store / "hash-6.csv": as_hash}
    for i, (budget, kept) in enumerate(budgets.items()):
        name = f"{strategy}.b+c_d-{i}"
        selection, summary = selected(name, f"{strategy} --name {name}", "--keep", budget)
        assert summary["kept"] == len(kept_slices(selection)) == kept
    assert summary["settings"]["keep"] == as_hash
    _, summary = selected("redundant-keep-0.1", "redundant")
    assert summary["kept"] == 6, "a tenth, where no budget is given"


def test_random_every_n_and_redundant_keep_as_many_of_each_volume_as_another(store, selected):
    given, _ = selected("uneven", "random --keep 20 --scope dataset --name uneven")
    counts = [np.isin(kept_slices(given), volume).sum() for volume in slices_by_volume(store)]
    assert len(set(counts)) > 1
    different = {tuple(kept_slices(given))}
    for strategy, seed in [("random", ""), ("every-n", ""), ("redundant", ""), ("random", 3)]:
        name, flags = f"{strategy}-like-uneven", strategy
        if seed:
            name, flags = f"{name}-seed-{seed}", f"{flags} --seed {seed}"
        selection, summary = selected(name, flags, "--like", store / "uneven.csv")
        kept = kept_slices(selection)
        assert [np.isin(kept, volume).sum() for volume in slices_by_volume(store)] == counts
        assert summary["settings"]["like"] == "uneven"
        different.add(tuple(kept))
    assert len(different) == 5


def test_random_slices_are_drawn_anew_in_each_volume(store, selected):
    selection, _ = selected("random-keep-0.5", "random --keep 0.5")
    kept = kept_slices(selection)
    of_19, *of_20 = [np.isin(volume, kept) for volume in slices_by_volume(store)]
    assert len(of_19) == 19 and not np.array_equal(*of_20)


def test_a_finished_selection_stays_and_an_unfinished_one_is_made_again(store, here):
    flags = [store.parent / "ct", store, "--size", 32, "--strategy", "random", "--keep", 0.4]
    files = [store / f"random-keep-0.4.{ending}" for ending in ("json", "csv", "png")]
    here("reduce.py", *flags)
    before = [file.read_bytes() for file in files]
    files[2].unlink()
    assert "random-keep-0.4: done before\n" in here("reduce.py", *flags)
    assert not files[2].exists(), "nothing is made"
    for missing in files[:2]:
        missing.unlink()
        here("reduce.py", *flags)
        assert [file.read_bytes() for file in files] == before, missing


def test_a_selection_made_otherwise_is_refused(store, here, stopped, encoder, tmp_path):
    data, store = store.parent / "ct", shutil.copytree(store, tmp_path / "store")
    command = ["reduce.py", data, store, "--size", 32, "--name", "A", "--strategy"]

    def refused(*flags):
        line = stopped(*command, *flags)
        assert "A.csv: was made otherwise (" in line
        return line

    given = store / "hash-6.csv"
    for budget in ("--like", "--keep"):
        flags = ["random", budget, given]
        here(*command, *flags)
        assert "seed 0 -> 1" in refused(*flags, "--seed", 1)
        before = given.read_text()
        given.write_text(before.replace("\n1,0,0,", "\n1,0,0,1", 1))
        assert "(given " in refused(*flags), "another selection of the same name"
        given.write_text(before)
        (store / "A.json").unlink()
    other = data.parent / "store" / "hash-6.csv"  # with equal slices
    assert "belongs to another store" in stopped(*command, "random", "--like", other)
    here(*command, "embedding", "--encoder", encoder)
    copy = shutil.copy(encoder, tmp_path / "copy.pt")
    assert "done before" in here(*command, "embedding", "--encoder", copy)
    torch.save(load_encoder("scratch", "resnet18", 1).state_dict(), copy)
    assert "(encoder " in refused("embedding", "--encoder", copy)


def test_every_flag_that_decides_a_selection_is_among_its_settings(store, monkeypatch):
    monkeypatch.setattr("sys.argv", ["reduce.py", "ct", str(store), "--strategy", "hash"])
    args = reduce.parse_args()
    decisive = vars(args).keys() - {"data", "out", "name", "workers"}
    assert reduce.settings_of(args, None).keys() == decisive | {"given", "store"}


def test_every_selection_says_its_dose(store, selected):
    """The near-duplicates by a plain double loop; one batch holds all that stay."""
    hashes = hashes_of(store)
    doses = []
    for strategy in ("hash", "random", "redundant"):
        selection, summary = selected(f"{strategy}-keep-0.3", f"{strategy} --keep 0.3")
        kept = set(kept_slices(selection))
        near = 0
        for volume in slices_by_volume(store):
            stay = kept.intersection(volume)
            near += sum(hashes[a] - hashes[b] <= 6 for a in stay for b in stay - {a})
        doses.append(summary["dose"])
        assert doses[-1] == pytest.approx(near / len(kept), abs=1e-6)
    assert doses[0] < doses[1] < doses[2]
    assert summary_of(store / "hash-6.json")["dose"] == 0


def test_wrong_flags_of_reduce_get_one_line(store, stopped):
    shutil.copy(store / "hash-6.json", store / "empty.json")
    lines = ["row,kept,representative,similarity", *(f"{i},{int(i == 0)},0,0" for i in range(59))]
    (store / "empty.csv").write_text("\n".join(lines))  # only slice 0 stays
    command = ["reduce.py", store.parent / "ct", store, "--size", 32, "--strategy"]
    for flags, line in (
        ("ssim --scope dataset", "ssim compares slices within a volume"),
        ("ssim --like {store}/hash-6.csv", "ssim takes no --like"),
        ("random --threshold 3", "random takes no --threshold"),
        ("mi --threshold 5", "a similarity is between -1 and 1"),
        ("embedding", "needs --encoder"),
        ("embedding --encoder nowhere.pt", "no such file"),
        ("hash --encoder imagenet", "hash takes no --encoder"),
        ("all --keep 0.5", "all takes no --keep"),
        ("hash --keep 0", "is not a share"),
        ("hash --keep 9999", "(all slices)"),
        ("random --like {store}/none.csv", "no such selection"),
        ("random --like {store}/empty.csv", "keeps no slice of 2 volumes"),
        ("hash --window 40 0", "above 0 HU"),
        ("hash --name a/b", "a/b is no name"),
        ("hash --threshold 2.5", "whole number, 0 to 64"),
        ("random --like {store}/hash-6.csv --scope dataset", "does not go with --scope dataset"),
        ("hash --keep 1.5", "is not a share"),
        ("random --keep 2", "must be 3 (one slice a volume) to"),
        ("random --keep {store}/hash-5.csv", "no such selection"),
        ("hash --name slices", "slices is no name"),
    ):
        assert line in stopped(*command, *flags.format(store=store).split())


def test_a_new_strategy_follows_from_one_line_of_the_table(store, selected, monkeypatch):
    """One by threshold and one by count; budgets and scopes follow."""

    def ends(group, threshold):
        stays = np.r_[:threshold, -threshold:0] % len(group.hashes)
        return reduction.keep_count(lambda group, count: np.unique(stays), group, 0)

    def middle(group, count):
        return np.arange(count) + (len(group.hashes) - count) // 2

    new = {"ends": Strategy("T of each end stay", ends, None, None, range(1, 11))}
    new["middle"] = Strategy("those in the middle stay", None, middle)
    for name, strategy in new.items():
        monkeypatch.setitem(STRATEGIES, name, strategy)
    for name, flags, kept in (
        ("ends-2", "ends --threshold 2", 12),
        ("ends-keep-17", "ends --keep 17", 18),
        ("ends-keep-0.1", "ends", 6),  # a tenth, where there is no default
        ("middle-keep-10-dataset", "middle --keep 10 --scope dataset", 10),
        ("middle-like-ends-2", f"middle --like {store / 'ends-2.csv'}", 12),
    ):
        assert selected(name, flags)[1]["kept"] == kept, name
    kept = kept_slices(table(store / "ends-2.csv"))
    assert kept == [i for v in slices_by_volume(store) for i in (v[0], v[1], v[-2], v[-1])]


def test_the_contact_sheet_shows_slices_that_stay(store, monkeypatch):
    words = []
    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, "text", lambda *drawn: words.append(drawn[2]))
    store, kept, representative, _ = read_selection(store / "hash-6.csv")
    sheet = np.asarray(pictures.contact_sheet("hash-6", store, representative))
    assert words[0].startswith(f"hash-6: {len(kept)} of 59 slices kept, 3 of 3 volumes shown")
    first = np.intersect1d(kept, store.volumes[0])
    assert words[1] == f"patient-00: {len(first)} of 19 slices kept"
    assert words[2] == f"slice {first[0]}  x{np.count_nonzero(representative == first[0])}"
    assert sum(word.startswith("slice 0  x") for word in words) == 3, "numbers within a volume"
    shown = Image.fromarray(store.slices[first[0]]).resize((110, 110), Image.Resampling.BILINEAR)
    top = pictures.TITLE + pictures.GAP + pictures.TITLE
    assert np.array_equal(sheet[top : top + 110, pictures.GAP : pictures.GAP + 110, 0], shown)


def test_agreement_prints_what_selections_share(store, selected, here):
    names = ["all", "every-n-3"]
    selection, summary = selected("every-n-3", "every-n --threshold 3")
    printed = here("results.study.agreement", *(store / f"{name}.csv" for name in names))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    kept = len(kept_slices(selection))
    shares = [volume["kept"] / volume["slices"] for volume in summary["volumes"].values()]
    spread = f"{min(shares):.1%} to {max(shares):.1%}"
    dose = f"{summary['dose']:.2f}"
    assert cells[3] == ["every-n-3", str(kept), f"{kept / 59:.1%}", spread, dose]
    assert [cells[5], cells[7]] == [["Jaccard", *names], ["all", "1.00", f"{kept / 59:.2f}"]]
