"""Drop redundant CT slices before self-supervised pre-training.

Reads every slice of DATA once into a slice store in OUT, then writes which slices a strategy keeps:

    python reduce.py DATA OUT --strategy hash --threshold 6     # the paper's best: OUT/hash-6.csv
    python reduce.py DATA OUT --strategy random --keep 0.1      # a baseline at a budget: OUT/random-keep-0.1.csv

DATA is any tree of DICOM series and/or PNG or JPEG slices (a folder is a volume; in a flat folder of
<volume>_<number>.png the name before the last _ is). A second strategy on the same DATA reuses the store.
"""

import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np

from common import reduction
from common.files import fail, versions, whole_file
from common.sheet import contact_sheet
from common.store import open_or_build_store

DEFAULT_THRESHOLDS = {"hash": 6, "every-n": 8}  # hash: the paper's best; every-n: ours, near what hash-6 keeps


def main():
    args = parse_args()
    started = time.perf_counter()
    store = open_or_build_store(args.data, args.out, args.size, args.window, args.workers)
    stored = time.perf_counter()

    representative, threshold = select(args, store)
    selected = time.perf_counter()

    name = selection_name(args, threshold)
    kept = representative == np.arange(len(representative))
    write_selection(args.out / f"{name}.csv", representative, reduction.hamming(store.hashes, store.hashes[representative]))
    with whole_file(args.out / f"{name}.png") as file:
        contact_sheet(store, representative).save(file, "PNG")
    seconds = {"store": stored - started, "select": selected - stored, "write": time.perf_counter() - selected}
    write_summary(args, name, threshold, store, kept, seconds)
    print(f"{name}: kept {kept.sum()} of {len(kept)} slices ({kept.mean():.1%}) -> {args.out / name}.csv")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="tree of DICOM series and/or PNG or JPEG slices")
    add("out", type=Path, metavar="OUT", help="folder for the slice store and the selections")
    add("--strategy", required=True, choices=["all", "every-n", "random", "hash"])
    add("--threshold", type=int, help="hash: bits that may differ (default 6); every-n: n (default 8)")
    add("--keep", type=float, help="budget instead of a threshold: share of slices to keep (default of random: 0.1)")
    add("--scope", choices=["volume", "dataset"], default="volume",
        help="select within each volume (paper) or over all volumes at once (the drafts' HashAll)")  # fmt: skip
    add("--size", type=int, default=224, help="side of a stored slice in pixels")
    add("--window", type=float, nargs=2, metavar=("CENTER", "WIDTH"),
        help="clip to this HU window instead of min-max scaling each slice (ablation)")  # fmt: skip
    add("--seed", type=int, default=0, help="for random")
    add("--workers", type=int, default=None, help="processes that decode (default: one a core)")
    args = parser.parse_args()
    if args.threshold is not None and args.keep is not None:
        fail("--threshold and --keep exclude each other: give one")
    if args.threshold is not None and args.strategy in ("all", "random"):
        fail(f"--strategy {args.strategy} has no threshold" + (": use --keep" if args.strategy == "random" else ""))
    if args.keep is not None and args.strategy == "all":
        fail("--strategy all keeps every slice: --keep needs another strategy")
    if args.keep is not None and not 0 < args.keep <= 1:
        fail(f"--keep {args.keep:g} is not a share: give a number above 0 and up to 1")
    if args.threshold is not None and args.threshold < (1 if args.strategy == "every-n" else 0):
        fail(f"--threshold {args.threshold} is too small for {args.strategy}")
    if args.size < 1:
        fail(f"--size {args.size} is not a number of pixels")
    if args.strategy == "random" and args.keep is None:
        args.keep = 0.1
    if args.keep is None and args.threshold is None:
        args.threshold = DEFAULT_THRESHOLDS.get(args.strategy)
    return args


def select(args, store):
    """The chosen strategy on every group: (representative row of each row, threshold used or None)."""
    groups = store.volumes if args.scope == "volume" else [np.arange(len(store.hashes))]
    sizes = np.array([len(rows) for rows in groups])
    budget = reduction.share_out(sizes, args.keep) if args.keep else None
    if args.strategy == "all":
        return np.arange(sizes.sum()), None
    if args.strategy == "random":
        rng = np.random.default_rng(args.seed)
        return join(groups, [reduction.select_random(n, k, rng) for n, k in zip(sizes, budget)]), None
    if args.strategy == "every-n":
        if args.keep:
            return join(groups, [reduction.select_evenly(n, k) for n, k in zip(sizes, budget)]), None
        return join(groups, [reduction.select_every(n, args.threshold) for n in sizes]), args.threshold

    def by_hash(threshold):
        return join(groups, [reduction.select_hash(store.hashes[rows], threshold) for rows in groups])

    threshold = args.threshold
    if args.keep:
        kept = {t: len(np.unique(by_hash(t))) for t in range(65)}
        threshold = reduction.threshold_for_budget(kept, sizes.sum(), args.keep)
        print(f"--keep {args.keep:g}: threshold {threshold} comes closest, {kept[threshold] / sizes.sum():.4f}")
    return by_hash(threshold), threshold


def join(groups, representatives):
    """Put each group's representatives (indices within the group) together as rows of the store."""
    joined = np.empty(sum(len(rows) for rows in groups), int)
    for rows, representative in zip(groups, representatives):
        joined[rows] = rows[representative]
    return joined


def selection_name(args, threshold):
    """hash-6, every-n-8, random-keep-0.1, hash-6-dataset, ...: the settings that tell selections of one store apart."""
    name = args.strategy
    if args.keep:
        name += f"-keep-{args.keep:g}"
    elif threshold is not None:
        name += f"-{threshold}"
    if args.strategy == "random" and args.seed:
        name += f"-seed-{args.seed}"
    return name + ("-dataset" if args.scope == "dataset" and args.strategy != "all" else "")


def write_selection(path, representative, bits):
    """NAME.csv: row,kept,representative,similarity; similarity in bits that differ, for the baselines too."""
    with whole_file(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "kept", "representative", "similarity"])
        writer.writerows((row, int(row == r), r, b) for row, (r, b) in enumerate(zip(representative, bits)))


def write_summary(args, name, threshold, store, kept, seconds):
    settings = {key: value for key, value in vars(args).items() if key not in ("data", "out", "workers")}
    per_volume = {n: {"slices": len(rows), "kept": int(kept[rows].sum())} for n, rows in zip(store.names, store.volumes)}
    summary = {
        "name": name,
        "settings": settings | {"threshold": threshold},
        "slices": len(kept),
        "kept": int(kept.sum()),
        "skipped": store.skipped,
        "volumes": per_volume,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "versions": versions(),
    }
    with whole_file(args.out / f"{name}.json", text=True) as file:
        json.dump(summary, file, indent=1)


if __name__ == "__main__":
    main()
