"""Drop redundant CT slices before self-supervised pre-training.

Reads every slice of DATA once into a slice store in OUT, then writes which slices a strategy keeps:

    python reduce.py DATA OUT --strategy hash --threshold 6     # the paper's best: OUT/hash-6.csv
    python reduce.py DATA OUT --strategy ssim --keep 0.1        # the threshold that keeps a tenth
    python reduce.py DATA OUT --strategy random --keep 857      # the baseline at Hash-6's budget
    python reduce.py DATA OUT --strategy random --like OUT/hash-6.csv   # the same in every volume

DATA is any tree of DICOM series and/or PNG or JPEG slices (a folder is a volume; in a flat folder
of <volume>_<number>.png the name before the last _ is). A second strategy on the same DATA reuses
the store. Beside each selection, `row,kept,representative,similarity`, lie its counts (.json) and a
contact sheet (.png); skipped.csv names the files that are no readable CT slice. Of similar slices
the first in z order stays. A selection that is there already is not made again.
"""

import json
import re
from argparse import ArgumentTypeError
from functools import partial
from operator import call
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from common import files, reduction
from common.files import Flags, atomic_write, exclusive, fail, number, run_script
from common.pictures import contact_sheet
from common.reduction import STRATEGIES, Group
from common.store import check_folders, open_or_build_store, read_selection, store_digest
from common.workers import in_order

KEEP = 0.1  # share that a strategy without a threshold keeps by default
STORE_FILES = ("slices", "skipped", "store")  # names that a selection must not take


def main():
    args = parse_args()
    check_folders(args.data, args.out)
    with exclusive(args.out):
        given = read_given(args)  # first of all, for a store takes its time
        store = open_or_build_store(args.data, args.out, args.size, args.window, args.workers)
        settings = settings_of(args, given)
        name = args.name or default_name(args)
        path, summary = args.out / f"{name}.csv", args.out / f"{name}.json"
        if path.exists() and summary.exists():
            remedy = "give another --name, or delete it"
            files.refuse_other(path, files.read_json(summary), settings, remedy)
            print(f"{name}: done before")
        else:
            summary.unlink(missing_ok=True)
            make_selection(args, path, settings, store, given)
        made = files.read_json(summary)
    counts = f"kept {made['kept']} of {made['slices']} slices ({made['kept'] / made['slices']:.2%})"
    if made["threshold"] != args.threshold:
        counts += f" by threshold {made['threshold']}, which comes closest to {args.keep}"
    print(f"{name}: {counts} -> {path}")
    print(f"  dose {made['dose']:.3g}: near-duplicates that a slice meets in a batch of 128")


# --- Flags.


def parse_args():
    parser = Flags(description=__doc__ + strategies_table())
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="tree of DICOM series and/or PNG or JPEG slices")
    add("out", type=Path, metavar="OUT", help="folder for the slice store and the selections")
    add("--strategy", required=True, choices=STRATEGIES, help="see the table above")
    add("--name", type=file_name, help="of the files of the selection (default: from the flags)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--threshold", type=number(least=-1), metavar="T", help="see the table")
    keep = f"share up to 1, or number, or as many as this selection (default without a T: {KEEP})"
    budget.add_argument("--keep", type=amount, metavar="SHARE|COUNT|SELECTION.csv", help=keep)
    like = "keep as many slices of each volume as this selection in OUT"
    budget.add_argument("--like", type=Path, metavar="SELECTION.csv", help=like)
    scope = "select within each volume (paper) or over all at once (the drafts' HashAll)"
    add("--scope", choices=["volume", "dataset"], default="volume", help=scope)
    encoder = "for the features: encoder.pt, or imagenet: torchvision's ResNet-50 (downloaded)"
    add("--encoder", metavar="PATH|imagenet", help=encoder)
    add("--size", type=number(int, least=1), default=224, help="side of a stored slice in pixels")
    hu = number(least=-1e6, most=1e6)
    window = "clip to this HU window instead of min-max scaling each slice (ablation)"
    add("--window", type=hu, nargs=2, metavar=("CENTER", "WIDTH"), help=window)
    add("--seed", type=number(int, least=0), default=0, help="of the draws")
    add("--workers", type=number(int, least=1), help="processes (default: one a core)")
    args = parser.parse_args()
    check_flags(args, STRATEGIES[args.strategy])
    check_budget(args, STRATEGIES[args.strategy])
    return args


def strategies_table():
    """The table of strategies for --help."""
    lines = ["", "strategy    T by default", ""]
    for name, strategy in STRATEGIES.items():
        default = "-" if strategy.default is None else strategy.default
        lines.append(f"{name:<12}{default:<8}{strategy.meaning}")
    return "\n".join(lines)


def file_name(text):
    """The `type` of --name."""
    if text in STORE_FILES or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]*", text):
        raise ArgumentTypeError(f"{text} is no name of letters, digits, . + - _, or is the store's")
    return text


def amount(text):
    """The `type` of --keep: a share is a float, a number of slices an int, a selection a Path."""
    try:
        value = float(text)
    except ValueError:
        return Path(text)
    if 0 < value <= 1:
        return value
    if value >= 2 and value.is_integer():
        return int(value)
    raise ArgumentTypeError(f"{text} is not a share, up to 1, nor a whole number from 2 on")


def check_flags(args, strategy):
    """Stop with one line at flags that do not go with the strategy."""
    takes_encoder = strategy.looks_at == "features"
    if takes_encoder != (args.encoder is not None):
        verb = "needs" if takes_encoder else "takes no"
        fail(f"--strategy {args.strategy} {verb} --encoder")
    if takes_encoder and args.encoder != "imagenet" and not Path(args.encoder).is_file():
        fail(f"--encoder {args.encoder}: no such file, and not imagenet")
    if args.scope == "dataset" and strategy.looks_at != "hashes":
        fail(f"--scope dataset: {args.strategy} compares slices within a volume")
    if args.scope == "dataset" and args.like is not None:
        fail("--like counts the slices of each volume: it does not go with --scope dataset")
    if args.window is not None and args.window[1] <= 0:
        fail(f"--window: its width must be above 0 HU, not {args.window[1]:g}")


def check_budget(args, strategy):
    """Stop with one line at a budget that the strategy does not take; without any, its default."""
    able = strategy.by_threshold or strategy.by_count
    takes = {"threshold": strategy.by_threshold, "keep": able, "like": strategy.by_count}
    given = [flag for flag in takes if vars(args)[flag] is not None]
    if not given:
        args.threshold = strategy.default
        args.keep = KEEP if able and strategy.default is None else None
    elif not takes[given[0]]:
        fail(f"--strategy {args.strategy} takes no --{given[0]}")
    if args.threshold is None:
        return
    whole = strategy.thresholds
    if not whole and abs(args.threshold) > 1:
        fail(f"--threshold {args.threshold:g}: a similarity is between -1 and 1")
    if whole and args.threshold not in whole:
        limits = f"{whole[0]} to {whole[-1]}"
        fail(f"--threshold {args.threshold:g}: {args.strategy} needs a whole number, {limits}")
    if whole:
        args.threshold = int(args.threshold)


def read_given(args):
    """The Selection that --like or --keep names, or None; of --keep only its number remains."""
    path = args.like or args.keep
    if not isinstance(path, Path):
        return None
    given = read_selection(path)
    if path.resolve().parent != args.out.resolve():
        fail(f"{path}: belongs to another store than {args.out}")
    if args.keep is not None:
        args.keep = len(given.kept)
    return given


def settings_of(args, given):
    """What decides a selection, beside the code."""
    settings = vars(args) | {
        "like": args.like and args.like.stem,
        "given": given and given.digest,
        "store": store_digest(args.out),
    }
    for flag in ("data", "out", "name", "workers"):
        del settings[flag]
    if args.encoder is not None:
        from common.encoder import encoder_hash  # only here: importing torch takes seconds

        settings["encoder"] = encoder_hash(args.encoder)
    return settings


def default_name(args):
    """Such as hash-6, random-keep-0.1, random-like-hash-6, hash-6-dataset."""
    name = args.strategy
    if args.keep is not None:
        name += f"-keep-{args.keep:.12g}"
    elif args.like is not None:
        name += f"-like-{args.like.stem}"
    elif args.threshold is not None:
        name += f"-{args.threshold:g}"
    if args.seed:
        name += f"-seed-{args.seed}"
    if args.scope == "dataset" and args.strategy != "all":
        name += "-dataset"
    return name


# --- Selection.


def make_selection(args, path, settings, store, given):
    """Select, and write NAME.csv, NAME.png and, last, NAME.json."""
    made_by = files.code()
    representative, similarity, threshold = select(args, store, given)
    kept = representative == np.arange(len(representative))
    volumes = {
        volume: {"slices": len(slices), "kept": int(kept[slices].sum())}
        for volume, slices in zip(store.names, store.volumes, strict=True)
    }
    summary = {
        "settings": settings,
        "code": made_by,
        "threshold": threshold,
        "slices": len(kept),
        "kept": int(kept.sum()),
        "dose": round(reduction.expected_dose(store.hashes[kept], store.volume_index[kept]), 6),
        "volumes": volumes,
        "versions": files.versions(),
    }
    with atomic_write(path, text=True) as file:
        file.write("row,kept,representative,similarity\n")
        for row, alike in enumerate(similarity.round(6)):
            file.write(f"{row},{int(kept[row])},{representative[row]},{alike}\n")
    with atomic_write(path.with_suffix(".png")) as file:
        contact_sheet(path.stem, store, representative).save(file, "PNG", compress_level=1)
    with atomic_write(path.with_suffix(".json"), text=True) as file:
        json.dump(summary, file, indent=1)


def select(args, store, given):
    """(representative of each slice, similarity to it, threshold or None)."""
    strategy = STRATEGIES[args.strategy]
    n = len(store.slices)
    volumes = store.volumes if args.scope == "volume" else [np.arange(n)]
    features = np.empty((n, 0))
    if strategy.looks_at == "features":
        from common.encoder import embed

        features = embed(args.encoder, store.slices)
    rng = np.random.default_rng(args.seed)
    spans = [slice(volume[0], volume[-1] + 1) for volume in volumes]  # views: nothing is read yet
    groups = [Group(store.hashes[span], store.slices[span], features[span], rng) for span in spans]

    def select_at(threshold):
        jobs = [partial(strategy.by_threshold, group, threshold) for group in groups]
        return select_each(args, volumes, jobs)

    if args.threshold is not None:
        return *select_at(args.threshold), args.threshold
    if args.keep is None and given is None:
        return np.arange(n), np.zeros(n, int), None

    counts = counts_to_keep(args, volumes, given)
    if strategy.by_count:
        keep_count = partial(reduction.keep_count, strategy.by_count)
        jobs = [partial(keep_count, *job) for job in zip(groups, counts, strict=True)]
        return *select_each(args, volumes, jobs), None
    target = args.keep * n if isinstance(args.keep, float) else args.keep
    threshold, selection = reduction.search(select_at, strategy, target)
    return *selection, threshold


def counts_to_keep(args, volumes, given):
    """How many slices each volume keeps by --like or --keep: int [volumes]."""
    sizes = [len(slices) for slices in volumes]
    if args.like is not None:
        counts = np.array([np.isin(slices, given.kept).sum() for slices in volumes])
        if (counts == 0).any():
            fail(f"--like {args.like}: keeps no slice of {(counts == 0).sum()} volumes")
        return counts
    least, most = len(volumes), sum(sizes)
    if isinstance(args.keep, int) and not least <= args.keep <= most:
        fail(f"--keep {args.keep}: must be {least} (one slice a volume) to {most} (all slices)")
    return reduction.share_out(sizes, args.keep)


def select_each(args, volumes, jobs):
    """(representative, similarity) of all slices, by a job() of each volume that gives its own.

    What looks at pixels runs in worker processes.
    """
    slow = STRATEGIES[args.strategy].looks_at == "pixels"
    results = in_order(call, jobs, "volume", args.workers) if slow else map(call, jobs)
    with threadpool_limits(1):  # so that the number of cores changes no result
        representative, similarity = zip(*results, strict=True)
    in_store = [volume[index] for volume, index in zip(volumes, representative, strict=True)]
    return np.concatenate(in_store), np.concatenate(similarity)


if __name__ == "__main__":
    run_script(main)
