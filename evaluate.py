"""Evaluate encoders on a downstream classification task, and print the tables.

    python evaluate.py covid-ct DATA --encoder RUN/encoder.pt --results results.csv    # one line a seed
    python evaluate.py covid-ct DATA --encoder scratch --results results.csv
    python evaluate.py tables results.csv                                              # Markdown

Lines that results.csv already holds for the same encoder, settings and data are not computed again. The test scores
are kept in results-scores/, so that any two rows can be compared image by image; near-duplicates-TASK.csv there names the
test images that look like a training image.
"""

import argparse
import csv
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # comes with scikit-learn
from torch import nn
from tqdm import tqdm

from common import auc, simclr
from common.encoder import encoder_hash, features, input_statistics, load_encoder
from common.files import atomic_write, csv_line, exclusive, fail, run_script
from common.tables import COLUMNS, read_results, scores_file, scores_folder, tables
from common.tasks import DUPLICATE_BITS, leaks, load_task, near_pairs, split_of

TASKS = ["covid-ct", "organ", "head-ct", "toy-lesion", "toy-organ"]
C_GRID = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]  # of the linear probe, chosen by AUC on the validation split


def main():
    if sys.argv[1:2] == ["tables"]:
        return print_tables(sys.argv[2:])
    args = parse_args()
    task = load_task(args.task, args.data, args.size)
    with exclusive(scores_folder(args.results)):
        evaluate(args, task)


def evaluate(args, task):
    device = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if args.device == "auto"
        else torch.device(args.device)
    )
    settings, probed = (
        describe(args, task),
        {},
    )  # probed: test probabilities of seeds to come, by linear
    report_duplicates(args, task)
    for source in args.encoder:  # a wrong file is refused before hours of training with the others
        load_encoder(source, args.arch, 0)
    for seed in range(args.seeds):
        source = args.encoder[seed % len(args.encoder)]
        row = {
            "task": args.task,
            "name": args.name,
            "encoder": encoder_hash(source),
            "protocol": args.protocol,
            "seed": seed,
            "settings": settings,
        }
        if is_done(args.results, row):
            print(f"{args.task} {args.name} {args.protocol} seed {seed}: done before")
            continue
        started = time.perf_counter()
        split = split_of(task, seed)
        if args.protocol == "finetune":
            probabilities = finetune(
                load_encoder(source, args.arch, seed), task, split, seed, args, device
            )
        else:
            if seed not in probed:
                same = [seed] if source == "scratch" else range(seed, args.seeds, len(args.encoder))
                probed |= probe(source, task, same, args, device)
            probabilities = probed.pop(seed)
        row |= {part: len(rows) for part, rows in split.items()} | pretraining(source)
        row |= {
            k: f"{v:.5f}" for k, v in auc.metrics(task.labels[split["test"]], probabilities).items()
        }
        row["seconds"] = f"{time.perf_counter() - started:.1f}"
        write_row(args.results, row, split["test"], task.labels[split["test"]], probabilities)
        print(
            f"{args.task} {args.name} {args.protocol} seed {seed}: AUC {row['auc']}  F1 {row['f1']}  accuracy {row['accuracy']}"
        )


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS) + "; or: tables results.csv")
    add(
        "data",
        type=Path,
        metavar="DATA",
        help="the task's folder (organ and the toy tasks: or its npz)",
    )
    add(
        "--encoder",
        required=True,
        nargs="+",
        help="encoder.pt, scratch or imagenet; several (seeds of pre-training) take turns",
    )
    add("--results", type=Path, required=True, help="CSV to add lines to")
    add(
        "--name",
        help="row of the tables (default: the encoder's folder); the row named ALL is the one compared to",
    )
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
        help="lines: each its own head and order (finetune), nine tenths of the training "
        "images (linear), random weights (scratch) and split (head-ct)",
    )
    add("--arch", choices=simclr.ARCHS, default="resnet50", help="default: the paper's")
    add(
        "--size",
        type=int,
        default=224,
        help="side of an image in pixels (default: the paper's 224)",
    )
    add("--epochs", type=int, default=70, help="finetune: default: the paper's 70")
    add(
        "--freeze-epochs",
        type=int,
        default=10,
        help="finetune: encoder frozen, but for batch norm; default: the paper's 10",
    )
    add("--lr", type=float, default=1e-4, help="finetune: Adam; default: the paper's 1e-4")
    add("--weight-decay", type=float, default=5e-4, help="finetune: default: the paper's 5e-4")
    add("--batch-size", type=int, default=64, help="finetune: default: the paper's 64")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    args = parser.parse_args()
    args.name = args.name or (
        args.encoder[0]
        if args.encoder[0] in ("scratch", "imagenet")
        else Path(args.encoder[0]).parent.name
    )
    if not re.fullmatch(r"[\w.+-]+", args.name):
        fail(f"--name {args.name}: use letters, digits and . + - _ only: it names files")
    if args.seeds < len(args.encoder):
        fail(
            f"--seeds {args.seeds} leaves some of the {len(args.encoder)} encoders unused: give at least as many seeds"
        )
    return args


def describe(args, task):
    """The settings that decide a line, and a digest of the data, in words."""
    names = ["arch", "size"]
    if args.protocol == "finetune":
        names += ["epochs", "freeze_epochs", "lr", "weight_decay", "batch_size"]
    return " ".join(f"{name}={getattr(args, name)}" for name in names) + f" data={task.digest}"


def report_duplicates(args, task):
    """Count the test images with a near-duplicate in the training split, or the pairs that a made split keeps together;
    list all of them beside the scores."""
    if task.split is None:
        columns, pairs = ["image", "other", "bits"], near_pairs(task.hashes)
        found = f"{len(pairs)} pairs of near-duplicates are kept on one side of every split"
    else:
        split = split_of(task, 0)
        columns, pairs = ["test", "train", "bits"], leaks(task, split)
        found = f"{len(pairs)} of {len(split['test'])} test images have a near-duplicate among the training images"
    path = scores_folder(args.results) / f"near-duplicates-{args.task}.csv"
    named = [(task.names[one], task.names[other], bits) for one, other, bits in pairs]
    with atomic_write(path, text=True) as file:
        for row in [columns, *named]:
            csv_line(file, row)
    example = ": {} and {} ({} bits apart)".format(*named[0]) if named else ""
    print(f"{args.task}: {found} (dHash within {DUPLICATE_BITS} bits){example}; listed in {path}")


def probe(source, task, seeds, args, device):
    """{seed: test probabilities} of the linear probe: one encoder's features once, then its seeds side by side."""
    network, label = load_encoder(source, args.arch, seeds[0]), f"{args.name} features"
    found = np.concatenate(
        list(features(network, task.images, input_statistics(source), device, label))
    )
    # one BLAS thread a seed: on these matrices more threads cost more than they bring, 2 to 9 times on 2 cores
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(
            zip(
                seeds,
                pool.map(
                    lambda seed: linear(found, task.labels, split_of(task, seed), seed), seeds
                ),
            )
        )


def linear(features, labels, split, seed):
    """Logistic regression on standardised frozen features; C by validation AUC. Test probabilities [n, classes].

    The fit itself has no randomness, so each seed trains on its own random nine tenths of the training images (our
    choice): the spread over seeds is then one over training sets. All of C_GRID is tried: to stop at the first drop in
    validation AUC chose far too small a C on head-ct, whose 40 validation images make AUC jump. Beyond 5,000 images the
    fit stops at ten times scikit-learn's tolerance (our choice): a quarter of the time on organ, AUC the same to 0.0003;
    on small sets that would change which C is best.
    """
    n = len(split["train"])
    train = np.sort(np.random.default_rng(seed).permutation(split["train"])[: n - n // 10])
    scaled = StandardScaler().fit(features[train]).transform(features)
    model = LogisticRegression(max_iter=2000, warm_start=True, tol=1e-4 if n < 5000 else 1e-3)
    best, best_auc = None, -1.0
    for c in C_GRID:
        model.set_params(C=c).fit(scaled[train], labels[train])
        value = auc.metrics(labels[split["val"]], model.predict_proba(scaled[split["val"]]))["auc"]
        if value > best_auc:
            best, best_auc = model.predict_proba(scaled[split["test"]]), value
    return best


def finetune(encoder, task, split, seed, args, device):
    """The paper's protocol: encoder and linear layer, frozen encoder first, best epoch by validation accuracy.

    Frozen means all but batch norm, as Lightning's BackboneFinetuning does it (official code). Test probabilities.
    """
    torch.manual_seed(seed)
    width = encoder(torch.zeros(2, 3, 64, 64)).shape[1]
    model = nn.Sequential(encoder, nn.Linear(width, task.classes)).to(
        device, memory_format=torch.channels_last
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    norms = {
        id(p) for m in encoder.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    }
    labels = torch.from_numpy(task.labels)
    generator = torch.Generator().manual_seed(seed)
    train = torch.from_numpy(split["train"])
    best, best_accuracy = None, -1.0
    for epoch in tqdm(range(args.epochs), f"{args.name} seed {seed}", unit="epoch"):
        for p in encoder.parameters():
            p.requires_grad_(epoch >= args.freeze_epochs or id(p) in norms)
        model.train()
        for rows in train[torch.randperm(len(train), generator=generator)].tensor_split(
            -(-len(train) // args.batch_size)
        ):
            inputs = network_input(task, rows, device, task.mean, task.std)
            if task.vertical_flip:
                flip = torch.rand(len(rows), generator=generator) < 0.5
                inputs = torch.where(flip.to(device)[:, None, None, None], inputs.flip(2), inputs)
            loss = nn.functional.cross_entropy(model(inputs), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = (
            predict(model, task, split["val"], device).argmax(1) == task.labels[split["val"]]
        ).mean()
        if accuracy > best_accuracy:
            best_accuracy = accuracy
            best = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(best)
    return predict(model, task, split["test"], device)


@torch.inference_mode()
def predict(model, task, rows, device):
    model.eval()
    batches = torch.from_numpy(rows).split(256)
    return torch.cat(
        [
            model(network_input(task, b, device, task.mean, task.std)).softmax(1).cpu()
            for b in batches
        ]
    ).numpy()


def network_input(task, rows, device, mean, std):
    return simclr.to_input(
        torch.from_numpy(task.images[rows.numpy()]).to(device).float() / 255, mean, std
    )


def pretraining(source):
    """Slices kept, steps and seconds of the run that made the encoder, from the log beside it; empty without one."""
    log = Path(source).parent / "log.jsonl"
    if source in ("scratch", "imagenet") or not log.is_file():
        return {"slices": "", "steps": "", "pretrain_seconds": ""}
    first, *epochs = [json.loads(line) for line in log.read_text().splitlines()]
    seconds = sum(line["seconds"] for line in epochs)
    return {
        "slices": first["settings"]["slices"],
        "steps": first["settings"]["steps"],
        "pretrain_seconds": f"{seconds:.1f}",
    }


def is_done(results, row):
    return any(
        all(old[key] == str(value) for key, value in row.items()) for old in read_results(results)
    )


def write_row(results, row, images, labels, probabilities):
    """Save the test scores, then add the line, in place of one with the same task, name, protocol and seed."""
    with atomic_write(scores_file(results, row)) as file:
        np.savez(file, images=images, labels=labels, probabilities=probabilities.astype(np.float32))

    def same(old):
        return all(old[key] == str(row[key]) for key in ("task", "name", "protocol", "seed"))

    rows = [old for old in read_results(results) if not same(old)] + [row]
    with atomic_write(results, text=True) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def print_tables(arguments):
    parser = argparse.ArgumentParser(
        prog="evaluate.py tables", description="Print results.csv as Markdown tables."
    )
    parser.add_argument("results", type=Path)
    parser.add_argument(
        "--baseline", default="ALL", help="row that every other one is compared to (default: ALL)"
    )
    args = parser.parse_args(arguments)
    if not args.results.is_file():
        fail(
            f"{args.results}: no such file: evaluate.py TASK ... --results {args.results} makes it"
        )
    print(tables(args.results, args.baseline))


if __name__ == "__main__":
    run_script(main)
