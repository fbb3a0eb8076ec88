"""The hash of a slice: difference hash, exact but faster than imagehash, and how many bits two differ in."""

from functools import lru_cache

import imagehash
import numpy as np
from PIL import Image

from common.files import fail


def slice_hash(slice8):
    """The hash that the store keeps of a slice: uint8 [height, width] -> 64 bits as 16 hex digits.

    The one place to change for an ablation with another hash.
    """
    return dhash(slice8)


def dhash(slice8):
    """uint8 [height, width] -> 64-bit difference hash as 16 hex digits: str(imagehash.dhash(image)) (paper, official code).

    imagehash shrinks the image to 9 x 8 by Pillow's Lanczos filter; here the filter's own fixed-point sums are matrix
    products, in a quarter of the time. Tests, and one slice in 16 whenever a store is made, hold it against imagehash.
    """
    if min(slice8.shape) < 16:  # Pillow may shrink the height first there
        return str(imagehash.dhash(Image.fromarray(slice8)))
    small = lanczos(lanczos(slice8.T, 9).T, 8)
    return np.packbits(small[:, 1:] > small[:, :-1]).tobytes().hex()


def check_dhash(slice8):
    """Stop if the fast dHash is not imagehash's, which other versions of Pillow would cause."""
    if dhash(slice8) != str(imagehash.dhash(Image.fromarray(slice8))):
        fail(
            "dHash differs from imagehash's: install the versions in requirements.txt, Pillow's above all"
        )


def lanczos(image, rows):
    """uint8 values [n, width], of any number type -> [rows, width] by Pillow's Lanczos filter, rounded and clipped."""
    sums = lanczos_weights(len(image), rows) @ image.astype(
        np.float64
    )  # of whole numbers below 2**53: exact
    return np.clip(np.floor((sums + 2**21) / 2**22), 0, 255)


@lru_cache
def lanczos_weights(source, target):
    """[target, source]: Pillow's Lanczos weights in its unit of 2**-22 (precompute_coeffs in its Resample.c)."""
    scale = source / target
    stretch = max(scale, 1.0)
    centers = (np.arange(target)[:, None] + 0.5) * scale
    pixels = np.arange(source)
    inside = (pixels >= np.trunc(centers - 3 * stretch + 0.5)) & (
        pixels < np.trunc(centers + 3 * stretch + 0.5)
    )
    x = (pixels - centers + 0.5) / stretch
    weights = np.where(inside & (x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0)
    weights /= weights.sum(1, keepdims=True)
    return np.trunc(weights * 2**22 + np.copysign(0.5, weights))


def hamming(a, b):
    """Number of bits that differ between uint64 hashes, elementwise with broadcasting."""
    return np.bitwise_count(np.bitwise_xor(a, b)).astype(np.int64)
