"""Which slices stay: descriptors, similarity, the greedy rule and the baselines at a budget.

Everything here works on one group of slices in z order (a volume, or the whole data set) and returns, for each
slice, the index of the kept slice that stands for it (its representative); a kept slice stands for itself.
Knows nothing of files, DICOM or training.
"""

import imagehash
import numpy as np
from PIL import Image


def dhash(slice8):
    """uint8 [height, width] -> 64-bit difference hash as 16 hex digits (paper; official code: imagehash.dhash)."""
    return str(imagehash.dhash(Image.fromarray(slice8)))


def hamming(a, b):
    """Number of bits that differ between uint64 hashes, elementwise with broadcasting."""
    return np.bitwise_count(np.bitwise_xor(a, b)).astype(np.int64)


def greedy(n, similar_to):
    """The paper's rule (official code): keep the first remaining slice, drop every remaining one similar to it, repeat.

    n: number of slices. similar_to(i, others): bool mask over the index array `others`.
    Returns representatives, int [n].
    """
    representative = np.arange(n)
    remaining = np.arange(n)
    while len(remaining):
        first, others = remaining[0], remaining[1:]
        similar = similar_to(first, others)
        representative[others[similar]] = first
        remaining = others[~similar]
    return representative


def select_hash(hashes, threshold):
    """Greedy on dHash: uint64 [n], similar when at most `threshold` bits differ (paper: 6; drafts: 3 and 12 too)."""
    return greedy(len(hashes), lambda first, others: hamming(hashes[first], hashes[others]) <= threshold)


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
    return np.where(np.abs(index - kept[before]) <= np.abs(kept[after] - index), kept[before], kept[after])


def share_out(sizes, keep):
    """How many slices each group keeps at a budget: in proportion, at least 1, in all as near keep * n as rounding lets.

    sizes: slices a group, int [groups]. keep: share in (0, 1].
    """
    edges = np.rint(np.cumsum(sizes) * keep).astype(int)
    return np.maximum(1, np.diff(edges, prepend=0))


def threshold_for_budget(sizes_kept, total, keep):
    """The threshold, of a dict threshold -> slices kept, whose kept share comes closest to `keep`; the lower on a tie."""
    return min(sizes_kept, key=lambda t: (abs(sizes_kept[t] / total - keep), t))
