"""evaluate.py: its lines, their scores, what is repeated, reused or refused."""

import csv
import json
import multiprocessing
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_covid_ct
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.preprocessing import StandardScaler
from torchvision.transforms import Normalize

import evaluate
from common import simclr, toy
from common.encoder import IMAGENET_MEAN, IMAGENET_STD, encoder_hash, features, load_encoder
from common.results import COLUMNS, read_results, read_scores, scores_file, write_line
from common.tasks import leaks, load_task, make_folds, split_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The toy tasks, and images/: 60 pictures of 20 patients, brighter in class b."""
    folder = tmp_path_factory.mktemp("data")
    toy.write_tasks(folder, size=32)
    rng = np.random.default_rng(0)
    lines = ["file,label,group"]
    (folder / "images").mkdir()
    for i in range(60):
        label = (i // 3) % 2
        image = rng.integers(0, 200 + 30 * label, (32, 32), dtype=np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        lines.append(f"{i}.png,{'ab'[label]},patient {i // 3}")
    (folder / "images" / "labels.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Three encoder.pt with random weights, the first with a log of its pre-training beside it."""
    folder = tmp_path_factory.mktemp("encoders")
    paths = [folder / f"run-{i}" / "encoder.pt" for i in range(3)]
    for i, path in enumerate(paths):
        path.parent.mkdir()
        torch.save(load_encoder("scratch", "resnet18", i).state_dict(), path)
    log = [
        {"settings": {"slices": 100, "steps": 12}},
        {"epoch": 1, "step": 8, "seconds": 2.0, "dose": 1.0},
        {"epoch": 2, "step": 12, "seconds": 1.5, "dose": 4.0},
    ]
    lines = "".join(json.dumps(line) + "\n" for line in log)
    (paths[0].parent / "log.jsonl").write_text(lines)
    return paths


def flags(results, *encoders, protocol="linear"):
    command = ["--results", results, "--arch", "resnet18", "--size", 32, "--protocol", protocol]
    return [*command, "--encoder", *encoders]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_evaluate_writes_one_line_a_seed_and_its_scores(data, tmp_path, here):
    results = tmp_path / "results.csv"
    short = ["--epochs", 1, "--freeze-epochs", 0, "--seeds", 2]
    fine_tuned = ["toy-lesion", data, *flags(results, "scratch", protocol="finetune"), *short]
    probed = ["toy-organ", data, *flags(results, "scratch"), "--seeds", 2, "--name", "ALL"]
    here("evaluate.py", *probed)
    here("evaluate.py", *fine_tuned)
    again = here("evaluate.py", *fine_tuned)
    assert again.count("done before") == 2
    rows = table(results)
    assert [(r["task"], r["name"], r["protocol"], r["seed"]) for r in rows] == [
        ("toy-organ", "ALL", "linear", "0"),
        ("toy-organ", "ALL", "linear", "1"),
        ("toy-lesion", "scratch", "finetune", "0"),
        ("toy-lesion", "scratch", "finetune", "1"),
    ]
    for row in rows:
        path = "results-scores/{task}-{name}-{protocol}-{seed}.npz".format(**row)
        scores = np.load(tmp_path / path)
        labels, p = scores["labels"], scores["probabilities"]
        binary = p.shape[1] == 2
        positive = p[:, 1] if binary else p / p.sum(1, keepdims=True)
        expected = roc_auc_score(labels, positive, multi_class="ovr")
        assert float(row["auc"]) == pytest.approx(expected, abs=2e-5)
        assert len(labels) == int(row["test"]) == len(set(scores["groups"]))
        expected = f1_score(labels, p.argmax(1), average="binary" if binary else "macro")
        assert float(row["f1"]) == pytest.approx(expected, abs=1e-5)
        expected = accuracy_score(labels, p.argmax(1))
        assert float(row["accuracy"]) == pytest.approx(expected, abs=1e-5)
        assert row["label_share"] == "1" and row["folds"] == row["auc_sd"] == ""
    tables = here("evaluate.py", "tables", results)
    mean = np.mean([float(row["auc"]) for row in rows[:2]])
    assert "| ALL | -" in tables and f"| {mean:.3f} ± " in tables
    listed = table(tmp_path / "results-scores" / "near-duplicates-toy-organ.csv")
    task = load_task("toy-organ", data, 32)
    pairs = leaks(task, split_of(task))
    assert [tuple(row.values()) for row in listed] == [
        (task.names[i], task.names[j], str(bits)) for i, j, bits in pairs
    ]
    found = len(table(tmp_path / "results-scores" / "near-duplicates-toy-lesion.csv"))
    assert f"toy-lesion: {found} of" in again


def test_finetune_gives_the_seeds_the_encoders_in_turns_and_linear_a_line_an_encoder(
    data, encoders, tmp_path, stopped, here
):
    results = tmp_path / "results.csv"
    short = ["--epochs", 1, "--seeds"]
    fine_tuned = ["toy-lesion", data, *flags(results, *encoders, protocol="finetune"), *short]
    here("evaluate.py", *fine_tuned, 4)
    here("evaluate.py", "toy-lesion", data, *flags(results, *encoders))
    rows = read_results(results)
    numbers = [(row["protocol"], int(row["seed"]), row["encoder"]) for row in rows]
    hashes = [encoder_hash(path) for path in encoders]
    assert numbers == [("finetune", seed, hashes[seed % 3]) for seed in range(4)] + [
        ("linear", seed, hashes[seed]) for seed in range(3)
    ]
    assert len({row["auc"] for row in rows[4:]}) > 1 and {row["name"] for row in rows} == {"run-0"}
    assert "leaves some of the 3 encoders unused" in stopped("evaluate.py", *fine_tuned, 2)
    columns = ("slices", "steps", "dose", "pretrain_seconds")
    assert [rows[4][key] for key in columns] == ["100", "12", "2.0000", "3.5"]
    assert [rows[5][key] for key in columns] == [""] * 4


@pytest.mark.parametrize(
    "statistics", [((0.5,) * 3, (0.5,) * 3), (0.5, 0.5), (IMAGENET_MEAN, IMAGENET_STD)]
)
def test_features_are_those_of_the_plain_forward(statistics):
    images = np.random.default_rng(0).integers(0, 256, (150, 32, 32), dtype=np.uint8)
    network = load_encoder("scratch", "resnet18", 0).train()
    network(torch.rand(16, 3, 32, 32))  # batch norm with statistics of its own
    colours = torch.from_numpy(images).float().div(255)[:, None].expand(-1, 3, -1, -1)
    mean, std = (np.broadcast_to(value, 3).tolist() for value in statistics)
    with torch.inference_mode():
        expected = network.eval()(Normalize(mean, std)(colours)).numpy()
    torch.backends.cudnn.allow_tf32 = True
    found = [np.concatenate(list(features(network, images, statistics, CPU, ""))) for _ in range(2)]
    assert np.abs(found[0] - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.array_equal(*found)
    assert not torch.backends.cudnn.allow_tf32


def probability_of(features, labels, train, test, scaled_on, c):
    scaler = StandardScaler().fit(features[scaled_on])
    model = LogisticRegression(C=c, max_iter=2000)
    model.fit(scaler.transform(features[train]), labels[train])
    return model.predict_proba(scaler.transform(features[test]))


def features_of(path, task):
    network = load_encoder(path, "resnet18", 0)
    return np.concatenate(list(features(network, task.images, (0.5, 0.5), CPU, "")))


def test_label_shares_use_few_labels_and_the_same_for_all_encoders(data, encoders, tmp_path, here):
    results = tmp_path / "results.csv"
    shares = ["--label-share", 0.001, 0.1, 1, "--draws", 3, "--device", "cpu"]
    printed = here("evaluate.py", "toy-organ", data, *flags(results, *encoders[:2]), *shares)
    assert "toy-organ run-0 linear labels 0.1 seed 1: AUC" in printed and "(SD 0." in printed
    rows = read_results(results)
    assert [(row["seed"], row["label_share"], row["train"], row["val"]) for row in rows] == [
        ("0", "0.001", "6", "0"),
        ("0", "0.1", str(len_of_share(data)), "0"),
        ("0", "1", "300", "120"),
        ("1", "0.001", "6", "0"),
        ("1", "0.1", str(len_of_share(data)), "0"),
        ("1", "1", "300", "120"),
    ]
    task = load_task("toy-organ", data, 32)
    split = split_of(task)
    test = split["test"]
    assert scores_file(results, rows[4]).name == "toy-organ-run-0-linear-share-0.1-1.npz"
    images, labels, groups, probabilities = read_scores(results, rows[4])
    assert probabilities.shape == (3, 240, 6) and np.array_equal(images, test)
    found = features_of(encoders[1], task)
    drawn = [evaluate.draw_labels(task, split["train"], 0.1, draw) for draw in range(3)]
    assert len({tuple(members) for members in drawn}) == 3
    for members, part in zip(drawn, probabilities):
        assert set(members) <= set(split["train"]) and set(task.labels[members]) == set(range(6))
        expected = probability_of(found, task.labels, members, test, split["train"], 0.01)
        assert np.abs(part - expected).max() < 1e-3
    values = [roc_auc_score(labels, part, multi_class="ovr") for part in probabilities]
    assert float(rows[4]["auc"]) == pytest.approx(np.mean(values), abs=1e-4)
    assert float(rows[4]["auc_sd"]) == pytest.approx(np.std(values, ddof=1), abs=1e-4)
    best_auc = 0
    for c in evaluate.C_GRID:  # C by validation AUC, on all training images
        parts = [split["val"], test]
        on_val, on_test = (
            roc_auc_score(
                task.labels[rows],
                probability_of(found, task.labels, split["train"], rows, split["train"], c),
                multi_class="ovr",
            )
            for rows in parts
        )
        if on_val > best_auc:
            best_auc, expected = on_val, on_test
    assert float(rows[5]["auc"]) == pytest.approx(expected, abs=2e-3)
    again = here("evaluate.py", "toy-organ", data, *flags(results, *encoders[:2]), *shares)
    assert again.count("done before") == 6


def len_of_share(data):
    labels = np.load(data / "toy-organ.npz")["train_labels"].ravel()
    return sum(max(1, round(0.1 * count)) for count in np.bincount(labels))


def test_folds_test_every_image_once_a_repeat_and_keep_groups_together(
    data, encoders, tmp_path, here
):
    results = tmp_path / "results.csv"
    folds = ["--folds", 4, "--repeats", 3]
    printed = here("evaluate.py", "images", data / "images", *flags(results, encoders[0]), *folds)
    assert "they are no new data: it is the same 60 images" in printed
    assert "AUC and F1 are those of class b" in printed
    [row] = read_results(results)
    assert (row["folds"], row["train"], row["val"], row["test"]) == ("4x3", "45", "0", "60")
    assert scores_file(results, row).name == "images-run-0-linear-folds-4x3-0.npz"
    images, labels, groups, probabilities = read_scores(results, row)
    assert probabilities.shape == (12, 60, 2) and images.tolist() == list(range(60))
    assert len(set(groups)) == 20
    tested = ~np.isnan(probabilities[:, :, 0])
    assert (tested.reshape(3, 4, 60).sum(1) == 1).all()
    for part in tested:
        assert not set(groups[part]) & set(groups[~part])
    task = load_task("images", data / "images", 32)
    found = features_of(encoders[0], task)
    for repeat in range(3):
        for fold, rows in enumerate(make_folds(task, 4, repeat)):
            train = np.setdiff1d(images, rows)
            expected = probability_of(found, labels, train, rows, train, 0.01)
            part = probabilities[4 * repeat + fold]
            assert np.abs(part[rows] - expected).max() < 1e-3
    values = [roc_auc_score(labels[t], p[t, 1]) for t, p in zip(tested, probabilities)]
    of_repeats = np.reshape(values, (3, 4)).mean(1)
    assert float(row["auc"]) == pytest.approx(of_repeats.mean(), abs=1e-4)
    assert float(row["auc_sd"]) == pytest.approx(of_repeats.std(ddof=1), abs=1e-4)


def test_fine_tuning_starts_from_the_encoder_as_it_is(data):
    """The first forward pass is the first batch's: batch norm's statistics are the encoder's."""
    task = load_task("toy-lesion", data, 32)
    encoder = load_encoder("scratch", "resnet18", 0)
    encoder.bn1.running_mean += 0.5
    seen = []

    def record(module, inputs):
        seen.append((len(inputs[0]), {k: v.clone() for k, v in module.state_dict().items()}))

    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.register_forward_pre_hook(record)
    args = SimpleNamespace(
        lr=1e-4,
        weight_decay=5e-4,
        epochs=1,
        freeze_epochs=0,
        batch_size=50,
        name="x",
        precision="float32",
    )
    evaluate.finetune(encoder, task, split_of(task), 0, args, CPU)
    batch, state = seen[0]
    assert batch == 50
    assert all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fine_tuning_is_repeatable_in_both_precisions(data, precision):
    task = load_task("toy-lesion", data, 32)
    split = {part: rows[:20] for part, rows in split_of(task).items()}
    args = SimpleNamespace(
        lr=1e-3,
        weight_decay=5e-4,
        epochs=2,
        freeze_epochs=1,
        batch_size=10,
        name="x",
        precision=precision,
    )
    torch.backends.cudnn.deterministic = False
    runs = []
    for _ in range(2):
        encoder = load_encoder("scratch", "resnet18", 0)
        runs.append(evaluate.finetune(encoder, task, split, 0, args, CPU))
    assert np.array_equal(*runs) and runs[0].dtype == np.float32
    assert torch.backends.cudnn.deterministic
    assert np.allclose(runs[0].sum(1), 1, atol=1e-5)


def test_a_line_made_in_another_precision_is_made_anew(data, tmp_path, here, monkeypatch):
    write_covid_ct(tmp_path / "covid-ct")
    results = tmp_path / "results.csv"
    command = ["covid-ct", tmp_path / "covid-ct"]
    command += [*flags(results, "scratch", protocol="finetune"), "--epochs", 1, "--seeds", 1]
    for pays, precision in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(simclr, "bf16_pays", lambda device: pays)
        assert "done before" not in here("evaluate.py", *command)
        [row] = read_results(results)
        assert f" precision={precision} " in row["settings"]
    assert "done before" in here("evaluate.py", *command, "--precision", "bfloat16")


def test_lines_of_edited_code_are_refused_not_reused(data, tmp_path, here, stopped, monkeypatch):
    results = tmp_path / "results.csv"
    command = ["evaluate.py", "toy-lesion", data, *flags(results, "scratch"), "--seeds", 1]
    here(*command)
    before = results.read_bytes()
    monkeypatch.setattr(evaluate, "one_digest", lambda *names: "0" * 8)
    line = stopped(*command)
    assert "lines of toy-lesion were made by other code" in line and "another --results" in line
    assert "made by other code" in stopped(*command, "--name", "another-row")
    assert results.read_bytes() == before
    task = ["evaluate.py", "toy-organ", data, *flags(results, "scratch"), "--seeds", 1]
    assert "AUC" in here(*task)  # its lines are not compared with those


def test_a_line_is_never_replaced_by_one_of_another_encoder(data, tmp_path, here, stopped):
    """Two encoders without a log are both seed 0 of their row."""
    results = tmp_path / "results.csv"
    for i in range(2):
        weights = load_encoder("scratch", "resnet18", i).state_dict()
        torch.save(weights, tmp_path / f"{i}.pt")
    here("evaluate.py", "toy-lesion", data, *flags(results, tmp_path / "0.pt"), "--name", "ALL")
    before = results.read_bytes()
    command = ["evaluate.py", "toy-lesion", data, *flags(results, tmp_path / "1.pt")]
    assert "seed 0 is of another encoder" in stopped(*command, "--name", "ALL")
    assert results.read_bytes() == before
    assert "AUC" in here(*command, "--name", "other")


def test_a_line_is_never_replaced_by_one_of_other_data(data, tmp_path, here, stopped):
    """Two folders of one's own images are both the task `images`."""
    results = tmp_path / "results.csv"
    other = tmp_path / "other"
    shutil.copytree(data / "images", other)
    labels = (other / "labels.csv").read_text()
    (other / "labels.csv").write_text(labels.replace(",a,", ",x,").replace(",b,", ",a,"))
    end = [*flags(results, "scratch"), "--seeds", 1]
    here("evaluate.py", "images", data / "images", *end)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "on other images, labels or groups" in stopped("evaluate.py", "images", other, *end)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "AUC" in here("evaluate.py", "images", other, *end, "--size", 40)


def write_lines(results, name):
    for seed in range(9):
        row = dict.fromkeys(COLUMNS, "1") | {"name": name, "seed": str(seed), "folds": ""}
        scores = np.full((20, 2), seed / 9)
        write_line(results, row, np.arange(20), np.arange(20) % 2, np.arange(20), scores)


def test_evaluations_at_the_same_time_share_a_results_file(tmp_path):
    """Three of them, two of the same row."""
    results = tmp_path / "results.csv"
    context = multiprocessing.get_context("fork")
    names = ("one", "two", "one")
    processes = [context.Process(target=write_lines, args=(results, name)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = read_results(results)
    lines = sorted((row["name"], row["seed"]) for row in rows)
    assert lines == [(name, str(seed)) for name in ("one", "two") for seed in range(9)]
    for row in rows:
        assert (read_scores(results, row)[3] == np.float32(int(row["seed"]) / 9)).all()
    assert not list(tmp_path.rglob("*.unfinished"))


def test_what_is_not_finite_gets_one_line(data, encoders, tmp_path, stopped):
    broken = torch.load(encoders[0], weights_only=True)
    broken["conv1.weight"][0] = torch.nan
    torch.save(broken, tmp_path / "encoder.pt")
    results = tmp_path / "results.csv"
    command = ["evaluate.py", "toy-lesion", data, *flags(results, tmp_path / "encoder.pt")]
    assert "features that are not finite" in stopped(*command)
    command = ["evaluate.py", "toy-lesion", data, *flags(results, "scratch", protocol="finetune")]
    assert "diverged" in stopped(*command, "--seeds", 1, "--epochs", 1, "--lr", 1e30)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--protocol", "linear", "--folds", 31], "class a holds only 30 images: use fewer folds"),
        (["--protocol", "linear", "--folds", 11], "whose images are of 10 groups"),
        (["--protocol", "linear", "--folds", 1], "at least 2"),
        (["--protocol", "linear", "--folds", 3, "--label-share", 0.1], "exclude each other"),
        (["--protocol", "linear", "--label-share", 0.1, 1.5], "--label-share 1.5: not a share"),
        (["--protocol", "linear", "--precision", "bfloat16"], "--precision is for"),
        (["--label-share", 0.1], "are for --protocol linear"),
        (["--draws", 0], "--draws must be at least 1"),
        (["--lr", 0], "--lr must be above 0"),
        (["--name", "a/b"], "letters, digits"),
    ],
)
def test_wrong_flags_get_one_line(data, tmp_path, stopped, flags, words):
    command = ["evaluate.py", "images", data / "images", "--encoder", "scratch", "--size", 16]
    assert words in stopped(*command, "--results", tmp_path / "r.csv", *flags)
    assert not (tmp_path / "r.csv").exists()


@pytest.mark.parametrize(
    "command, words",
    [
        (
            ["toy-organ", "{t}/none", "--encoder", "scratch", "--results", "{t}/r.csv"],
            "no such file",
        ),
        (
            ["toy-organ", "{t}/empty", "--encoder", "scratch", "--results", "{t}/r.csv"],
            "one is needed",
        ),
        (["images", "{t}/empty", "--encoder", "scratch", "--results", "{t}/r.csv"], "labels.csv"),
        (["tables", "{t}/none.csv"], "no such file"),
        (["figure", "{t}/none.csv", "{t}/figure.svg"], "no such file"),
        (["tables", "{t}/old.csv"], "not a results file"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, stopped, command, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.csv").write_text("task,name\nx,y\n")
    assert words in stopped("evaluate.py", *(part.format(t=tmp_path) for part in command))
