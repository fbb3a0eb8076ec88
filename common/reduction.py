"""Which slices stay: the greedy rule, the baselines, budgets, and the dose that is left.

Everything here works on one group of slices in z order (a volume, or the whole data set) and finds,
for each slice, the index of the kept slice that stands for it (its representative); a kept slice
stands for itself. Knows nothing of files, DICOM or training.
"""

import math
from itertools import cycle

import numpy as np

from common.hashing import NEAR_DUPLICATE, hamming, hash_index
from common.similarity import cosine, unit_length

BATCH = 128  # slices: the paper's, for which the dose is given
INDEXED = 4096  # slices from which on the hash index is faster than comparing all
BLOCK = 256  # embeddings compared with all others by one matrix product


def greedy(n, compare, similar):
    """The paper's rule (official code): keep the first remaining slice, drop every remaining one
    that is similar to it, repeat.

    n: number of slices. compare(first, others): similarity of slice `first` to each of the index
    array `others`. similar(similarities): bool mask. Returns (representative, similarity to it),
    each [n]; a kept slice is compared with itself.
    """
    representative = np.arange(n)
    similarity = np.zeros(n)
    remaining = np.arange(n)
    while len(remaining):
        first = remaining[0]
        compared = compare(first, remaining)
        represented = similar(compared)
        represented[0] = True
        representative[remaining[represented]] = first
        similarity[remaining[represented]] = compared[represented]
        remaining = remaining[~represented]
    return representative, similarity


def select_hash(hashes, threshold):
    """Greedy on dHash: similar when at most `threshold` bits differ (paper: 6; drafts: 3 and 12).

    hashes: uint64 [n]. Returns the representatives.
    """
    if len(hashes) > INDEXED and threshold <= 10:
        return greedy_indexed(hashes, threshold)

    def compare(first, others):
        return hamming(hashes[first], hashes[others])

    return greedy(len(hashes), compare, lambda bits: bits <= threshold)[0]


def select_similar(n, compare, threshold):
    """Greedy on a similarity: similar at `threshold` or more (our choice). As greedy otherwise."""
    return greedy(n, compare, lambda similarities: similarities >= threshold)


# --- Greedy, fast: the same selections where comparing each kept slice with all would take hours.


def greedy_indexed(hashes, threshold):
    """select_hash for a whole data set: only slices that the hash index names are compared."""
    candidates = hash_index(hashes, threshold)
    representative = np.arange(len(hashes))
    remaining = np.ones(len(hashes), bool)
    for first in range(len(hashes)):
        if not remaining[first]:
            continue
        near = candidates(first)
        near = near[remaining[near]]
        near = near[hamming(hashes[first], hashes[near]) <= threshold]
        representative[near] = first
        remaining[near] = False
    return representative


def select_embeddings(features, threshold):
    """Greedy on the cosine of embeddings, float32 [n, d], block after block.

    A block's kept slices are compared with everything after it by matrix products, which read the
    embeddings once a block, not once a kept slice. The same as select_similar on all of them, but
    for a cosine within rounding (1e-6) of the threshold.
    """
    unit = unit_length(features)
    representative = np.arange(len(unit))
    similarity = np.zeros(len(unit))
    remaining = np.arange(len(unit))
    while len(remaining):
        block = remaining[:BLOCK]
        found, compared = select_similar(len(block), cosine(unit[block]), threshold)
        representative[block] = block[found]
        similarity[block] = compared
        kept = block[np.unique(found)]

        later = []
        for start in range(BLOCK, len(remaining), 16 * BLOCK):
            rows = remaining[start : start + 16 * BLOCK]
            compared = unit[rows] @ unit[kept].T
            first = (compared >= threshold).argmax(1)  # the kept slice that comes first
            compared = compared[np.arange(len(rows)), first]
            represented = compared >= threshold
            representative[rows[represented]] = kept[first[represented]]
            similarity[rows[represented]] = compared[represented]
            later.append(rows[~represented])
        remaining = np.concatenate([remaining[:0], *later])
    return representative, similarity


# --- The baselines.


def select_every(n, step):
    """Keep every step-th of n slices; the others are represented by the kept one before them."""
    index = np.arange(n)
    return index - index % step


def select_evenly(n, count):
    """Keep `count` of n slices at even distances, from the first on: every-n at a budget."""
    return nearest_kept(n, np.arange(count) * n // count)


def select_random(n, count, rng):
    """Keep `count` of n slices, drawn without replacement from the numpy Generator."""
    return nearest_kept(n, np.sort(rng.choice(n, count, replace=False)))


def select_redundant(hashes, count):
    """Keep the `count` slices most similar to the others of their volume: the opposite of greedy.

    First those with the most near-duplicates; of equally many, those with the fewest bits of
    difference to all others; then in z order. hashes: uint64 [n], of one volume. Our choice, after
    SAS (Joshi and Mirzasoleiman, ICML 2023): for contrastive learning the examples most similar to
    others matter most.
    """
    near = count_near_duplicates(hashes)
    bits = np.array([hamming(one, hashes).sum() for one in hashes])
    most_similar_first = np.lexsort((bits, -near))  # equal ones stay in z order
    return nearest_kept(len(hashes), np.sort(most_similar_first[:count]))


def nearest_kept(n, kept):
    """The nearest of the sorted indices `kept` to each of n slices; the lower one on a tie."""
    middles = (kept[:-1] + kept[1:]) / 2
    return kept[np.searchsorted(middles, np.arange(n))]


# --- Budgets.


def share_out(sizes, share):
    """How many slices each group keeps at a budget: in proportion to its size, at least 1.

    sizes: slices of each group, int [groups]. share: of all slices, in (0, 1]. In all they are
    share * sizes.sum(), rounded, or one a group where that is more.
    """
    edges = np.rint(np.cumsum(sizes) * share).astype(int)
    counts = np.maximum(1, np.diff(edges, prepend=0))
    budget = max(edges[-1], len(sizes))
    while counts.sum() > budget:  # groups too small for a slice of their share took one more
        counts[counts.argmax()] -= 1
    return counts


def closest(kept, target):
    """Of {threshold: slices kept} the threshold closest to `target` slices; on a tie the lower."""
    return min(kept, key=lambda threshold: (abs(kept[threshold] - target), threshold))


def search_threshold(count, groups, total, target, guess):
    """The threshold of a similarity (-1 to 1) that keeps closest to `target` slices: to 0.01 % of
    all, or to 2e-7 of the threshold.

    count(threshold): slices kept, growing with it. groups, total: slices kept at -1 (one a group)
    and above 1 (all). guess: where to start. Bisection and interpolation take turns: the logarithm of the count
    is nearly straight, but where it is not, interpolation alone would crawl.
    """
    if target <= groups:
        return -1.0
    low, high = -1.0, 1.0
    kept = {low: groups}
    for interpolate in cycle([False, True]):
        kept[guess] = count(guess)
        if kept[guess] < target:
            low = guess
        else:
            high = guess
        missed = abs(kept[closest(kept, target)] - target)
        if missed <= max(0.5, 1e-4 * total) or high - low <= 2e-7:
            return closest(kept, target)
        step = 0.5
        if interpolate:
            kept_high = kept.get(high, total)
            step = float(np.log(target / kept[low]) / np.log(kept_high / kept[low]))
        guess = round(low + (high - low) * min(max(step, 0.05), 0.95), 8)


# --- The dose: what the paper's hypothesis is about.


def count_near_duplicates(hashes):
    """How many of the other slices of a volume differ from each in at most 6 bits of dHash.

    hashes: uint64 [n] -> int [n].
    """
    within = [np.count_nonzero(hamming(one, hashes) <= NEAR_DUPLICATE) for one in hashes]
    return np.array(within) - 1  # without itself


def expected_dose(hashes, volumes):
    """Near-duplicates that a kept slice meets among the others of its batch, on average.

    hashes, volumes: dHash and number of the volume of the kept slices, [n]; only slices of the same
    volume count. Batches as in pretrain.py: shuffled, near-equal, of up to 128. Our measure.
    """
    n = len(hashes)
    if n < 2:
        return 0.0
    near = sum(
        count_near_duplicates(hashes[volumes == volume]).sum() for volume in np.unique(volumes)
    )
    batch = n / math.ceil(n / BATCH)
    return float(near / n * (batch - 1) / (n - 1))
