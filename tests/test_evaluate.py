"""evaluate.py: probes and fine-tuning against slow references, its lines, what it refuses."""

import copy
import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

import evaluate
from common import auc, encoder
from common.tables import made_by, read_results, scores_file
from common.tasks import Task, draw_labels, load_task, make_folds, split_of

CPU = torch.device("cpu")


def made_task(classes=3, sizes=(90, 30, 60), size=8, **more):
    """A Task of noise, darker by class, with a published split; two images a group."""
    rng = np.random.default_rng(0)
    n = sum(sizes)
    noise = rng.integers(0, 256, (n, size, size), dtype=np.uint8)
    labels = rng.permutation(np.arange(n) % classes)
    return Task(
        images=(noise * 0.8 ** labels[:, None, None]).astype(np.uint8),
        labels=labels,
        classes=[str(label) for label in range(classes)],
        split=rng.permutation(np.repeat(["train", "val", "test"], sizes)),
        groups=np.arange(n) // 2,
        hashes=rng.integers(0, 2**64, n, np.uint64),
        **more,
    )


def made_features(task):
    """Features that know a little of the labels; those of test images have another mean and SD."""
    rng = np.random.default_rng(4)
    found = rng.normal(size=(len(task.labels), 40)) + 1.5 * np.eye(40)[task.labels]
    found *= rng.uniform(0.1, 5, 40)
    found[task.split == "val"] *= 1.5
    found[task.split == "test"] = 3 * found[task.split == "test"] + 2
    return found.astype(np.float32)


def probabilities_of(found, task, scaled_on, train, test, c):
    scaled = StandardScaler().fit(found[scaled_on]).transform(found)
    model = LogisticRegression(C=c, max_iter=2000).fit(scaled[train], task.labels[train])
    return model.predict_proba(scaled[test])


def test_c_is_the_best_on_validation_images_and_no_others():
    assert evaluate.C_GRID == [0.0001, 0.001, 0.01, 0.1, 1]  # the README's settings
    task = made_task()
    split, found = split_of(task), made_features(task)
    aucs = {part: [] for part in split}
    tested = []
    for c in evaluate.C_GRID:
        for part, images in split.items():
            p = probabilities_of(found, task, split["train"], split["train"], images, c)
            aucs[part].append(auc.metrics(task.labels[images], p)["auc"])
        tested.append(p)
    best = int(np.argmax(aucs["val"]))
    assert 0 < best < 4 and best not in (np.argmax(aucs["train"]), np.argmax(aucs["test"]))
    train, val, images, p = evaluate.probe_split(found, task)
    assert (train, val) == (90, 30) and np.array_equal(images, split["test"])
    assert np.abs(p - tested[best]).max() < 1e-3
    assert all(np.abs(p - other).max() > 0.01 for c, other in enumerate(tested) if c != best)


def test_a_fit_on_many_images_stops_early_but_where_it_converges():
    """Else scikit-learn warns. A tolerance of 0.01 is 0.2 away from the fit to 0.0001."""
    task = made_task(sizes=(5000, 30, 60), size=1)
    split, found = split_of(task), made_features(task).cumsum(axis=1)  # correlated: slow to fit
    with warnings.catch_warnings(action="error"):
        images, p = evaluate.probe_split(found, task)[2:]
    train = split["train"]
    fits = [probabilities_of(found, task, train, train, images, c) for c in evaluate.C_GRID]
    assert min(np.abs(p - fit).max() for fit in fits) < 0.1


def test_few_labels_train_with_a_fixed_c_on_features_scaled_over_all_training_images():
    task = made_task()
    split, found = split_of(task), made_features(task)
    train, val, images, p = evaluate.probe_draws(found, task, 0.2, 3)
    assert (train, val) == (18, 0) and np.array_equal(images, split["test"]) and len(p) == 3
    for draw, part in enumerate(p):
        drawn = draw_labels(task, split["train"], 0.2, draw)
        expected = probabilities_of(found, task, split["train"], drawn, images, 0.01)
        assert np.abs(part - expected).max() < 1e-4


def test_folds_train_without_their_test_images():
    task = made_task()._replace(split=None)
    found = made_features(made_task())
    folds = [make_folds(task, 4, seed) for seed in range(2)]
    train, val, images, p = evaluate.probe_folds(found, task, folds)
    assert val == 0 and images.tolist() == list(range(180)) and p.shape == (8, 180, 3)
    for part, test in zip(p, [*folds[0], *folds[1]], strict=True):
        rest = np.setdiff1d(images, test)
        expected = probabilities_of(found, task, rest, rest, test, 0.01)
        assert np.abs(part[test] - expected).max() < 1e-4 and np.isnan(part[rest]).all()
    assert train == len(rest)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_line_has_the_means_over_its_parts_and_the_sd_over_its_repeats(classes):
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 0, 0, 1, 1, 2][: 2 * classes], 120)
    p = rng.dirichlet(np.ones(classes), (6, 120)) + 0.3 * np.eye(classes)[labels]
    folded = p.copy()  # two repeats of three folds
    for i, fold in enumerate(rng.integers(0, 3, (2, 120)).repeat(3, axis=0)):
        folded[i][fold != i % 3] = np.nan
    for parts, folds, repeats in ((folded, 3, 2), (p, 1, 6)):
        tested = ~np.isnan(parts[:, :, 0])
        expected = [auc.metrics(labels[of], q[of]) for of, q in zip(tested, parts, strict=True)]
        measured = evaluate.measure(labels, parts, folds)
        for name in ("auc", "f1", "accuracy"):
            mean = np.mean([part[name] for part in expected])
            assert float(measured[name]) == pytest.approx(mean, abs=1e-5)
        sd = np.reshape([part["auc"] for part in expected], (repeats, folds)).mean(1).std(ddof=1)
        assert float(measured["auc_sd"]) == pytest.approx(sd, abs=1e-5)
    assert evaluate.measure(labels, p[0])["auc_sd"] == ""


class Tiny(nn.Module):
    """An encoder of one convolution and batch norm."""

    inplanes = 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.bn.running_mean += 0.5

    def forward(self, x):
        return self.bn(self.conv(x)).relu().mean((2, 3))


def tuning(**other):
    flags = {"lr": 0.03, "lr_after": 0.02, "weight_decay": 0.1, "epochs": 10, "freeze_epochs": 3}
    flags |= {"batch_size": 10, "name": "x", "precision": "float32", "device": CPU}
    return SimpleNamespace(**flags | other)


def slow_finetune(network, task, seed, args):
    """(probabilities of the test images, validation accuracy) after each epoch, image by image."""
    torch.manual_seed(seed)
    model = nn.Sequential(copy.deepcopy(network), nn.Linear(4, len(task.classes)))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    random = torch.Generator().manual_seed(seed)
    split = split_of(task)

    def inputs(images, flips):
        pixels = task.images[images]
        pixels[flips] = pixels[flips][:, :, ::-1]
        grey = (pixels / 255 - task.mean) / task.std
        return torch.tensor(np.stack([grey] * 3, 1), dtype=torch.float32)

    def probabilities(part):
        with torch.no_grad():
            return model.eval()(inputs(split[part], slice(0))).softmax(1).numpy()

    for epoch in range(args.epochs):
        if epoch == args.freeze_epochs + 1:  # of all, as Lightning 1.7.7 was seen to do
            optimizer.param_groups[0]["lr"] = args.lr_after
        order = split["train"][torch.randperm(len(split["train"]), generator=random).numpy()]
        for images in np.array_split(order, math.ceil(len(order) / args.batch_size)):
            flips = np.zeros(len(images), bool)
            if task.flip:
                flips = torch.rand(len(images), generator=random).numpy() < 0.5
            outputs = model.train()(inputs(images, flips))
            optimizer.zero_grad()
            nn.functional.cross_entropy(outputs, torch.tensor(task.labels[images])).backward()
            if epoch < args.freeze_epochs:
                for parameter in model[0].conv.parameters():
                    parameter.grad = None  # Adam leaves it as it is
            optimizer.step()
        right = probabilities("val").argmax(1) == task.labels[split["val"]]
        yield probabilities("test"), right.mean()


@pytest.mark.parametrize("flip", [True, False])
def test_fine_tuning_is_that_of_a_slow_reference(flip):
    task = made_task(2, (33, 30, 40), mean=0.4, std=0.3, flip=flip)
    before = task.images.copy()
    for seed in (0, 1):
        epochs = list(slow_finetune(Tiny(), task, seed, tuning()))
        accuracies = [accuracy for _, accuracy in epochs]
        best = int(np.argmax(accuracies))  # neither frozen nor the last, and one of several
        assert 3 < best < 9 and (accuracies.count(max(accuracies)) > 1 or not flip)
        train, val, images, p = evaluate.finetune(Tiny(), task, split_of(task), seed, tuning())
        assert (train, val) == (33, 30) and np.array_equal(images, split_of(task)["test"])
        assert p.dtype == np.float32 and np.abs(p - epochs[best][0]).max() < 1e-4
    assert np.array_equal(task.images, before)


def test_frozen_is_all_of_a_resnet_but_batch_norm_which_goes_on():
    """As Lightning's BackboneFinetuning does (train_bn=True), which the official code uses."""
    task = made_task(2, (12, 4, 4), size=32)
    network = encoder.load_encoder("scratch", "resnet18", 0)
    before = network.state_dict()
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for frozen in (True, False):
        tuned = copy.deepcopy(network)
        args = tuning(epochs=1, freeze_epochs=int(frozen), lr=1e-3)
        evaluate.finetune(tuned, task, split_of(task), 0, args)
        for name, value in tuned.state_dict().items():
            stays = frozen and name.rpartition(".")[0] not in norms
            assert torch.equal(value, before[name]) == stays, name


def test_fine_tuning_is_repeatable_in_both_precisions():
    task = made_task(2, (20, 8, 8))
    runs = []
    for precision in ("float32", "float32", "bfloat16", "bfloat16"):
        args = tuning(epochs=2, freeze_epochs=0, precision=precision)
        runs.append(evaluate.finetune(Tiny(), task, split_of(task), 0, args)[3])
    assert np.array_equal(runs[0], runs[1]) and np.array_equal(runs[2], runs[3])
    assert 0 < np.abs(runs[0] - runs[2]).max() < 0.1
    assert np.allclose(runs[2].sum(1), 1, atol=1e-5)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """60 pictures of 20 patients, brighter in class b."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    lines = ["file,label,group"]
    for i, label in enumerate("aaabbb" * 10):
        image = rng.integers(0, 230 if label == "b" else 200, (32, 32), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{label},patient {i // 3}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Three encoder.pt with random weights, two with a log of their pre-training beside them."""
    paths = [tmp_path_factory.mktemp(f"run-{i}", numbered=False) / "encoder.pt" for i in range(3)]
    epochs = [{"step": 8, "seconds": 2.0, "dose": 1.0}, {"step": 12, "seconds": 1.5, "dose": 4.0}]
    for i, path in enumerate(paths):
        torch.save(encoder.load_encoder("scratch", "resnet18", i).state_dict(), path)
        log = [{"settings": {"slices": 100, "steps": 12, "seed": 7 - i}}, *epochs]
        if i < 2:
            (path.parent / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
    return paths


@pytest.fixture
def used(monkeypatch):
    """Of each network that is evaluated a weight, and its source or its seed.

    Stand-ins evaluate it, of no cost.
    """
    networks = []

    def features(source, arch, seed, images, device, label):
        networks.append((weight_of(encoder.load_encoder(source, arch, seed)), source))
        return images.reshape(len(images), -1)[:, :40].astype(np.float32)

    def finetune(network, task, split, seed, args):
        networks.append((weight_of(network), seed))
        return 0, 0, split["test"], np.full((len(split["test"]), 2), 0.5)

    monkeypatch.setattr(encoder, "features", features)
    monkeypatch.setattr(evaluate, "finetune", finetune)
    return networks


def weight_of(network):
    return network.conv1.weight[0, 0, 0, 0].item()


def flags(results, *encoders, protocol="linear"):
    command = ["--results", results, "--arch", "resnet18", "--size", 32, "--protocol", protocol]
    return [*command, "--encoder", *encoders]


def cells(results, *columns):
    return [tuple(line[column] for column in columns) for line in read_results(results)]


def test_lines_tell_what_was_tested_and_beside_them_are_the_scores(tasks, encoders, tmp_path, here):
    results = tmp_path / "results.csv"
    shares = ["--label-share", 0.001, 0.1, 1, "--draws", 3]
    command = ["evaluate.py", "toy-organ", tasks, *flags(results, encoders[2]), *shares]
    here(*command)
    task = load_task("toy-organ", tasks, 32)
    split = split_of(task)
    tenth = str(len(draw_labels(task, split["train"], 0.1, 0)))
    counts = [("0.001", "6", "0", "60"), ("0.1", tenth, "0", "60"), ("1", "90", "30", "60")]
    assert cells(results, "label_share", "train", "val", "test") == counts
    found = encoder.features(encoders[2], "resnet18", 0, task.images, CPU, "")
    evaluated = [evaluate.probe_draws(found, task, share, 3)[3] for share in (0.001, 0.1)]
    evaluated.append(evaluate.probe_split(found, task)[3])
    for line, p in zip(read_results(results), evaluated, strict=True):
        scores = np.load(scores_file(results, line))
        assert np.abs(scores["probabilities"] - p).max() < 1e-3
        assert np.array_equal(scores["images"], split["test"])
        for name in ("labels", "groups"):
            assert np.array_equal(scores[name], getattr(task, name)[split["test"]])
        for column, value in evaluate.measure(scores["labels"], p).items():
            assert line[column] == value == "" or abs(float(line[column]) - float(value)) < 2e-3
    code = made_by(read_results(results)[0])["code"].keys()
    parts = "auc ct encoder files hashing tasks".split()
    assert code >= {"evaluate.py", *(f"common/{part}.py" for part in parts)}
    assert "common/dicom.py" not in code, "no task holds DICOM"
    before = results.read_bytes()
    assert here(*command).count("done before") == 3 and results.read_bytes() == before


def test_cross_validation_is_one_line(images, tmp_path, here, used):
    command = ["evaluate.py", "images", images, *flags(tmp_path / "r.csv", "scratch")]
    here(*command, "--seeds", 1, "--folds", 4, "--repeats", 3)
    assert cells(tmp_path / "r.csv", "folds", "train", "val", "test") == [("4x3", "45", "0", "60")]
    task = load_task("images", images, 32)
    [line] = read_results(tmp_path / "r.csv")
    parts = np.load(scores_file(tmp_path / "r.csv", line))["probabilities"]
    assert len(parts) == 12
    assert line["auc_sd"] == evaluate.measure(task.labels, parts, 4)["auc_sd"]
    command = ["evaluate.py", "images", images, *flags(tmp_path / "a.csv", "scratch")]
    here(*command, "--seeds", 1, "--folds", 4, "--repeats", 3, "--positive", "a")
    [line] = read_results(tmp_path / "a.csv")
    assert np.array_equal(np.load(scores_file(tmp_path / "a.csv", line))["labels"], 1 - task.labels)


def test_seeds_and_encoders(tasks, encoders, tmp_path, stopped, here, used):
    """Fine-tuning: a line a seed, the encoders in turns. Linear: a line an encoder, of its seed."""
    results = tmp_path / "results.csv"
    tuned = ["evaluate.py", "toy-lesion", tasks, *flags(results, *encoders, protocol="finetune")]
    assert "leaves encoders unused" in stopped(*tuned, "--seeds", 2)
    here(*tuned, "--seeds", 4)
    here("evaluate.py", "toy-lesion", tasks, *flags(results, *encoders))
    here("evaluate.py", "toy-lesion", tasks, *flags(results, "scratch"), "--seeds", 2)
    hashes = [encoder.encoder_hash(path) for path in encoders]
    assert cells(results, "name", "protocol", "seed", "encoder") == [
        *(("run-0", "finetune", str(seed), hashes[seed % 3]) for seed in range(4)),
        *(("run-0", "linear", str(seed), hashes[seed]) for seed in range(3)),
        *(("scratch", "linear", str(seed), "scratch") for seed in range(2)),
    ]
    networks = [encoder.load_encoder("scratch", "resnet18", seed) for seed in range(3)]
    weights = [weight_of(network) for network in networks]
    assert used[:4] == [(weights[seed % 3], seed) for seed in range(4)]
    sources = [*map(str, encoders), "scratch", "scratch"]
    assert used[4:] == [(weights[i % 3], source) for i, source in enumerate(sources)]
    cost = cells(results, "slices", "steps", "dose", "pretrain_seconds")
    assert cost[4] == ("100", "12", "2.0000", "3.5")  # dose: (8 * 1 + 4 * 4) / 12
    assert cost[6] == cost[7] == ("",) * 4
    known = tmp_path / "known.csv"  # without the encoder whose seed is not known
    here("evaluate.py", "toy-lesion", tasks, *flags(known, *encoders[:2]))
    assert cells(known, "seed", "encoder") == [("7", hashes[0]), ("6", hashes[1])]
    tuned = flags(known, "scratch", protocol="finetune")
    here("evaluate.py", "toy-lesion", tasks, *tuned, "--seeds", 2)
    assert used[-2:] == [(weights[seed], seed) for seed in range(2)]


def test_every_flag_that_decides_a_line_is_among_its_settings(monkeypatch):
    def settings(*command):
        end = ["--encoder", "scratch", "--results", "r.csv", "--size", 32, *command]
        monkeypatch.setattr("sys.argv", ["evaluate.py", "organ", "organ", *map(str, end)])
        args = evaluate.parse_args()
        return evaluate.settings_of(args, made_task(), args.label_share[0])

    linear, tuned = ["--protocol", "linear"], ["--precision", "float32"]
    others = ["--name", "x", "--seeds", 2, "--device", "cpu", "--draws", 3, "--repeats", 3]
    before = {"arch": "resnet50", "size": 32, "c": "validation", "data": made_task().digest}
    assert settings(*linear, *others, "--lr", 1) == before
    assert settings(*linear, "--folds", 3) == before | {"c": 0.01}
    few = settings(*linear, "--label-share", 0.1, "--draws", 3)
    assert few == before | {"c": 0.01, "draws": 3}
    before = settings(*tuned)
    assert settings(*tuned, *others, "--arch", "resnet18") == before | {"arch": "resnet18"}
    for name in ("size", "epochs", "freeze_epochs", "lr", "weight_decay", "batch_size"):
        assert settings(*tuned, f"--{name.replace('_', '-')}", 17) == before | {name: 17}
    assert settings("--precision", "bfloat16") == before | {"precision": "bfloat16"}


def test_a_line_is_never_replaced_nor_compared_with_one_of_other_settings(
    tasks, encoders, tmp_path, here, stopped, monkeypatch, used
):
    """Also not by one that was computed at the same time."""
    results = tmp_path / "results.csv"
    command = ["evaluate.py", "toy-lesion", tasks, *flags(results, "scratch"), "--seeds", 1]
    probe = evaluate.probe_split

    def slow_probe(*arguments):
        monkeypatch.setattr(evaluate, "probe_split", probe)
        here(*command, "--size", 40, "--name", "ALL")
        return probe(*arguments)

    monkeypatch.setattr(evaluate, "probe_split", slow_probe)
    line = stopped(*command)
    assert "was made otherwise (size 40 -> 32" in line and "give another --results" in line
    assert cells(results, "name") == [("ALL",)]
    other = [*command[:3], *flags(results, encoders[2]), "--size", 40]
    assert "ALL-linear-0 is of another encoder" in stopped(*other, "--name", "ALL")
    assert len(read_results(results)) == 1
    assert "AUC" in here(*other) and "AUC" in here(*other, "--label-share", 0.125)
    assert cells(results, "label_share")[-1] == ("0.125",)


def test_what_is_not_finite_gets_one_line(tasks, tmp_path, stopped):
    broken = encoder.load_encoder("scratch", "resnet18", 0).state_dict()
    broken["conv1.weight"][0] = torch.nan
    torch.save(broken, path := tmp_path / "encoder.pt")
    command = ["evaluate.py", "toy-lesion", tasks, *flags(tmp_path / "r.csv", path)]
    assert "features that are not finite" in stopped(*command)
    command[-1:] = ["scratch", "--protocol", "finetune", "--seeds", 1, "--epochs", 1, "--lr", 1e30]
    assert "diverged" in stopped(*command)


def test_wrong_flags_get_one_line(images, encoders, tmp_path, stopped):
    (tmp_path / "encoder.pt").write_bytes(encoders[0].read_bytes())
    (tmp_path / "log.jsonl").write_text('{"epoch": 1}\n')
    command = ["evaluate.py", "images", images, *flags(tmp_path / "r.csv", "scratch")]
    for more, words in (
        (["--folds", 11], "(30 images of 10 groups) has 0 in fold"),
        (["--protocol", "finetune", "--label-share", 0.1], "are for --protocol linear"),
        (["--encoder", tmp_path / "encoder.pt"], "not a log of pretrain.py"),
    ):
        assert words in stopped(*command, *more)
    assert not (tmp_path / "r.csv").exists()
