"""Which slices stay: the strategies and their table, budgets, and the dose that is left.

A strategy works on one group of slices in z order, a volume or the whole data set. For a new one
write a function of one of these kinds and name it in STRATEGIES below: the flags of reduce.py,
their checks, the names of selections and --help follow from that table.

    by_threshold(group, threshold) -> for each slice (index of the kept slice that stands for it,
                                      similarity to that slice), each [n]
    by_count(group, count)         -> indices of the `count` slices that stay
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from common.hashing import NEAR_DUPLICATE, hamming, near_duplicates
from common.similarity import mutual_information, ssim

BATCH = 128  # slices: the paper's, for which the dose is given


class Group(NamedTuple):
    """What a strategy may look at."""

    hashes: np.ndarray  # uint64 [n], of the full resolution
    slices: np.ndarray  # uint8 [n, size, size]
    features: np.ndarray  # float32 [n, width], by --encoder; else of width 0
    rng: np.random.Generator  # from --seed; one for all groups, but in worker processes a copy each


class Strategy(NamedTuple):
    """How slices are selected, and which flags go with it. Without a function all stay."""

    meaning: str  # for --help
    by_threshold: Callable | None = None
    by_count: Callable | None = None
    default: float | None = None  # threshold
    thresholds: range | None = None  # whole ones; None: those of a similarity, -1 to 1
    # or "pixels" (in worker processes), or "features" (of --encoder); these two by volume alone
    looks_at: str = "hashes"


# --- Strategies that have a threshold.


def greedy(items, compare, threshold):
    """The paper's rule (official code): keep the first remaining slice, drop all similar to it.

    items: one a slice, [n] or [n, width]. compare(first, others): similarity of an item to each of
    several, [others]; they are similar at `threshold` or more. Returns (representative, similarity
    to it), each [n]; a kept slice is compared with itself.
    """
    representative = np.empty(len(items), int)
    similarity = np.empty(len(items))
    remaining = np.arange(len(items))
    while len(remaining):
        compared = compare(items[0], items)
        leaves = compared >= threshold
        leaves[0] = True
        representative[remaining[leaves]] = remaining[0]
        similarity[remaining[leaves]] = compared[leaves]
        items = items[~leaves]
        remaining = remaining[~leaves]
    return representative, similarity


def by_hash(group, bits):
    """Greedy on dHash: similar when at most `bits` bits differ (paper: 6; drafts: 3, 12)."""
    representative, similarity = greedy(group.hashes, lambda a, b: -hamming(a, b), -bits)
    return representative, -similarity.astype(int)


def by_pixels(measure, group, threshold):
    """Greedy on a measure of similarity.py (these two are the paper's; thresholds our choice)."""
    compare = measure(np.asarray(group.slices))
    return greedy(np.arange(len(group.slices)), compare, threshold)


by_ssim = partial(by_pixels, ssim)
by_mi = partial(by_pixels, mutual_information)


def by_features(group, threshold):
    """Greedy on the cosine of features (our choice)."""
    unit = group.features
    for _ in range(2):  # the first division leaves rounding errors
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    return greedy(unit, lambda first, others: others @ first, threshold)


def every_nth(group, step):
    """Keep every step-th slice; the others are represented by the kept one before them."""
    index = np.arange(len(group.hashes))
    representative = index - index % step
    return representative, hamming(group.hashes, group.hashes[representative])


# --- Strategies that keep a given number.


def evenly(group, count):
    """Slices at even distances, from the first on: every-n at a budget."""
    n = len(group.hashes)
    return np.arange(count) * n // count


def at_random(group, count):
    """Slices drawn without replacement."""
    return group.rng.choice(len(group.hashes), count, replace=False)


def most_redundant(group, count):
    """The slices most similar to others: the opposite of greedy.

    First those with the most near-duplicates, of these those with the fewest bits of difference to
    all others, then in z order. Our choice, after SAS (Joshi and Mirzasoleiman, ICML 2023): for
    contrastive learning the examples most similar to others matter most.
    """
    near = near_duplicates(group.hashes, NEAR_DUPLICATE).sum(1)
    bits = [hamming(one, group.hashes).sum() for one in group.hashes]
    return np.lexsort((bits, -near))[:count]  # equal ones stay in z order


STRATEGIES = {
    # meaning; by threshold, by count; default T, all whole T, if they are; what it looks at
    "all": Strategy("every slice stays"),
    "every-n": Strategy("every T-th slice stays", every_nth, evenly, 8, range(1, 10**6)),
    "random": Strategy("slices drawn at random stay", None, at_random),
    "redundant": Strategy("the slices most like others stay", None, most_redundant),
    "hash": Strategy("no two stay within T bits of dHash", by_hash, None, 6, range(65)),
    "ssim": Strategy("no two stay with an SSIM of T or more", by_ssim, None, 0.7, None, "pixels"),
    "mi": Strategy("the same, mutual information", by_mi, None, 0.45, None, "pixels"),
    "embedding": Strategy("the same, cosine", by_features, None, 0.997, None, "features"),
}
# T of hash: the paper's best. 8, 0.7, 0.45 and 0.997 are ours: the last three come near the budget
# of hash at 6, for embedding with encoders of pretrain.py (with others use --keep).


# --- Budgets.


def keep_count(choose, group, count):
    """A function by_count -> what one by_threshold returns: to the nearest kept slice, in bits."""
    kept = np.sort(choose(group, count))
    middles = (kept[:-1] + kept[1:]) / 2
    index = np.arange(len(group.hashes))
    representative = kept[np.searchsorted(middles, index)]  # the lower one on a tie
    return representative, hamming(group.hashes, group.hashes[representative])


def share_out(sizes, budget):
    """How many slices each group keeps: in proportion to its size, at least 1.

    sizes: slices of each group, int [groups]. budget: of all slices, their number (int) or share
    (float); exceeded only where there are more groups.
    """
    share = budget if isinstance(budget, float) else budget / np.sum(sizes)
    edges = np.rint(np.cumsum(sizes) * share).astype(int)
    counts = np.maximum(1, np.diff(edges, prepend=0))
    total = max(edges[-1], len(sizes))
    while counts.sum() > total:  # groups too small for a slice of their share took one more
        counts[counts.argmax()] -= 1
    return counts


def search(select_at, strategy, target):
    """(threshold, its selection) that keep closest to `target` slices; the lower one on a tie.

    select_at(threshold) -> (representative, similarity). Whole thresholds are all tried. Those of a
    similarity are searched, from the strategy's default on, to 0.01 % of the slices or to 2e-7.
    """
    best = math.inf, math.inf, None  # slices too many or too few, threshold, selection

    def count_at(threshold):
        nonlocal best
        selection = select_at(threshold)
        kept = len(np.unique(selection[0]))
        best = min(best, (abs(kept - target), threshold, selection), key=lambda tried: tried[:2])
        return kept

    if strategy.thresholds:
        for threshold in strategy.thresholds:
            count_at(threshold)
        return best[1:]

    low, high = -1.0, 1.0
    kept_low = count_at(low)
    kept_high = len(best[2][0])  # above 1 all stay
    close = max(0.5, 1e-4 * kept_high)
    threshold = strategy.default or 0.5
    interpolate = False
    while kept_low < target and best[0] > close and high - low > 2e-7:
        kept = count_at(threshold)
        if kept < target:
            low, kept_low = threshold, kept
        else:
            high, kept_high = threshold, kept
        share = 0.5
        if interpolate:  # the logarithm of the count is nearly straight, but not everywhere
            share = math.log(target / kept_low) / math.log(kept_high / kept_low)
            share = min(max(share, 0.05), 0.95)
        threshold = round(low + (high - low) * share, 8)
        interpolate = not interpolate
    return best[1:]


def expected_dose(hashes, volumes):
    """Near-duplicates that a kept slice meets among the others of its batch, on average.

    This is what the paper's hypothesis is about; the measure is ours. hashes, volumes: of the kept
    slices, [n]; only slices of one volume count. Batches as in pretrain.py: shuffled, near-equal,
    of up to 128.
    """
    n = len(hashes)
    if n < 2:
        return 0.0
    near = sum(
        near_duplicates(hashes[volumes == volume], NEAR_DUPLICATE).sum()
        for volume in np.unique(volumes)
    )
    batch = n / math.ceil(n / BATCH)
    return float(near / n * (batch - 1) / (n - 1))
