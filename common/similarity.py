"""How alike two slices are: SSIM, mutual information. 1 for equal slices.

A measure of pixels takes the slices of one volume, uint8 [n, size, size], works out what concerns a
single slice, and returns compare(first, others): the similarity of slice `first` to each slice of
the index array `others`. For another one write such a function and name it in the table STRATEGIES
of reduction.py.
"""

import numpy as np

from common.files import fail

SIGMA, RADIUS = 1.5, 5  # pixels: an 11 x 11 Gaussian window (Wang et al. 2004)
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # K1, K2 and the range of 8 bits (Wang et al. 2004)
BINS = 32  # of the joint histogram, on each axis (our choice)


def mutual_information(slices):
    """Normalised mutual information, 2 I(x, y) / (H(x) + H(y)), of binned grey values.

    slices: uint8 [n, size, size]. As scikit-learn's normalized_mutual_info_score: two constant
    slices count as equal (1), a constant and another as unrelated (0). Our choice, as are the 32
    bins: the paper's are not published.
    """
    binned = (slices // (256 // BINS)).reshape(len(slices), -1)
    pixels = binned.shape[1]
    # -p log p of every count that a bin can have, so that no logarithm is taken twice
    counts = np.arange(pixels + 1.0)
    plogp = -counts / pixels * np.log(np.maximum(counts, 1) / pixels)

    def entropy(values, bins):
        return plogp[np.bincount(values, minlength=bins)].sum()

    entropies = np.array([entropy(x, BINS) for x in binned])

    def compare(first, others):
        x = binned[first].astype(np.uint16) * BINS
        joint = np.array([entropy(x + binned[other], BINS**2) for other in others])
        total = entropies[first] + entropies[others]
        shared = np.maximum(total - joint, 0)
        return np.divide(2 * shared, total, out=np.ones_like(total), where=total > 0)

    return compare


# --- SSIM. Means over a Gaussian window are separable: a product with a band matrix on each axis.
# --- This and what is worked out once a slice make it some 20 times as fast as scikit-image.

GAUSSIAN = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
GAUSSIAN /= GAUSSIAN.sum()
HEIGHT = 24  # of a product's result: the band is mostly zeros, so small pieces waste less
# [HEIGHT, HEIGHT + 10]: each row holds the window, one place further than the row before
BAND = np.stack([np.roll(np.pad(GAUSSIAN, (0, HEIGHT - 1)), row) for row in range(HEIGHT)])
BAND = BAND.astype(np.float32)


def ssim(slices):
    """Mean structural similarity over all windows inside the slices; see above for a measure.

    Wang et al. 2004, equations 13 to 16, to 1e-5; as scikit-image's structural_similarity with
    gaussian_weights, sigma 1.5, use_sample_covariance False and data_range 255. size: at least 11.
    """
    n, size, _ = slices.shape
    if size < len(GAUSSIAN):
        fail(f"ssim needs slices of {len(GAUSSIAN)} pixels or more, not --size {size}")
    inside = size - 2 * RADIUS
    # Covariances in float32 lose fewer digits for values around 0. In coarse steps, so that air,
    # which is equal in neighbours, stays equal, and its rounding errors cancel.
    shifts = (32 * np.rint(slices.mean((1, 2)) / 32)).astype(np.int16)
    centered = slices - shifts[:, None, None]
    means = np.empty((n, inside, inside), np.float32)  # of the centered slices
    variances = np.empty_like(means)
    for i in range(n):
        x = centered[i].astype(np.float32)
        means[i] = window_means(x)
        variances[i] = window_means(x * centered[i]) - means[i] * means[i]

    def compare(first, others):
        x = centered[first].astype(np.float32)
        mean_x = means[first] + shifts[first]
        square_x = mean_x * mean_x + np.float32(C1)
        variance_x = variances[first] + np.float32(C2)

        def compare_with(i):
            covariance = window_means(x * centered[i]) - means[first] * means[i]
            mean_y = means[i] + shifts[i]
            similarity = (covariance + C2 / 2) * (mean_x * mean_y + C1 / 2)
            similarity /= mean_y * mean_y + square_x
            similarity /= variance_x + variances[i]
            return 4 * float(similarity.mean())

        return np.array([compare_with(i) for i in others])

    return compare


def window_means(image):
    """Gaussian-weighted means of all windows inside an image, rows and columns exchanged.

    float32 [size, size] -> [size - 10, size - 10].
    """
    return row_means(row_means(image).T)


def row_means(image):
    """Gaussian-weighted means over 11 rows each: float32 [n, m] -> [n - 10, m]."""
    means = np.empty((len(image) - 2 * RADIUS, image.shape[1]), np.float32)
    for top in range(0, len(means), HEIGHT):
        piece = means[top : top + HEIGHT]
        reach = len(piece) + 2 * RADIUS
        np.matmul(BAND[: len(piece), :reach], image[top : top + reach], out=piece)
    return means
