"""Evaluate encoders on a downstream classification task, and print the tables.

    python evaluate.py covid-ct DATA --encoder RUN/encoder.pt --results results.csv    # fine-tuning
    python evaluate.py organ DATA --encoder scratch --results results.csv \\
        --protocol linear --label-share 0.01 0.1 1       # frozen features, few labels
    python evaluate.py head-ct DATA --encoder RUN/encoder.pt --results results.csv \\
        --protocol linear --folds 5 --repeats 10         # all images tested, for small sets
    python evaluate.py images DATA ...                   # your own, listed in DATA/labels.csv
    python evaluate.py tables results.csv                # Markdown
    python evaluate.py figure results.csv FIGURE.svg
    python evaluate.py study results.csv --figure FIGURE.svg   # results/study/plan.md's analysis

Lines that results.csv already holds for the same encoder, settings, data and code are not computed
again; several evaluations may write to one results.csv at the same time. A line of other flags
(--lr, --epochs, ...) with the same --name and seed is replaced: give an ablation another --results.
The test scores are kept in results-scores/, so that any two rows can be compared image by image;
near-duplicates-TASK.csv there names the images that look alike. Differences in the tables are to
the row ALL, or to `tables --baseline ROW`.
"""

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # comes with scikit-learn
from torch import nn
from tqdm import tqdm

from common import auc, simclr
from common.encoder import encoder_hash, features, input_statistics, load_encoder, to_input
from common.figure import figure, study_figure
from common.files import atomic_write, csv_line, fail, locked, one_digest, run_script
from common.results import KEY, read_results, same, scores_folder, write_line
from common.study import OUTCOMES, PRIMARY, study
from common.tables import tables
from common.tasks import (
    DUPLICATE_BITS,
    TASKS,
    checked_folds,
    leaks,
    load_task,
    near_pairs,
    split_of,
)

C_GRID = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]  # of the linear probe, chosen by AUC on the validation split
FIXED_C = 1e-2  # where no validation split is used; few labels may want a larger one
# Flags that do not decide a line, or have a column of their own, and those of one protocol alone;
# all others are among a line's settings.
NO_SETTINGS = ["task", "data", "encoder", "results", "name", "protocol", "seeds", "device"]
LINEAR = ["label_share", "draws", "folds", "repeats"]
FINETUNE = ["epochs", "freeze_epochs", "lr", "weight_decay", "batch_size", "precision"]
CODE = [  # the files that decide a line; what others decide (images, groups) is in data's digest
    "evaluate.py",
    "common/auc.py",
    "common/encoder.py",
    "common/tasks.py",
]


def main():
    if sys.argv[1:2] in (["tables"], ["figure"], ["study"]):
        return print_results(sys.argv[1], sys.argv[2:])
    args = parse_args()
    code = one_digest(*CODE)
    refuse_lines_of_other_code(args, code)
    task = load_task(args.task, args.data, args.size)
    folds = checked_folds(task, args.folds, args.repeats) if args.folds else None
    for source in set(args.encoder):  # a wrong file is refused before hours with the others
        load_encoder(source, args.arch, seed=0)
    encoders = seeds_and_encoders(args)
    plans = [plan(args, task, seed, source, code) for seed, source in encoders]
    for row in sum(plans, []):
        refuse_to_replace(args, row)
    report_task(args, task)
    for (_, source), planned in zip(encoders, plans):
        rows = [row for row in planned if not is_done(args, row)]
        if rows and args.protocol == "finetune":
            evaluate_finetuned(args, task, rows[0], source)
        elif rows:
            evaluate_features(args, task, rows, source, folds)


def plan(args, task, seed, source, code):
    """The lines of one encoder, as far as they are known before the evaluation."""
    rows = []
    for share, folds, settings in variants(args):
        settings["data"] = task.digest
        row = {
            "task": args.task,
            "name": args.name,
            "encoder": encoder_hash(source),
            "protocol": args.protocol,
            "seed": seed,
            "label_share": share,
            "folds": folds,
            "settings": " ".join(f"{key}={value}" for key, value in settings.items()),
            "code": code,
        }
        rows.append(row | pretraining(source))
    return rows


def variants(args):
    """[(label_share, folds, settings)] of the lines that each encoder gets."""
    apart = NO_SETTINGS + (LINEAR if args.protocol == "finetune" else LINEAR + FINETUNE)
    settings = {name: value for name, value in vars(args).items() if name not in apart}
    if args.protocol == "finetune":
        return [("1", "", settings)]
    if args.folds:
        return [("1", f"{args.folds}x{args.repeats}", settings | {"c": FIXED_C})]
    few = settings | {"c": FIXED_C, "draws": args.draws}
    all_labels = settings | {"c": "validation"}
    return [(f"{share:g}", "", few if share < 1 else all_labels) for share in args.label_share]


def evaluate_finetuned(args, task, row, source):
    started = time.perf_counter()
    split = split_of(task)
    encoder = load_encoder(source, args.arch, row["seed"])
    probabilities = finetune(encoder, task, split, row["seed"], args, args.device)
    seconds = time.perf_counter() - started
    row |= {"train": len(split["train"]), "val": len(split["val"])}
    finish_line(args, task, row, split["test"], probabilities, seconds)


def evaluate_features(args, task, rows, source, folds):
    """Compute an encoder's features once, then the linear probe of each line."""
    started = time.perf_counter()
    encoder = load_encoder(source, args.arch, rows[0]["seed"])
    statistics = input_statistics(source)
    batches = features(encoder, task.images, statistics, args.device, f"{args.name} features")
    found = np.concatenate(list(batches))
    if not np.isfinite(found).all():
        fail(f"{source}: gives features that are not finite: its pre-training went wrong")
    featured = time.perf_counter() - started
    for row in rows:
        started = time.perf_counter()
        if row["folds"]:
            train, val, tested, probabilities = probe_folds(found, task, folds)
        elif row["label_share"] != "1":
            share = float(row["label_share"])
            train, val, tested, probabilities = probe_draws(found, task, share, args.draws)
        else:
            train, val, tested, probabilities = probe_split(found, task)
        seconds = featured + time.perf_counter() - started
        finish_line(args, task, row | {"train": train, "val": val}, tested, probabilities, seconds)


def finish_line(args, task, row, tested, probabilities, seconds):
    """Measure the test probabilities, write the line and its scores, and print it."""
    labels, groups = task.labels[tested], task.groups[tested]
    repeats = 1
    if probabilities.ndim == 3:
        repeats = args.repeats if row["folds"] else len(probabilities)
    row |= measure(labels, probabilities, repeats)
    row |= {"test": len(tested), "seconds": f"{seconds:.1f}"}
    write_line(args.results, row, tested, labels, groups, probabilities)
    spread = f" (SD {row['auc_sd']})" if row["auc_sd"] else ""
    print(
        f"{line_title(row)}: AUC {row['auc']}{spread}  F1 {row['f1']}  accuracy {row['accuracy']}  "
        f"{row['seconds']} s",
        flush=True,
    )


def line_title(row):
    share = f" labels {row['label_share']}" if row["label_share"] != "1" else ""
    folds = f" folds {row['folds']}" if row["folds"] else ""
    return f"{row['task']} {row['name']} {row['protocol']}{share}{folds} seed {row['seed']}"


def measure(labels, probabilities, repeats):
    """{"auc", "auc_sd", "f1", "accuracy"} as text: means over the parts of a line.

    labels: int [n]. probabilities: [n, classes], or [parts, n, classes] where NaN marks images that
    a part does not test. repeats: consecutive parts are of one repeat; the SD is over repeats.
    """
    parts = probabilities.reshape(-1, *probabilities.shape[-2:])
    measured = []
    for part in parts:
        tested = ~np.isnan(part[:, 0])
        measured.append(auc.metrics(labels[tested], part[tested]))
    found = {key: f"{np.mean([m[key] for m in measured]):.5f}" for key in measured[0]}
    of_repeats = np.reshape([m["auc"] for m in measured], (repeats, -1)).mean(1)
    found["auc_sd"] = f"{of_repeats.std(ddof=1):.5f}" if repeats > 1 else ""
    return found


def probe_split(features, task):
    """Logistic regression on standardised frozen features, C by validation AUC.

    Like the other two probes it returns the numbers of training and validation images, the rows of
    the tested images and their probabilities, here [test, classes]. All of C_GRID is tried: the 40
    validation images of head-ct make AUC jump, so that its first fall comes far too early to stop
    there. Beyond 5,000 images the fit stops at ten times scikit-learn's tolerance (our choice): a
    quarter of the time on organ, AUC the same to 0.0003; on small sets that would change which C is
    best.
    """
    train, val, test = split_of(task).values()
    scaled = standardised(features, train)
    tolerance = 1e-4 if len(train) < 5000 else 1e-3
    model = LogisticRegression(max_iter=2000, warm_start=True, tol=tolerance)
    best = None
    best_auc = -1.0
    with threadpool_limits(1, "blas"):  # more threads cost more than they bring on these matrices
        for c in C_GRID:
            model.set_params(C=c).fit(scaled[train], task.labels[train])
            value = auc.metrics(task.labels[val], model.predict_proba(scaled[val]))["auc"]
            if value > best_auc:
                best, best_auc = model.predict_proba(scaled[test]), value
    return len(train), len(val), test, best


def probe_draws(features, task, share, draws):
    """The probe trained on draws of a share of the labels, C fixed; [draws, test, classes].

    Features are standardised over all training images, which needs no labels (our choice).
    """
    train, _, test = split_of(task).values()
    scaled = standardised(features, train)
    drawn = [draw_labels(task, train, share, draw) for draw in range(draws)]
    found = [fit_and_predict(scaled, task, rows, test) for rows in drawn]
    return len(drawn[0]), 0, test, np.stack(found)


def draw_labels(task, train, share, draw):
    """Rows of a stratified share of the training images, at least one a class.

    The same for every encoder: they depend on the number of the draw only.
    """
    rng = np.random.default_rng(draw)
    drawn = []
    for label in range(len(task.classes)):
        members = rng.permutation(train[task.labels[train] == label])
        drawn.append(members[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(drawn))


def probe_folds(features, task, folds):
    """Repeated cross-validation over all N images, C fixed; [repeats x folds, N, classes].

    folds: for each repeat the rows of each fold. NaN marks images outside a part's fold.
    """
    everything = np.arange(len(task.labels))
    tests = sum(folds, [])
    found = np.full((len(tests), len(everything), len(task.classes)), np.nan, np.float32)
    for part, test in zip(found, tests):
        train = np.setdiff1d(everything, test)
        part[test] = fit_and_predict(standardised(features, train), task, train, test)
    return len(train), 0, everything, found


def standardised(features, train):
    return StandardScaler().fit(features[train]).transform(features)


def fit_and_predict(scaled, task, train, test):
    """Logistic regression with FIXED_C on the rows train; probabilities of test, [n, classes]."""
    model = LogisticRegression(C=FIXED_C, max_iter=2000)
    with threadpool_limits(1, "blas"):
        return model.fit(scaled[train], task.labels[train]).predict_proba(scaled[test])


def finetune(encoder, task, split, seed, args, device):
    """The paper's protocol: encoder and linear layer, the encoder frozen at first.

    The weights of the epoch with the best validation accuracy are tested. Returns probabilities, float32 [test, classes].
    Repeatable: a GPU uses deterministic convolutions.
    """
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    model = nn.Sequential(encoder, nn.Linear(encoder.inplanes, len(task.classes)))
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    train = torch.from_numpy(split["train"])
    validation_labels = task.labels[split["val"]]
    best = None
    best_accuracy = -1.0
    for epoch in tqdm(range(args.epochs), f"{args.name} seed {seed}", unit="epoch"):
        freeze(encoder, epoch < args.freeze_epochs)
        shuffled = train[torch.randperm(len(train), generator=generator)]
        train_epoch(model, optimizer, task, shuffled, generator, args, device)
        predicted = predict(model, task, split["val"], args, device).argmax(1)
        accuracy = (predicted == validation_labels).mean()
        if accuracy > best_accuracy:
            best_accuracy = accuracy
            best = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(best)
    probabilities = predict(model, task, split["test"], args, device)
    if not np.isfinite(probabilities).all():
        fail(f"{args.name} seed {seed}: fine-tuning diverged: give a lower --lr")
    return probabilities


def freeze(encoder, frozen):
    """Frozen means all but batch norm, as Lightning's BackboneFinetuning does.

    The official code uses that; how it freezes is our reading.
    """
    for module in encoder.modules():
        trained = not frozen or isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(trained)


def train_epoch(model, optimizer, task, rows, generator, args, device):
    """One pass over the rows, in this order, in batches of as equal size as can be."""
    model.train()
    labels = torch.from_numpy(task.labels)
    for batch in rows.tensor_split(math.ceil(len(rows) / args.batch_size)):
        images = torch.from_numpy(task.images)[batch]
        if task.vertical_flip:
            flip = torch.rand(len(batch), generator=generator) < 0.5
            images[flip] = images[flip].flip(1)
        outputs = forward(model, images, task, args, device)
        loss = nn.functional.cross_entropy(outputs, labels[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def predict(model, task, rows, args, device):
    """Probabilities of the rows, float32 [n, classes]."""
    model.eval()
    found = []
    for batch in torch.from_numpy(rows).split(256):
        images = torch.from_numpy(task.images)[batch]
        found.append(forward(model, images, task, args, device).softmax(1).cpu())
    return torch.cat(found).numpy()


def forward(model, images, task, args, device):
    """uint8 [n, size, size] -> outputs of the model, float32 [n, classes]."""
    inputs = to_input(images.to(device).float() / 255, task.mean, task.std)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
        return model(inputs).float()


def pretraining(source):
    """Columns of results.csv on the run that made the encoder; empty without a log."""
    settings, epochs = read_log(source)
    if not epochs:
        return {"slices": "", "steps": "", "dose": "", "pretrain_seconds": ""}
    steps = np.diff([0, *(line["step"] for line in epochs)])
    dose = np.average([line["dose"] for line in epochs], weights=steps)  # mean over steps
    return {
        "slices": settings["slices"],
        "steps": settings["steps"],
        "dose": f"{dose:.4f}",
        "pretrain_seconds": f"{sum(line['seconds'] for line in epochs):.1f}",
    }


def read_log(source):
    """(settings, lines of the epochs) of the log.jsonl beside an encoder; ({}, []) without one."""
    log = Path(source).parent / "log.jsonl"
    if source in ("scratch", "imagenet") or not log.is_file():
        return {}, []
    try:
        first, *epochs = [json.loads(line) for line in log.read_text().splitlines()]
        return first["settings"], epochs
    except (ValueError, KeyError, TypeError):
        fail(f"{log}: not a log of pretrain.py, or damaged: move it away from the encoder")


def refuse_lines_of_other_code(args, code):
    """Rows of one task are compared with each other, so the same code must have made them."""
    for row in read_results(args.results):
        if row["task"] == args.task and row["code"] != code:
            fail(
                f"{args.results}: its lines of {args.task} were made by other code "
                f"({', '.join(CODE)}): give another --results, or delete those lines"
            )


def refuse_to_replace(args, row):
    """Stop with one line if the line would take the place of another encoder's or of other data's.

    Of other settings it may, also of another size, whose images have another digest.
    """
    for old in read_results(args.results):
        if not same(old, row, KEY):
            continue
        if old["encoder"] != row["encoder"]:
            fail(
                f"{args.results}: {line_title(row)} is of another encoder, {old['encoder']}: give "
                "another --name or --results, or delete that line"
            )
        before, now = settings_of(old), settings_of(row)
        if before["size"] == now["size"] and before["data"] != now["data"]:
            fail(
                f"{args.results}: {line_title(row)} was evaluated on other images, labels or "
                f"groups than {args.data} holds: give another --results, or delete that line"
            )


def is_done(args, row):
    """Whether results.csv, as it is now, holds the line."""
    refuse_to_replace(args, row)
    for old in read_results(args.results):
        if same(old, row, [*KEY, "settings", "code"]):
            print(f"{line_title(row)}: done before")
            return True
    return False


def settings_of(row):
    """A line's settings, {flag: value}."""
    return dict(setting.split("=") for setting in row["settings"].split())


def report_task(args, task):
    """Print what the task holds and which images are not independent; list near-duplicates."""

    def say(text):
        print(f"{args.task}: {text}")

    n = len(task.labels)
    say(f"{n} images, {len(np.unique(task.groups))} groups, classes {', '.join(task.classes)}")
    if len(task.classes) == 2:
        say(f"AUC and F1 are those of class {task.classes[1]}")
    split = split_of(task)
    if task.split is None:
        columns = ["image", "other", "bits"]
        pairs = near_pairs(task.hashes)
        side = {row: part for part, rows in split.items() for row in rows}
        together = sum(side[one] == side[other] for one, other, _ in pairs)
        say(
            f"the split keeps groups on one side, and with them {together} of {len(pairs)} pairs "
            "of near-duplicates"
        )
    else:
        columns = ["test", "train", "bits"]
        pairs = leaks(task, split)
        others = task.groups[np.concatenate([split["train"], split["val"]])]
        shared = np.isin(task.groups[split["test"]], others).sum()
        say(
            f"{len(pairs)} of {len(split['test'])} test images have a near-duplicate among the "
            f"training images, {shared} are of a group of the training or validation images"
        )
    path = scores_folder(args.results) / f"near-duplicates-{args.task}.csv"
    with locked(args.results), atomic_write(path, text=True) as file:
        csv_line(file, columns)
        for one, other, bits in pairs:
            csv_line(file, [task.names[one], task.names[other], bits])
    say(f"near-duplicates (dHash within {DUPLICATE_BITS} bits) are in {path}")
    if args.folds:
        say(
            f"{args.folds} folds of whole groups. The {args.repeats} repeats average out the luck "
            f"of the split; they are no new data: it is the same {n} images"
        )


def seeds_and_encoders(args):
    """(seed, encoder) of each line.

    Fine-tuning: --seeds lines, the encoders in turns. Linear: --seeds random weights, or a line an
    encoder, whose seed is that of its pre-training where the logs beside the encoders tell it.
    """
    if args.protocol == "finetune":
        return [(seed, args.encoder[seed % len(args.encoder)]) for seed in range(args.seeds)]
    if args.encoder == ["scratch"]:
        return [(seed, "scratch") for seed in range(args.seeds)]
    seeds = [read_log(source)[0].get("seed") for source in args.encoder]
    if None in seeds or len(set(seeds)) < len(seeds):
        seeds = range(len(args.encoder))
    return list(zip(seeds, args.encoder))


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join(TASKS)
    add("task", choices=TASKS, metavar="TASK", help=f"{names}; or: tables, figure, study")
    add("data", type=Path, metavar="DATA", help="the task's folder (npz tasks: or its file)")
    add(
        "--encoder",
        required=True,
        nargs="+",
        help="encoder.pt, scratch or imagenet; several are the seeds of pre-training of one row",
    )
    add("--results", type=Path, required=True, help="CSV to add lines to")
    add("--name", help="row of the tables (default: the encoder's folder); others compare to ALL")
    add(
        "--protocol",
        choices=["finetune", "linear"],
        default="finetune",
        help="finetune: the paper's; linear: logistic regression on frozen features",
    )
    add(
        "--seeds",
        type=int,
        default=5,
        help="finetune: lines, each with a head and an order of its own, the encoders taking "
        "turns; linear: random weights of scratch, while any other encoder gets one line (default: "
        "%(default)s)",
    )
    add("--arch", choices=simclr.ARCHS, default="resnet50", help="default: the paper's")
    add("--size", type=int, default=224, help="side of an image in pixels (default: the paper's)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")

    add = parser.add_argument_group("linear").add_argument
    add(
        "--label-share",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="F",
        help="train on this share of the training labels; several: a line each",
    )
    add("--draws", type=int, default=10, help="of a label share below 1 (default: %(default)s)")
    add("--folds", type=int, help="cross-validation over all images instead of the task's split")
    add("--repeats", type=int, default=10, help="of --folds (default: %(default)s)")

    add = parser.add_argument_group("finetune (defaults: the paper's)").add_argument
    add("--epochs", type=int, default=70, help="default: 70")
    add(
        "--freeze-epochs",
        type=int,
        default=10,
        help="first epochs, in which only batch norm and the linear layer train; default: 10",
    )
    add("--lr", type=float, default=1e-4, help="Adam; default: 1e-4")
    add("--weight-decay", type=float, default=5e-4, help="default: 5e-4")
    add("--batch-size", type=int, default=64, help="default: 64")
    add(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="auto is bfloat16 where the hardware multiplies it natively",
    )
    args = parser.parse_args()
    if args.name is None:
        first = args.encoder[0]
        args.name = first if first in ("scratch", "imagenet") else Path(first).parent.name
    check_args(args)
    try:
        args.device = simclr.choose_device(args.device)
    except ValueError as error:
        fail(f"--device: {error}")
    if args.protocol == "finetune":
        try:
            precision = simclr.choose_precision(args.precision, args.device, args.size)
        except ValueError as error:
            fail(f"--precision: {error}")
        args.precision = str(precision).removeprefix("torch.")
    return args


def check_args(args):
    if not re.fullmatch(r"[\w.+-]+", args.name):
        fail(f"--name {args.name}: use letters, digits and . + - _ only: it names files")
    for name in ("seeds", "size", "draws", "folds", "repeats", "epochs", "batch_size"):
        least = 2 if name == "folds" else 1
        value = getattr(args, name)
        if value is not None and value < least:
            fail(f"--{name.replace('_', '-')} must be at least {least}")
    for share in args.label_share:
        if not 0 < share <= 1:
            fail(f"--label-share {share}: not a share: give numbers above 0, at most 1")
    if not args.lr > 0 or not args.weight_decay >= 0:
        fail("--lr must be above 0, and --weight-decay at least 0")
    few_labels = args.label_share != [1.0]
    if args.folds and few_labels:
        fail("--folds and --label-share exclude each other: give them in two calls")
    if args.protocol == "linear" and args.precision != "auto":
        fail("--precision is for --protocol finetune: features are always in float32")
    if args.protocol == "finetune" and (args.folds or few_labels):
        fail("--folds and --label-share are for --protocol linear")
    if args.protocol == "finetune" and args.seeds < len(args.encoder):
        fail(
            f"--seeds {args.seeds} leaves some of the {len(args.encoder)} encoders unused: give "
            "at least as many seeds"
        )


def print_results(command, arguments):
    """evaluate.py tables results.csv, figure results.csv FIGURE, or study results.csv."""
    parser = argparse.ArgumentParser(prog=f"evaluate.py {command}")
    parser.add_argument("results", type=Path, help="CSV that evaluate.py wrote")
    if command == "figure":
        parser.add_argument("figure", type=Path, help="SVG file to write")
    if command == "study":
        parser.add_argument("--figure", type=Path, help="SVG file to write")
    else:
        parser.add_argument("--baseline", default="ALL", help="row compared to (default: ALL)")
    args = parser.parse_args(arguments)
    if not args.results.is_file():
        fail(f"{args.results}: no such file: evaluate.py TASK ... --results CSV makes it")
    if command == "tables":
        print(tables(args.results, args.baseline))
    elif command == "study":
        print(study(args.results))
        if args.figure:
            study_figure(args.results, args.figure, *OUTCOMES[PRIMARY])
    else:
        figure(args.results, args.figure, args.baseline)
        print(f"Written to {args.figure}")


if __name__ == "__main__":
    run_script(main)
