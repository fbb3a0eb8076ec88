"""Which slices stay: dHash, the greedy rule, the baselines, and thresholds that meet a budget.

Everything here works on one group of slices in z order (a volume, or the whole data set) and finds, for each slice,
the index of the kept slice that stands for it (its representative); a kept slice stands for itself.
Knows nothing of files, DICOM or training.
"""

import numpy as np

from common.hashing import hamming


def greedy(n, measure, similar):
    """The paper's rule (official code): keep the first remaining slice, drop every remaining one similar to it, repeat.

    n: number of slices. measure(first, others): similarity of slice `first` to each of the index array `others`.
    similar(similarities): bool mask. Returns (representative, similarity to it), [n]; a kept slice's own is measured too.
    """
    representative, similarity = np.arange(n), np.zeros(n)
    remaining = np.arange(n)
    while len(remaining):
        first = remaining[0]
        measured = measure(first, remaining)
        gone = similar(measured)
        gone[0] = True
        representative[remaining[gone]] = first
        similarity[remaining[gone]] = measured[gone]
        remaining = remaining[~gone]
    return representative, similarity


def select_hash(hashes, threshold):
    """Greedy on dHash: uint64 [n], similar when at most `threshold` bits differ (paper: 6; drafts: 3 and 12 too)."""
    if len(hashes) > 4096 and threshold <= 10:
        return select_hash_indexed(hashes, threshold)
    measure = lambda first, others: hamming(hashes[first], hashes[others])  # noqa: E731
    return greedy(len(hashes), measure, lambda bits: bits <= threshold)[0]


def select_hash_indexed(hashes, threshold):
    """select_hash for a whole data set: of t + 1 pieces of the hash, two hashes within t bits share at least one
    (pigeonhole; multi-index hashing, Norouzi et al. 2012), so only slices that share a piece are compared."""
    n = len(hashes)
    pieces = [
        piece_index(hashes, range(start, 64, threshold + 1)) for start in range(threshold + 1)
    ]
    representative, remaining = np.arange(n), np.ones(n, bool)
    for first in range(n):
        if remaining[first]:
            near = np.concatenate(
                [
                    order[edges[code[first]] : edges[code[first] + 1]]
                    for code, order, edges in pieces
                ]
            )
            near = near[remaining[near]]
            near = near[hamming(hashes[first], hashes[near]) <= threshold]
            representative[near] = first
            remaining[near] = False
    return representative


def piece_index(hashes, bits):
    """Slices by the value of some bits of their hash: (code [n], order, edges); order[edges[c] : edges[c + 1]] share c."""
    mask = np.uint64(sum(1 << bit for bit in bits))
    _, code = np.unique(hashes & mask, return_inverse=True)
    order = np.argsort(code, kind="stable").astype(np.int32)
    return code.astype(np.int32), order, np.concatenate([[0], np.cumsum(np.bincount(code))])


def select_every(n, step):
    """Keep every step-th of n slices, from the first on; the dropped ones stand with the kept one before them."""
    index = np.arange(n)
    return index - index % step


def select_evenly(n, count):
    """Keep `count` of n slices at even distances, from the first on: every-n at a budget."""
    return nearest_kept(n, np.arange(count) * n // count)


def select_random(n, count, rng):
    """Keep `count` of n slices, drawn without replacement from the numpy Generator."""
    return nearest_kept(n, np.sort(rng.choice(n, count, replace=False)))


def nearest_kept(n, kept):
    """Representatives of n slices when the sorted indices `kept` stay: the nearest along z, the lower one on a tie."""
    index = np.arange(n)
    after = np.clip(np.searchsorted(kept, index), 0, len(kept) - 1)
    before = np.clip(after - 1, 0, len(kept) - 1)
    return np.where(
        np.abs(index - kept[before]) <= np.abs(kept[after] - index), kept[before], kept[after]
    )


def share_out(sizes, keep):
    """How many slices each group keeps at a budget: in proportion, at least 1, in all as near keep * n as rounding lets.

    sizes: slices a group, int [groups]. keep: share in (0, 1].
    """
    edges = np.rint(np.cumsum(sizes) * keep).astype(int)
    return np.maximum(1, np.diff(edges, prepend=0))


def closest(kept, target):
    """The threshold, of a dict threshold -> slices kept, that comes closest to `target` slices; the lower on a tie."""
    return min(kept, key=lambda threshold: (abs(kept[threshold] - target), threshold))


def search_threshold(count, groups, total, target, guess):
    """The threshold of a similarity (-1 to 1) that keeps closest to `target` slices: to 0.01 % of all, or to 2e-7 of it.

    count(threshold): slices kept, growing with it. groups, total: what -1 and anything above 1 keep. guess: where to
    start. Bisects, in turns with interpolation of the logarithm of the count, which is nearly straight.
    """
    kept, low, high = {-1.0: groups}, -1.0, 1.0
    while target > groups:
        kept[guess] = count(guess)
        low, high = (guess, high) if kept[guess] < target else (low, guess)
        if (
            abs(kept[closest(kept, target)] - target) <= max(0.5, 1e-4 * total)
            or high - low <= 2e-7
        ):
            break
        way = 0.5
        if len(kept) % 2:
            way = np.log(target / kept[low]) / np.log(kept.get(high, total) / kept[low])
        guess = round(low + (high - low) * float(np.clip(way, 0.05, 0.95)), 8)
    return closest(kept, target)
