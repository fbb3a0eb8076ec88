"""Evaluate encoders on a downstream classification task, and print the tables.

    python evaluate.py covid-ct DATA --encoder RUN/encoder.pt --results results.csv    # fine-tuning
    python evaluate.py organ DATA --encoder scratch --results results.csv \\
        --protocol linear --label-share 0.01 0.1 1       # frozen features, few labels
    python evaluate.py head-ct DATA --encoder RUN/encoder.pt --results results.csv \\
        --protocol linear --folds 5 --repeats 10         # all images tested, for small sets
    python evaluate.py images DATA ...                   # your own, listed in DATA/labels.csv
    python evaluate.py tables results.csv                # Markdown
    python evaluate.py figure results.csv FIGURE.svg

Lines that results.csv holds are not made again. Those of a task, protocol, label share and folds
are compared, so they must be of the same settings, data and code: give an ablation another
--results. Several evaluations may write to one file. results-scores/ keeps the test scores.
"""

import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # comes with scikit-learn
from torch import nn
from tqdm import tqdm

from common import auc, encoder, tasks
from common.figure import figure
from common.files import Flags, code, fail, number, read_json, refuse_other, run_script
from common.tables import KEY, ONE_TABLE, add_line, made_by, read_results, scores_file, tables

C_GRID = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]  # of the linear probe, chosen by AUC on the validation split
FIXED_C = 1e-2  # where no validation split is used; few labels may want a larger one
# flags that decide nothing or have a column; all others are settings, some of fine-tuning alone
NO_SETTINGS = "data encoder results seeds device draws repeats positive".split() + KEY
FINETUNE = "epochs freeze_epochs lr lr_after weight_decay batch_size precision".split()


def main():
    args = parse_args()
    if args.task == "tables":
        return print(tables(args.results, args.baseline))
    if args.task == "figure":
        return figure(args.results, args.figure, args.baseline)
    task = tasks.load_task(args.task, args.data, args.size)
    if args.positive:
        task = tasks.with_positive(task, args.positive)
    folds = tasks.checked_folds(task, args.folds, args.repeats) if args.folds else None
    if not folds:
        tasks.check_split(task, args.data)
    for source in set(args.encoder):  # a wrong file is refused before hours with the others
        encoder.load_encoder(source, args.arch, seed=0)
        pretraining(source)
    tasks.report(args.task, task, folds)
    for seed, source in seeds_and_encoders(args):
        lines = {share: line_of(args, task, seed, source, share) for share in args.label_share}
        lines = {share: line for share, line in lines.items() if not is_done(args.results, line)}
        if lines and args.protocol == "linear":
            features = encoder.features(
                source, args.arch, seed, task.images, args.device, args.name
            )
        for share, line in lines.items():
            started = time.perf_counter()
            if args.protocol == "finetune":
                network = encoder.load_encoder(source, args.arch, seed)
                scores = finetune(network, task, tasks.split_of(task), seed, args)
            else:
                scores = probe(features, task, folds, share, args.draws)
            finish_line(args, task, line, scores, time.perf_counter() - started)


def seeds_and_encoders(args):
    """[(seed, encoder)] of the runs: --seeds of fine-tuning, encoders in turns, or of scratch.

    Else one an encoder, by the seed of its pre-training where all logs tell it.
    """
    if args.protocol == "finetune" or args.encoder == ["scratch"]:
        return [(seed, args.encoder[seed % len(args.encoder)]) for seed in range(args.seeds)]
    seeds = [pretraining(source)["seed"] for source in args.encoder]
    if "" in seeds or len(set(seeds)) < len(seeds):
        seeds = range(len(seeds))
    return list(zip(seeds, args.encoder, strict=True))


def line_of(args, task, seed, source, share):
    """A line of results.csv, before its AUC."""
    return pretraining(source) | {
        "task": args.task,
        "name": args.name,
        "encoder": encoder.encoder_hash(source),
        "protocol": args.protocol,
        "seed": str(seed),
        "label_share": f"{share:g}",
        "folds": f"{args.folds}x{args.repeats}" if args.folds else "",
        "settings": as_text(settings_of(args, task, share)),
        "code": as_text(code("common/dicom.py")),  # no task holds DICOM
    }


def settings_of(args, task, share):
    """{name: value} of what decides a line beside its columns and the code."""
    apart = NO_SETTINGS if args.protocol == "finetune" else NO_SETTINGS + FINETUNE
    settings = {name: value for name, value in vars(args).items() if name not in apart}
    if args.protocol == "linear":
        settings["c"] = FIXED_C if args.folds or share < 1 else "validation"
    if share < 1:
        settings["draws"] = args.draws
    return settings | {"data": task.digest}


def as_text(values):
    return " ".join(f"{name}={value}" for name, value in values.items())


def is_done(results, line):
    """Whether results.csv holds the line; stops with one line at lines that do not fit to it."""
    settings = made_by(line)["settings"]
    for held in read_results(results):
        if any(held[column] != line[column] for column in ONE_TABLE):
            continue
        name = scores_file(results, held).stem
        refuse_other(f"{results}: {name}", made_by(held), settings, "give another --results")
        if all(held[column] == line[column] for column in KEY):
            if held["encoder"] != line["encoder"]:
                fail(f"{results}: {name} is of another encoder: give another --name or --results")
            print(f"{name}: done before")
            return True
    return False


def pretraining(source):
    """Columns of results.csv on the run that made an encoder, and its seed; empty without a log."""
    log = Path(source).parent / "log.jsonl"
    if source in ("scratch", "imagenet") or not log.is_file():
        return dict.fromkeys(["seed", "slices", "steps", "dose", "pretrain_seconds"], "")
    first, *epochs = read_json(log, lines=True) or [{}]
    if not epochs or "settings" not in first:
        fail(f"{log}: not a log of pretrain.py: move it away from the encoder")
    steps = np.diff([0, *(epoch["step"] for epoch in epochs)])
    return {
        "seed": first["settings"].get("seed", ""),
        "slices": first["settings"]["slices"],
        "steps": first["settings"]["steps"],
        "dose": f"{np.average([epoch['dose'] for epoch in epochs], weights=steps):.4f}",
        "pretrain_seconds": f"{sum(epoch['seconds'] for epoch in epochs):.1f}",
    }


def finish_line(args, task, line, scores, seconds):
    """Measure the scores of a line, add it to results.csv, and print it."""
    train, val, tested, probabilities = scores
    labels, groups = task.labels[tested], task.groups[tested]
    line = line | {"train": train, "val": val, "test": len(tested), "seconds": f"{seconds:.1f}"}
    line |= measure(labels, probabilities, args.folds or 1)
    if not is_done(args.results, line):  # by another evaluation in the meantime
        add_line(args.results, line, tested, labels, groups, probabilities)
        name = scores_file(args.results, line).stem
        print(f"{name}: AUC {line['auc']}  F1 {line['f1']}  {line['seconds']} s", flush=True)


def measure(labels, probabilities, folds=1):
    """{"auc", "auc_sd", "f1", "accuracy"} as text: means over the parts of a line.

    labels, probabilities: as in auc.bootstrap. The SD is over the parts, or over repeats of so many
    folds each.
    """
    measured = []
    for part in probabilities.reshape(-1, *probabilities.shape[-2:]):
        tested = ~np.isnan(part[:, 0])
        measured.append(auc.metrics(labels[tested], part[tested]))
    means = {key: f"{np.mean([part[key] for part in measured]):.5f}" for key in measured[0]}
    repeats = np.reshape([part["auc"] for part in measured], (-1, folds)).mean(1)
    return means | {"auc_sd": f"{repeats.std(ddof=1):.5f}" if len(repeats) > 1 else ""}


# --- The linear probe, on frozen features.


def probe(features, task, folds, share, draws):
    """(number of training images, of validation images, tested images [n], probabilities)."""
    with threadpool_limits(1, "blas"):  # more threads cost more than they bring on these matrices
        if folds:
            return probe_folds(features, task, folds)
        if share < 1:
            return probe_draws(features, task, share, draws)
        return probe_split(features, task)


def probe_split(features, task):
    """Logistic regression on standardised frozen features, C by validation AUC.

    All of C_GRID is tried: on head-ct's 40 validation images AUC jumps. Beyond 5,000 images the fit
    stops at ten times scikit-learn's tolerance (our choice): a quarter of the time on organ, AUC
    the same to 0.0003; on small sets that would change which C is best.
    """
    train, val, test = tasks.split_of(task).values()
    scaled = StandardScaler().fit(features[train]).transform(features)
    tolerance = 1e-4 if len(train) < 5000 else 1e-3
    model = LogisticRegression(max_iter=2000, warm_start=True, tol=tolerance)
    aucs, tested = [], []
    for c in C_GRID:
        model.set_params(C=c).fit(scaled[train], task.labels[train])
        validated = auc.metrics(task.labels[val], model.predict_proba(scaled[val]))
        aucs.append(validated["auc"])
        tested.append(model.predict_proba(scaled[test]))
    return len(train), len(val), test, tested[np.argmax(aucs)]


def probe_draws(features, task, share, draws):
    """The probe trained on draws of a share of the labels, C fixed; [draws, test, classes].

    Features are standardised over all training images, which needs no labels (our choice).
    """
    train, _, test = tasks.split_of(task).values()
    drawn = [tasks.draw_labels(task, train, share, draw) for draw in range(draws)]
    parts = [fit_and_predict(features, task, train, labelled, test) for labelled in drawn]
    return len(drawn[0]), 0, test, np.stack(parts)


def probe_folds(features, task, folds):
    """Repeated cross-validation over all N images, C fixed; [repeats x folds, N, classes].

    folds: for each repeat the images of each fold. NaN marks images outside a part's fold.
    """
    everything = np.arange(len(task.labels))
    tests = [test for repeat in folds for test in repeat]
    parts = np.full((len(tests), len(everything), len(task.classes)), np.nan, np.float32)
    for part, test in zip(parts, tests, strict=True):
        train = np.setdiff1d(everything, test)
        part[test] = fit_and_predict(features, task, train, train, test)
    return len(train), 0, everything, parts


def fit_and_predict(features, task, scaled_on, train, test):
    """Logistic regression with FIXED_C on the train images; probabilities of test, [n, classes]."""
    scaled = StandardScaler().fit(features[scaled_on]).transform(features)
    model = LogisticRegression(C=FIXED_C, max_iter=2000).fit(scaled[train], task.labels[train])
    return model.predict_proba(scaled[test])


# --- Fine-tuning.


def finetune(network, task, split, seed, args):
    """The paper's protocol: encoder and linear layer, the encoder frozen at first; as probe.

    The weights of the epoch with the best validation accuracy, the first of equals, are tested.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(network, nn.Linear(network.inplanes, len(task.classes)))
    model.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    train = torch.from_numpy(split["train"])
    smallest = len(train) // math.ceil(len(train) / args.batch_size)
    if smallest == 1 and args.size <= 32:  # a ResNet's last stage is one pixel then
        what = f"{len(train)} training images in batches of at most {args.batch_size}"
        fail(f"--batch-size: {what} leave one image alone: give another, or --size above 32")
    best_accuracy = -1.0
    for epoch in tqdm(range(args.epochs), f"{args.name} seed {seed}", unit="epoch"):
        freeze(network, epoch < args.freeze_epochs)
        # Lightning's BackboneFinetuning (official code) lowers it an epoch after the thaw, for all
        [group] = optimizer.param_groups
        group["lr"] = args.lr if epoch <= args.freeze_epochs else args.lr_after
        shuffled = train[torch.randperm(len(train), generator=generator)]
        train_epoch(model, optimizer, task, shuffled, generator, args)
        predicted = predict(model, task, split["val"], args).argmax(1)
        accuracy = (predicted == task.labels[split["val"]]).mean()
        if accuracy > best_accuracy:
            best_accuracy = accuracy
            best = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(best)
    probabilities = predict(model, task, split["test"], args)
    if not np.isfinite(probabilities).all():
        fail(f"{args.name} seed {seed}: fine-tuning diverged: give a lower --lr")
    return len(train), len(split["val"]), split["test"], probabilities


def freeze(network, frozen):
    """Frozen: train batch norm alone, as Lightning's BackboneFinetuning (official code) does."""
    for module in network.modules():
        trained = not frozen or isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(trained)


def train_epoch(model, optimizer, task, shuffled, generator, args):
    """One pass over the images in this order, in near-equal batches (paper: a smaller last one)."""
    model.train()
    labels = torch.from_numpy(task.labels)
    for batch in shuffled.tensor_split(math.ceil(len(shuffled) / args.batch_size)):
        images = torch.from_numpy(task.images)[batch]
        if task.flip:
            flip = torch.rand(len(batch), generator=generator) < 0.5
            images[flip] = images[flip].flip(2)
        outputs = forward(model, images, task, args)
        loss = nn.functional.cross_entropy(outputs, labels[batch].to(args.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def predict(model, task, images, args):
    """Probabilities of the images, float32 [n, classes]."""
    model.eval()
    pixels = torch.from_numpy(task.images)
    batches = torch.from_numpy(images).split(256)
    outputs = [forward(model, pixels[batch], task, args).softmax(1).cpu() for batch in batches]
    return torch.cat(outputs).numpy()


def forward(model, images, task, args):
    """uint8 [n, size, size] -> outputs of the model, float32 [n, classes]."""
    inputs = encoder.to_input(images.to(args.device).float() / 255, task.mean, task.std)
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
        return model(inputs).float()


def parse_args():
    parser = Flags(description=__doc__)
    names = f"{', '.join(tasks.TASKS)}, tables or figure: `evaluate.py TASK --help` lists its flags"
    commands = parser.add_subparsers(dest="task", metavar="TASK", required=True, help=names)
    for task in tasks.TASKS:
        add_flags(commands.add_parser(task))
    for command in ("tables", "figure"):
        add = commands.add_parser(command).add_argument
        add("results", type=Path, metavar="RESULTS.csv", help="CSV that evaluate.py wrote")
        if command == "figure":
            add("figure", type=Path, metavar="FIGURE.svg", help="file to write")
        add("--baseline", metavar="ROW", default="ALL", help="row compared to (default: ALL)")
    args = parser.parse_args()
    if args.task in tasks.TASKS:
        check_args(args)
    return args


def add_flags(parser):
    """The flags of an evaluation, the same for every task."""
    count = number(int, least=1)
    default = "default: %(default)s"
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="the task's folder (npz tasks: or its file)")
    add("--encoder", nargs="+", required=True, help="encoder.pt, scratch or imagenet; or more")
    add("--results", type=Path, required=True, help="CSV to add lines to")
    add("--positive", metavar="CLASS", help="of two, which AUC and F1 are of (default: the last)")
    add("--name", help="row of the tables (default: the encoder's folder); others compare to ALL")
    add("--protocol", choices=["finetune", "linear"], default="finetune", help=default)
    add("--seeds", type=count, default=5, help=f"runs of fine-tuning, and of scratch; {default}")
    add("--arch", choices=encoder.ARCHS, default="resnet50", help=f"{default}, the paper's")
    size = number(int, least=encoder.SMALLEST)
    add("--size", type=size, default=224, help=f"side of an image; {default}, the paper's")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    linear = parser.add_argument_group("linear")
    add = linear.add_argument
    add("--draws", type=count, default=10, help=f"of each label share below 1; {default}")
    add("--repeats", type=count, default=10, help=f"of the cross-validation; {default}")
    add = linear.add_mutually_exclusive_group().add_argument
    share = {"type": number(least=1e-12, most=1), "nargs": "+", "default": [1.0], "metavar": "F"}
    add("--label-share", **share, help="of the training labels; several: a line each")
    add("--folds", type=number(int, least=2), help="cross-validation instead of the task's split")
    heading = "finetune (the paper's, but for batches, precision, resize)"
    add = parser.add_argument_group(heading).add_argument
    frozen = f"first epochs, which train batch norm and the linear layer alone; {default}"
    add("--epochs", type=count, default=70, help=default)
    add("--freeze-epochs", type=number(int, least=0), default=10, help=frozen)
    rate = number(least=1e-12)
    add("--lr", type=rate, default=1e-4, help=f"of Adam, up to the first unfrozen epoch; {default}")
    add("--lr-after", type=rate, default=2e-5, help=f"from the next epoch on; {default}")
    add("--weight-decay", type=number(least=0), default=5e-4, help=default)
    add("--batch-size", type=count, default=64, help=default)
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help=default)


def check_args(args):
    """Name the row and choose device and precision; one line for flags that do not fit."""
    if args.name is None:
        args.name = Path(args.encoder[0]).parent.name or args.encoder[0]
    if not re.fullmatch(r"[\w.+-]+", args.name):
        fail(f"--name {args.name}: use letters, digits and . + - _ only: it names files")
    if args.protocol == "linear" and args.precision != "auto":
        fail("--precision is for --protocol finetune: features are always in float32")
    if args.protocol == "finetune" and (args.folds or args.label_share != [1.0]):
        fail("--folds and --label-share are for --protocol linear")
    if args.protocol == "finetune" and args.seeds < len(args.encoder):
        fail(f"--seeds {args.seeds} leaves encoders unused: give at least {len(args.encoder)}")
    args.device = encoder.choose_device(args.device)
    precision = encoder.choose_precision(args.precision, args.device)
    args.precision = str(precision).removeprefix("torch.")


if __name__ == "__main__":
    run_script(main)
