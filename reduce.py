"""Drop redundant CT slices before self-supervised pre-training.

Reads every slice of DATA once into a slice store in OUT, then writes which slices a strategy keeps:

    python reduce.py DATA OUT --strategy hash --threshold 6     # the paper's best: OUT/hash-6.csv
    python reduce.py DATA OUT --strategy ssim --keep 0.1        # to a budget: the threshold is searched and reported
    python reduce.py DATA OUT --strategy random --keep 0.1      # the baseline at that budget: OUT/random-keep-0.1.csv

strategy   similar, so that one of the two goes, when      default T
hash       at most T of the 64 bits of dHash differ        6       the paper's best
ssim       structural similarity is at least T             0.7     ours: keeps about what hash-6 keeps of real CT
mi         normalised mutual information is at least T     0.45    the same
embedding  the cosine of ResNet features is at least T     0.997   the same, for encoders of pretrain.py; with others
                                                                   (imagenet) use --keep and look at the picture
every-n    (every T-th slice stays)                        8       ours

DATA is any tree of DICOM series and/or PNG or JPEG slices (a folder is a volume; in a flat folder of
<volume>_<number>.png the name before the last _ is). A second strategy on the same DATA reuses the store.
"""

import argparse
import csv
import json
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from common import reduction, similarity
from common.files import atomic_write, exclusive, fail, run_script, versions
from common.hashing import hamming
from common.sheet import contact_sheet
from common.store import check_folders, open_or_build_store
from common.workers import in_order, worker_pool

DEFAULT_THRESHOLDS = {
    "hash": 6,
    "ssim": 0.7,
    "mi": 0.45,
    "embedding": 0.997,
    "every-n": 8,
}  # see above


def main():
    args = parse_args()
    check_folders(args.data, args.out)
    with exclusive(args.out):
        reduce(args)


def reduce(args):
    started = time.perf_counter()
    store = open_or_build_store(args.data, args.out, args.size, args.window, args.workers)
    stored = time.perf_counter()

    representative, similar, threshold = select(args, store)
    selected = time.perf_counter()

    name = selection_name(args, threshold)
    kept = representative == np.arange(len(representative))
    write_selection(args.out / f"{name}.csv", representative, similar)
    with atomic_write(args.out / f"{name}.png") as file:
        contact_sheet(name, store, representative).save(file, "PNG", compress_level=1)
    seconds = {
        "store": stored - started,
        "select": selected - stored,
        "write": time.perf_counter() - selected,
    }
    write_summary(args, name, threshold, store, kept, seconds)
    by = (
        f" by threshold {threshold}, which comes closest to {args.keep:g}"
        if args.keep and threshold is not None
        else ""
    )
    print(
        f"{name}: kept {kept.sum()} of {len(kept)} slices ({kept.mean():.2%}){by} -> {args.out / name}.csv"
    )


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="tree of DICOM series and/or PNG or JPEG slices")
    add("out", type=Path, metavar="OUT", help="folder for the slice store and the selections")
    add(
        "--strategy",
        required=True,
        choices=["all", "every-n", "random", "hash", "ssim", "mi", "embedding"],
    )
    add("--threshold", type=float, help="T of the table above")
    add(
        "--keep",
        type=float,
        help="budget instead of a threshold: share of slices to keep (default of random: 0.1)",
    )
    add(
        "--scope",
        choices=["volume", "dataset"],
        default="volume",
        help="select within each volume (paper) or over all volumes at once (the drafts' HashAll)",
    )
    add(
        "--encoder",
        metavar="PATH|imagenet",
        help="for embedding: an encoder.pt of pretrain.py, or torchvision's ImageNet ResNet-50 (downloaded)",
    )
    add("--size", type=int, default=224, help="side of a stored slice in pixels")
    add(
        "--window",
        type=float,
        nargs=2,
        metavar=("CENTER", "WIDTH"),
        help="clip to this HU window instead of min-max scaling each slice (ablation)",
    )
    add("--seed", type=int, default=0, help="for random")
    add("--workers", type=int, default=None, help="processes (default: one a core)")
    args = parser.parse_args()
    if args.threshold is not None and args.keep is not None:
        fail("--threshold and --keep exclude each other: give one")
    if args.threshold is not None and args.strategy in ("all", "random"):
        fail(
            f"--strategy {args.strategy} has no threshold"
            + (": use --keep" if args.strategy == "random" else "")
        )
    if args.keep is not None and args.strategy == "all":
        fail("--strategy all keeps every slice: --keep needs another strategy")
    if args.keep is not None and not 0 < args.keep <= 1:
        fail(f"--keep {args.keep:g} is not a share: give a number above 0 and up to 1")
    if args.strategy in ("hash", "every-n") and args.threshold is not None:
        if args.threshold != int(args.threshold) or args.threshold < (
            1 if args.strategy == "every-n" else 0
        ):
            fail(
                f"--threshold {args.threshold:g}: {args.strategy} needs a whole number of "
                + ("slices, 1 or more" if args.strategy == "every-n" else "bits")
            )
        args.threshold = int(args.threshold)
    if args.strategy in ("ssim", "mi") and args.scope == "dataset":
        fail(
            f"--scope dataset is for all, every-n, random, hash and embedding: {args.strategy} would take too long"
        )
    if (args.strategy == "embedding") != (args.encoder is not None):
        fail("--strategy embedding and --encoder belong together: give an encoder.pt or imagenet")
    if args.size < 1:
        fail(f"--size {args.size} is not a number of pixels")
    if args.strategy == "random" and args.keep is None:
        args.keep = 0.1
    if args.keep is None and args.threshold is None:
        args.threshold = DEFAULT_THRESHOLDS.get(args.strategy)
    return args


def select(args, store):
    """The chosen strategy on every group: (representative row of each row, similarity to it, threshold used or None)."""
    groups = store.volumes if args.scope == "volume" else [np.arange(len(store.hashes))]
    sizes = np.array([len(rows) for rows in groups])
    if args.strategy in ("all", "random", "every-n"):
        rng, budget = np.random.default_rng(args.seed), reduction.share_out(sizes, args.keep or 1)
        chosen = {
            "all": lambda n, count: np.arange(n),
            "random": lambda n, count: reduction.select_random(n, count, rng),
            "every-n": lambda n, count: (
                reduction.select_evenly(n, count)
                if args.keep
                else reduction.select_every(n, args.threshold)
            ),
        }[args.strategy]
        representative = join(groups, [chosen(n, count) for n, count in zip(sizes, budget)])
        return (
            representative,
            hamming(store.hashes, store.hashes[representative]),
            args.threshold,
        )

    pick = {"hash": by_hash, "ssim": by_pairs, "mi": by_pairs, "embedding": by_embedding}[
        args.strategy
    ](args, store, groups)
    pick = lru_cache(8)(pick)  # the search mostly ends near the threshold it chooses
    threshold = threshold_for(args, groups, pick) if args.keep else args.threshold
    return *pick(threshold), threshold


def by_hash(args, store, groups):
    """pick(threshold) -> (representative row, bits that differ) of every row, by dHash."""

    def pick(threshold):
        representative = join(
            groups, [reduction.select_hash(store.hashes[rows], threshold) for rows in groups]
        )
        return representative, hamming(store.hashes, store.hashes[representative])

    return pick


def by_pairs(args, store, groups):
    """pick(threshold) -> (representative row, similarity) of every row, by SSIM or mutual information of the slices."""
    if args.strategy == "ssim" and args.size < 2 * similarity.RADIUS + 1:
        fail(f"--strategy ssim needs slices of 11 pixels or more, not --size {args.size}")

    def pick(threshold):
        work = partial(select_volume, store.path, args.strategy, threshold)
        with worker_pool(args.workers) as pool, slice_bar(args.strategy, threshold, groups) as bar:
            found = []
            for representative, measured in in_order(
                pool, work, [(rows[0], rows[-1] + 1) for rows in groups]
            ):
                found.append((representative, measured))
                bar.update(len(measured))
        return join(groups, [r for r, _ in found]), np.concatenate([s for _, s in found])

    return pick


def select_volume(path, strategy, threshold, span):
    """Greedy selection of one volume, rows first to last (excluded) of the store at path, in a process of its own."""
    slices = np.array(np.load(path, mmap_mode="r")[span[0] : span[1]])
    measure = similarity.MEASURES[strategy](slices)
    return reduction.greedy(len(slices), measure, lambda values: values >= threshold)


def by_embedding(args, store, groups):
    """pick(threshold) -> (representative row, cosine) of every row, by features of a ResNet."""
    from common.encoder import embed  # only here: importing torch takes seconds

    path = embed(args.encoder, store.slices, args.out)

    def pick(threshold):
        found = []
        with threadpool_limits(1), slice_bar(args.strategy, threshold, groups) as bar:
            for rows in groups:
                measure = similarity.cosine(np.load(path, mmap_mode="r")[rows])
                found.append(
                    reduction.greedy(len(rows), measure, lambda values: values >= threshold)
                )
                bar.update(len(rows))
        return join(groups, [r for r, _ in found]), np.concatenate([s for _, s in found])

    return pick


def slice_bar(strategy, threshold, groups):
    return tqdm(desc=f"{strategy} {threshold:g}", total=sum(map(len, groups)), unit="slice")


def threshold_for(args, groups, pick):
    """The one threshold whose kept share comes closest to --keep."""
    total = sum(map(len, groups))

    def count(threshold):
        return int((pick(threshold)[0] == np.arange(total)).sum())

    if args.strategy == "hash":  # every threshold there is
        return reduction.closest({t: count(t) for t in range(65)}, args.keep * total)
    guess = DEFAULT_THRESHOLDS[args.strategy]
    return reduction.search_threshold(count, len(groups), total, args.keep * total, guess)


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
        name += f"-{threshold:g}"
    if args.strategy == "random" and args.seed:
        name += f"-seed-{args.seed}"
    return name + ("-dataset" if args.scope == "dataset" and args.strategy != "all" else "")


def write_selection(path, representative, similar):
    """NAME.csv: row,kept,representative,similarity; similarity to the representative (hash and baselines: bits that differ)."""
    rounded = similar if similar.dtype.kind == "i" else similar.astype(float).round(6)
    with atomic_write(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "kept", "representative", "similarity"])
        writer.writerows(
            (row, int(row == r), r, s) for row, (r, s) in enumerate(zip(representative, rounded))
        )


def write_summary(args, name, threshold, store, kept, seconds):
    settings = {
        key: value for key, value in vars(args).items() if key not in ("data", "out", "workers")
    }
    per_volume = {
        n: {"slices": len(rows), "kept": int(kept[rows].sum())}
        for n, rows in zip(store.names, store.volumes)
    }
    summary = {
        "name": name,
        "settings": settings | {"threshold": threshold},
        "slices": len(kept),
        "kept": int(kept.sum()),
        "skipped": store.skipped,
        "store": json.loads((args.out / "store.json").read_text())["crc32"]["slices.csv"],
        "volumes": per_volume,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "versions": versions(),
    }
    with atomic_write(args.out / f"{name}.json", text=True) as file:
        json.dump(summary, file, indent=1)


if __name__ == "__main__":
    run_script(main)
