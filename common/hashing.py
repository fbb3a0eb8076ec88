"""The hash of a slice, the bits in which two differ, and the near-duplicates of a set."""

import imagehash
import numpy as np
from PIL import Image

# Two thresholds on the bits in which two dHashes differ, since the questions differ: is a slice
# redundant for pre-training (the paper), or is it the same image once more (tasks.py)?
NEAR_DUPLICATE = 6  # at most: dose, masked negatives; the paper's best threshold
SAME_IMAGE = 4  # at most: the same image, brighter or resized, in a labelled set; ours, by looking
BLOCK = 512  # hashes compared with all others at a time, so that memory stays small


def slice_hash(slice8):
    """The hash of a slice: uint8 [height, width] -> 64 bits as 16 hex digits.

    imagehash's difference hash (paper, official code). The one place for an ablation with
    another hash, which then needs thresholds of its own.
    """
    return str(imagehash.dhash(Image.fromarray(slice8)))


def hamming(a, b):
    """Number of bits that differ between uint64 hashes, int, elementwise with broadcasting."""
    return np.bitwise_count(np.bitwise_xor(a, b)).astype(np.int64)


def near_duplicates(hashes, bits, others=None):
    """Which hashes differ in at most `bits` bits: uint64 [n] and others [m] -> bool [n, m].

    Without others among themselves: [n, n], where no hash is a near-duplicate of itself.
    """
    columns = hashes if others is None else others
    near = np.empty((len(hashes), len(columns)), bool)
    for start in range(0, len(hashes), BLOCK):
        block = slice(start, start + BLOCK)
        near[block] = hamming(hashes[block, None], columns) <= bits
    if others is None:
        np.fill_diagonal(near, False)
    return near
