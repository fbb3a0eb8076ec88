"""Drop redundant CT slices before self-supervised pre-training.

Reads every slice of DATA once into a slice store in OUT, then writes which slices a strategy keeps:

    python reduce.py DATA OUT --strategy hash --threshold 6     # the paper's best: OUT/hash-6.csv
    python reduce.py DATA OUT --strategy ssim --keep 0.1        # the threshold that keeps a tenth
    python reduce.py DATA OUT --strategy random --keep 857      # the baseline at Hash-6's budget
    python reduce.py DATA OUT --strategy random --like OUT/hash-6.csv   # the same in every volume
    python reduce.py compare OUT/hash-6.csv OUT/random-keep-857.csv     # how much they agree

strategy   similar, so that one of the two goes, when      default T
hash       at most T of the 64 bits of dHash differ        6       the paper's best
ssim       structural similarity is at least T             0.7     ours: near hash-6's budget
mi         normalised mutual information is at least T     0.45    the same
embedding  the cosine of ResNet features is at least T     0.997   the same, for encoders of
                                                                   pretrain.py; for others --keep
every-n    (every T-th slice stays)                        8       ours
random     (slices drawn at random stay)                   -       --keep or --like
redundant  (the slices most similar to others stay)        -       ours: the opposite pole of hash

DATA is any tree of DICOM series and/or PNG or JPEG slices (a folder is a volume; in a flat folder
of <volume>_<number>.png the name before the last _ is). A second strategy on the same DATA reuses
the store. Beside each selection, `row,kept,representative,similarity`, lie its counts (.json) and a
contact sheet (.png); skipped.csv names the files that are no readable CT slice. Of similar slices
the first in z order stays.
"""

import argparse
import csv
import json
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from common import reduction
from common.files import atomic_write, code_digest, exclusive, fail, run_script, versions
from common.hashing import hamming
from common.pictures import contact_sheet
from common.similarity import MEASURES, RADIUS
from common.store import check_folders, open_or_build_store, read_selection, store_digest
from common.workers import in_order, worker_pool

TO_A_BUDGET = ["every-n", "random", "redundant"]  # strategies that --like can match
BASELINES = ["all", *TO_A_BUDGET]
WHOLE_FROM = {"hash": 0, "every-n": 1}  # strategies of whole thresholds: the smallest one
DEFAULT_THRESHOLDS = {"hash": 6, "ssim": 0.7, "mi": 0.45, "embedding": 0.997, "every-n": 8}
CODE = ["reduce.py", "common/reduction.py", "common/hashing.py"]
SIMILARITY_CODE = ["common/similarity.py"]
EMBEDDING_CODE = ["common/encoder.py"]  # it decides the features


def main():
    if sys.argv[1:2] == ["compare"]:
        return compare(sys.argv[2:])
    args = parse_args()
    check_folders(args.data, args.out)
    with exclusive(args.out):
        started = time.perf_counter()
        store = open_or_build_store(args.data, args.out, args.size, args.window, args.workers)
        stored = time.perf_counter()
        representative, similarity, threshold = select(args, store)
        selected = time.perf_counter()
        name = selection_name(args, threshold)
        kept = representative == np.arange(len(representative))
        write_selection(args.out / f"{name}.csv", representative, similarity)
        with atomic_write(args.out / f"{name}.png") as file:
            contact_sheet(name, store, representative).save(file, "PNG", compress_level=1)
        seconds = {
            "store": stored - started,
            "select": selected - stored,
            "write": time.perf_counter() - selected,
        }
        dose = reduction.expected_dose(store.hashes[kept], store.volume_index[kept])
        write_summary(args, name, threshold, store, kept, dose, seconds)
    found = f"{name}: kept {kept.sum()} of {len(kept)} slices ({kept.mean():.2%})"
    if args.keep is not None and threshold is not None:
        found += f" by threshold {threshold}, which comes closest to {args.keep}"
    print(f"{found} -> {args.out / name}.csv")
    print(f"  dose {dose:.3g}: near-duplicates that a kept slice meets in a shuffled batch of 128")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="tree of DICOM series and/or PNG or JPEG slices")
    add("out", type=Path, metavar="OUT", help="folder for the slice store and the selections")
    add("--strategy", required=True, choices=[*BASELINES, "hash", *MEASURES, "embedding"])
    add("--threshold", type=float, help="T of the table above")
    add(
        "--keep",
        type=budget,
        help="budget instead of a threshold: up to 1 a share of the slices (1 keeps all), from 2 "
        "on a number of slices (default of random and redundant: 0.1)",
    )
    add(
        "--like",
        type=Path,
        metavar="SELECTION.csv",
        help="for every-n, random and redundant: keep as many slices of each volume as this "
        "selection in OUT",
    )
    add(
        "--scope",
        choices=["volume", "dataset"],
        default="volume",
        help="select within each volume (paper) or over all at once (the drafts' HashAll)",
    )
    add(
        "--encoder",
        metavar="PATH|imagenet",
        help="for embedding: an encoder.pt of pretrain.py, or torchvision's ImageNet ResNet-50 "
        "(downloaded)",
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
    check_flags(args)
    if args.threshold is None and args.keep is None and args.like is None:
        args.threshold = DEFAULT_THRESHOLDS.get(args.strategy)
        if args.strategy in ("random", "redundant"):
            args.keep = 0.1
    if args.threshold is not None and args.strategy in WHOLE_FROM:
        args.threshold = int(args.threshold)
    return args


def budget(text):
    """--keep: a share of the slices is a float, their number an int."""
    value = float(text)
    if 0 < value <= 1:
        return value
    if value >= 2 and value.is_integer():
        return int(value)
    fail(
        f"--keep {text} is not a share (above 0, up to 1) nor a number of slices (whole, 2 or more)"
    )


def check_flags(args):
    """Stop with one line at flags that do not fit together."""
    strategy = args.strategy
    given = [flag for flag in (args.threshold, args.keep, args.like) if flag is not None]
    if len(given) > 1:
        fail("--threshold, --keep and --like exclude each other: give one")
    if given and strategy == "all":
        fail("--strategy all keeps every slice: it takes no --threshold, --keep or --like")
    if args.threshold is not None and strategy in ("random", "redundant"):
        fail(f"--strategy {strategy} has no threshold: use --keep or --like")
    if args.threshold is not None and strategy in WHOLE_FROM:
        least = WHOLE_FROM[strategy]
        if args.threshold < least or not args.threshold.is_integer():
            fail(f"--threshold {args.threshold:g}: {strategy} needs a whole number from {least} on")
    if not given and strategy in MEASURES and strategy not in DEFAULT_THRESHOLDS:
        fail(f"--strategy {strategy} has no default threshold: give --threshold or --keep")
    if args.like is not None:
        check_like(args)
    if args.scope == "dataset" and strategy in (*MEASURES, "redundant"):
        fail(
            "--scope dataset is for all, every-n, random, hash and embedding: "
            f"{strategy} compares slices within a volume"
        )
    if strategy == "ssim" and args.size < 2 * RADIUS + 1:
        fail(f"--strategy ssim needs slices of 11 pixels or more, not --size {args.size}")
    if (strategy == "embedding") != (args.encoder is not None):
        fail("--strategy embedding and --encoder belong together: give an encoder.pt or imagenet")
    similarity = strategy in (*MEASURES, "embedding")
    if similarity and args.threshold is not None and not -1 <= args.threshold <= 1:
        fail(f"--threshold {args.threshold:g}: a similarity is between -1 and 1")
    if args.size < 1:
        fail(f"--size {args.size} is not a number of pixels")
    if args.seed < 0:
        fail(f"--seed {args.seed}: must be at least 0")
    if args.workers is not None and args.workers < 1:
        fail(f"--workers {args.workers}: must be at least 1")
    if args.window is not None and not (np.isfinite(args.window).all() and args.window[1] > 0):
        fail(
            f"--window {args.window[0]} {args.window[1]}: needs a center and a width above 0 in HU"
        )


def check_like(args):
    """Stop with one line at a --like that cannot be matched."""
    if args.strategy not in TO_A_BUDGET:
        fail(f"--like is for {', '.join(TO_A_BUDGET)}, not for {args.strategy}")
    if args.scope == "dataset":
        fail("--like counts the slices of each volume: it does not go with --scope dataset")
    if not args.like.is_file():
        fail(f"--like {args.like}: no such selection: make it first")
    if args.like.resolve().parent != args.out.resolve():
        fail(f"--like {args.like}: belongs to another store than {args.out}")


# --- Selection.


def select(args, store):
    """The chosen strategy on every group of slices, volumes or the whole data set.

    Returns (representative row of each row, similarity to it, threshold used or None).
    """
    groups = store.volumes if args.scope == "volume" else [np.arange(len(store.slices))]
    check_budget(args, store, groups)
    if args.strategy in BASELINES:
        return *by_baseline(args, store, groups), args.threshold
    if args.strategy == "hash":
        select_at = partial(by_hash, store, groups)
    elif args.strategy in MEASURES:
        select_at = partial(by_pixels, args, store, groups)
    else:
        select_at = partial(by_embedding, groups, embed_slices(args, store))
    if args.keep is None:
        return *select_at(args.threshold), args.threshold
    return select_to_budget(args, store, groups, select_at)


def by_baseline(args, store, groups):
    """A strategy that knows how many slices stay: (representative row, bits of dHash that differ)
    of every row."""
    rng = np.random.default_rng(args.seed)
    found = []
    for rows, count in zip(groups, counts_to_keep(args, groups)):
        n = len(rows)
        if args.strategy == "all":
            representative = np.arange(n)
        elif args.strategy == "random":
            representative = reduction.select_random(n, count, rng)
        elif args.strategy == "redundant":
            representative = reduction.select_redundant(store.hashes[rows], count)
        elif args.threshold is not None:
            representative = reduction.select_every(n, args.threshold)
        else:
            representative = reduction.select_evenly(n, count)
        found.append(rows[representative])
    return with_bits(store, found)


def by_hash(store, groups, threshold):
    """(representative row, bits of dHash that differ) of every row."""
    found = [rows[reduction.select_hash(store.hashes[rows], threshold)] for rows in groups]
    return with_bits(store, found)


def with_bits(store, found):
    """The representative rows of each group -> (those of all rows, bits of dHash that differ)."""
    representative = np.concatenate(found)
    return representative, hamming(store.hashes, store.hashes[representative])


def by_pixels(args, store, groups, threshold):
    """(representative row, similarity) of every row, by a measure of similarity.py."""
    work = partial(select_volume, store.path, args.strategy, threshold)
    spans = [(rows[0], rows[-1] + 1) for rows in groups]
    with worker_pool(args.workers) as pool:
        found = in_order(pool, work, spans)
        return with_bar(f"{args.strategy} {threshold:g}", groups, found)


def select_volume(path, strategy, threshold, span):
    """Greedy selection of one volume in a worker process: rows first to last (excluded)."""
    first, last = span
    slices = np.array(np.load(path, mmap_mode="r")[first:last])
    return reduction.select_similar(len(slices), MEASURES[strategy](slices), threshold)


def by_embedding(groups, path, threshold):
    """(representative row, cosine) of every row, by the features at path, float32 [N, d]."""
    features = np.load(path, mmap_mode="r")
    found = (reduction.select_embeddings(features[rows], threshold) for rows in groups)
    with threadpool_limits(1):  # so that the number of cores changes no result
        return with_bar(f"embedding {threshold:g}", groups, found)


def with_bar(title, groups, found):
    """(representative, similarity) of each group, as it is found -> (representative row,
    similarity) of every row, under a progress bar."""
    representatives = []
    similarities = []
    with tqdm(desc=title, total=sum(map(len, groups)), unit="slice") as bar:
        for rows, (representative, similarity) in zip(groups, found):
            representatives.append(rows[representative])
            similarities.append(similarity)
            bar.update(len(rows))
    return np.concatenate(representatives), np.concatenate(similarities)


def embed_slices(args, store):
    """The path of the features of all slices, made once for an encoder.

    Those that other code made, or that belong to an older store, are made again.
    """
    from common.encoder import embed  # only here: importing torch takes seconds

    store_made = (args.out / "store.json").read_text()
    made_by = json.dumps({"code": code_digest(*EMBEDDING_CODE), "store": store_made})
    record = args.out / "features.json"
    if not record.exists() or record.read_text() != made_by:
        for features in args.out.glob("features-*.npy"):
            features.unlink()
        with atomic_write(record, text=True) as file:
            file.write(made_by)
    return embed(args.encoder, store.slices, args.out)


# --- Budgets.


def check_budget(args, store, groups):
    """Stop with one line at a number of slices that cannot be kept."""
    if not isinstance(args.keep, int):
        return
    if args.keep > len(store.slices):
        fail(f"--keep {args.keep}: there are only {len(store.slices)} slices")
    if args.keep < len(groups):
        fail(
            f"--keep {args.keep}: each of the {len(groups)} volumes keeps at least one slice: "
            f"give {len(groups)} or more, or --scope dataset"
        )


def counts_to_keep(args, groups):
    """How many slices each group keeps: int [groups]; all of them without --keep or --like."""
    if args.like is not None:
        kept = read_selection(args.like).kept
        counts = np.array([np.isin(rows, kept).sum() for rows in groups])
        if (counts == 0).any():
            fail(f"--like {args.like}: keeps no slice of {(counts == 0).sum()} volumes")
        return counts
    sizes = np.array([len(rows) for rows in groups])
    share = args.keep or 1
    if isinstance(args.keep, int):
        share = args.keep / sizes.sum()
    return reduction.share_out(sizes, share)


def select_to_budget(args, store, groups, select_at):
    """The selection by the one threshold whose number of kept slices comes closest to --keep."""
    total = len(store.slices)
    target = args.keep if isinstance(args.keep, int) else args.keep * total
    # the search mostly ends near the threshold that it chooses, so that need not be done twice
    select_at = lru_cache(8)(select_at)

    def count(threshold):
        representative, _ = select_at(threshold)
        return int((representative == np.arange(total)).sum())

    if args.strategy == "hash":
        threshold = reduction.closest({bits: count(bits) for bits in range(65)}, target)
    else:
        guess = DEFAULT_THRESHOLDS.get(args.strategy, 0.5)
        threshold = reduction.search_threshold(count, len(groups), total, target, guess)
    return *select_at(threshold), threshold


# --- Output.


def selection_name(args, threshold):
    """Such as hash-6, random-keep-0.1, random-like-hash-6, hash-6-dataset."""
    name = args.strategy
    if isinstance(args.keep, int):
        name += f"-keep-{args.keep}"
    elif args.keep is not None:
        name += f"-keep-{args.keep:g}"
    elif args.like is not None:
        name += f"-like-{args.like.stem}"
    elif threshold is not None:
        name += f"-{threshold:g}"
    if args.strategy == "random" and args.seed:
        name += f"-seed-{args.seed}"
    if args.scope == "dataset" and args.strategy != "all":
        name += "-dataset"
    return name


def write_selection(path, representative, similarity):
    """NAME.csv; similarity: to the representative (hash and baselines: bits that differ)."""
    if similarity.dtype.kind == "f":
        similarity = similarity.round(6)
    with atomic_write(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "kept", "representative", "similarity"])
        for row, (stands_for_it, alike) in enumerate(zip(representative, similarity)):
            writer.writerow([row, int(row == stands_for_it), stands_for_it, alike])


def write_summary(args, name, threshold, store, kept, dose, seconds):
    """NAME.json: settings, counts, seconds by stage, and the code and versions that made it."""
    settings = vars(args) | {"threshold": threshold, "like": args.like and args.like.stem}
    for key in ("data", "out", "workers"):
        del settings[key]
    volumes = {
        volume: {"slices": len(rows), "kept": int(kept[rows].sum())}
        for volume, rows in zip(store.names, store.volumes)
    }
    code = CODE
    if args.strategy in (*MEASURES, "embedding"):
        code = code + SIMILARITY_CODE
    if args.strategy == "embedding":
        code = code + EMBEDDING_CODE
    summary = {
        "name": name,
        "settings": settings,
        "slices": len(kept),
        "kept": int(kept.sum()),
        "dose": round(dose, 6),
        "skipped": store.skipped,
        "store": store_digest(args.out),
        "volumes": volumes,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "code": code_digest(*code),
        "versions": versions(),
    }
    with atomic_write(args.out / f"{name}.json", text=True) as file:
        json.dump(summary, file, indent=1)


# --- Comparison.


def compare(argv):
    """How much selections of one store agree: what each keeps and its dose, and the Jaccard index
    of the kept slices of every pair (1: the same slices, 0: none in common), as Markdown."""
    parser = argparse.ArgumentParser(prog="reduce.py compare", description=compare.__doc__)
    parser.add_argument(
        "selections", type=Path, nargs="+", metavar="SELECTION.csv", help="written by reduce.py"
    )
    paths = parser.parse_args(argv).selections
    selections = {path: read_selection(path) for path in paths}
    for path in paths:
        if path.resolve().parent != paths[0].resolve().parent:
            fail(f"{path}: belongs to another store than {paths[0]}")

    print("| selection | slices | share | share of a volume, min to max | dose |")
    print("|---|---|---|---|---|")
    for path in paths:
        store = selections[path].store
        kept = selections[path].kept
        shares = [np.isin(rows, kept).mean() for rows in store.volumes]
        dose = reduction.expected_dose(store.hashes[kept], store.volume_index[kept])
        print(
            f"| {path.stem} | {len(kept)} | {len(kept) / len(store.slices):.1%} "
            f"| {min(shares):.1%} to {max(shares):.1%} | {dose:.2f} |"
        )

    print()
    print(f"| Jaccard | {' | '.join(path.stem for path in paths)} |")
    print("|---" * (len(paths) + 1) + "|")
    for path in paths:
        kept = selections[path].kept
        row = [f"{jaccard(kept, selections[other].kept):.2f}" for other in paths]
        print(f"| {path.stem} | {' | '.join(row)} |")


def jaccard(a, b):
    """Share of the rows in either set that are in both."""
    return len(np.intersect1d(a, b)) / len(np.union1d(a, b))


if __name__ == "__main__":
    run_script(main)
