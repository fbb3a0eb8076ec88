"""The hash of a slice, the bits that two differ in, and which slices can be within some bits."""

from functools import lru_cache

import imagehash
import numpy as np
from PIL import Image

from common.files import fail

NEAR_DUPLICATE = (
    6  # bits of dHash that two near-duplicates differ in at most: the paper's best threshold
)


def slice_hash(slice8):
    """The hash that the store keeps of a slice: uint8 [height, width] -> 64 bits as 16 hex digits.

    The one place to change for an ablation with another hash.
    """
    return dhash(slice8)


def hamming(a, b):
    """Number of bits that differ between uint64 hashes, elementwise with broadcasting."""
    return np.bitwise_count(np.bitwise_xor(a, b)).astype(np.int64)


def plain_dhash(slice8):
    """uint8 [height, width] -> 64-bit difference hash as 16 hex digits (paper, official code)."""
    return str(imagehash.dhash(Image.fromarray(slice8)))


def check_dhash(slice8):
    """Stop if the fast dHash is not imagehash's, which other versions of Pillow would cause."""
    if dhash(slice8) != plain_dhash(slice8):
        fail(
            "dHash differs from imagehash's: install the versions in requirements.txt, Pillow's "
            "above all; for another hash on purpose change slice_hash in common/hashing.py"
        )


# --- dHash, fast: plain_dhash in a quarter of the time. imagehash shrinks the image to 9 x 8 by
# --- Pillow's Lanczos filter; here the filter's own fixed-point sums are matrix products. Tests,
# --- and one slice in 32 whenever a store is made, hold it against imagehash.


def dhash(slice8):
    """plain_dhash, bit for bit: uint8 [height, width] -> 16 hex digits."""
    if min(slice8.shape) < 16:  # Pillow may shrink the height first there
        return plain_dhash(slice8)
    narrow = lanczos(slice8.T, 9).T
    small = lanczos(narrow, 8)
    brighter_to_the_right = small[:, 1:] > small[:, :-1]
    return np.packbits(brighter_to_the_right).tobytes().hex()


def lanczos(image, rows):
    """Shrink to `rows` rows by Pillow's Lanczos filter, rounded and clipped to 0..255.

    image: values of 8 bits, of any number type, [n, width] -> float64 [rows, width].
    """
    sums = weighted_sums(image.T, len(image), rows).T
    return np.clip(np.floor((sums + 2**21) / 2**22), 0, 255)


def weighted_sums(image, source, target):
    """image @ lanczos_weights(source, target).T, without rounding: float64 [n, target].

    float32 is faster and adds whole numbers exactly up to 2**24, so each weight is cut into a
    multiple of 256 and a rest. Slices too large for that need float64, which is exact to 2**53.
    """
    pieces, exact = weights_in_pieces(source, target)
    if not exact:
        return image.astype(np.float64) @ lanczos_weights(source, target).T
    coarse, rest = np.split(image.astype(np.float32) @ pieces, 2, axis=1)
    return 256 * coarse.astype(np.float64) + rest


@lru_cache
def weights_in_pieces(source, target):
    """Each weight as 256 times a and a rest: float32 [source, 2 * target]; whether exact."""
    weights = lanczos_weights(source, target).T
    coarse = np.rint(weights / 256)
    pieces = np.concatenate([coarse, weights - 256 * coarse], axis=1)
    exact = 255 * np.abs(pieces).sum(0).max() < 2**24
    return pieces.astype(np.float32), exact


@lru_cache
def lanczos_weights(source, target):
    """Pillow's weights in its unit of 2**-22 (precompute_coeffs in its Resample.c).

    Returns float64 whole numbers, [target, source].
    """
    scale = source / target
    stretch = max(scale, 1.0)
    centers = (np.arange(target)[:, None] + 0.5) * scale
    pixels = np.arange(source)
    first = np.trunc(centers - 3 * stretch + 0.5)
    last = np.trunc(centers + 3 * stretch + 0.5)
    x = (pixels - centers + 0.5) / stretch
    inside = (pixels >= first) & (pixels < last) & (x >= -3) & (x < 3)
    weights = np.where(inside, np.sinc(x) * np.sinc(x / 3), 0)
    weights /= weights.sum(1, keepdims=True)
    return np.trunc(weights * 2**22 + np.copysign(0.5, weights))


# --- The hash index: which slices of a large set can be within some bits of one, without comparing
# --- all. Of bits + 1 pieces of the hash, two hashes within that many bits share at least one
# --- (pigeonhole; multi-index hashing, Norouzi et al. 2012).


def hash_index(hashes, bits):
    """For uint64 hashes [n]: candidates(i) gives every row within `bits` bits of row i, itself too.

    Some rows that it gives differ in more bits, and a row may come twice: compare them by hamming.
    """
    pieces = [piece_index(hashes, range(start, 64, bits + 1)) for start in range(bits + 1)]

    def candidates(i):
        return np.concatenate([rows[start[i] : end[i]] for rows, start, end in pieces])

    return candidates


def piece_index(hashes, bits):
    """(rows, start, end), each int32 [n]: rows[start[i] : end[i]] equal row i in these bits."""
    mask = np.uint64(sum(1 << bit for bit in bits))
    piece = hashes & mask
    rows = np.argsort(piece, kind="stable")
    ascending = piece[rows]
    start = np.searchsorted(ascending, piece, "left")
    end = np.searchsorted(ascending, piece, "right")
    return rows.astype(np.int32), start.astype(np.int32), end.astype(np.int32)
