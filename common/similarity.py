"""How alike two slices are: SSIM, mutual information, cosine of embeddings. 1 for equal slices.

Each measure takes the slices (or features) of one volume, works out what concerns a single slice,
and returns compare(first, others): the similarity of slice `first` to each slice of the index
array `others`. For another similarity of pixels, write such a function, name it in MEASURES below,
and run `reduce.py --strategy NAME --keep 0.1`.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

SIGMA, RADIUS = 1.5, 5  # pixels: an 11 x 11 Gaussian window (Wang et al. 2004)
GAUSSIAN = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
GAUSSIAN /= GAUSSIAN.sum()
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # K1, K2 and the range of 8 bits (Wang et al. 2004)
BINS = 32  # of the joint histogram, on each axis (our choice)


def plain_ssim(x, y):
    """Mean structural similarity of two slices over all windows inside: the definition, slow.

    Wang et al. 2004, equations 13 to 16; as scikit-image's structural_similarity with
    gaussian_weights, sigma 1.5, use_sample_covariance False and data_range 255.
    x, y: uint8 [size, size], size at least 11.
    """
    weights = np.outer(GAUSSIAN, GAUSSIAN)

    def window_means(image):
        return (weights * sliding_window_view(image, weights.shape)).sum((2, 3))

    x = x.astype(float)
    y = y.astype(float)
    mean_x = window_means(x)
    mean_y = window_means(y)
    variance_x = window_means(x * x) - mean_x**2
    variance_y = window_means(y * y) - mean_y**2
    covariance = window_means(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return (luminance * structure).mean()


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


def cosine(features):
    """Cosine of embeddings: float32 [n, d], of any length but 0."""
    unit = unit_length(features)

    def compare(first, others):
        return unit[others] @ unit[first]

    return compare


def unit_length(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


# --- SSIM, fast: plain_ssim to 1e-5, some hundred times as quick. A window's weighted mean is
# --- separable, so it is a product with a band matrix on each axis; what concerns one slice alone
# --- (means, variances) is worked out once a volume.

ROWS = 24  # worked out by one product: the band is mostly zeros, so small pieces waste less
# [ROWS, ROWS + 10]: each row holds the 1-D window, one place further than the row before
BAND = np.stack([np.roll(np.pad(GAUSSIAN, (0, ROWS - 1)), row) for row in range(ROWS)])
BAND = BAND.astype(np.float32)


def ssim(slices):
    """plain_ssim for the slices of a volume: uint8 [n, size, size], size at least 11."""
    n, size, _ = slices.shape
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
    for top in range(0, len(means), ROWS):
        piece = means[top : top + ROWS]
        reach = len(piece) + 2 * RADIUS
        np.matmul(BAND[: len(piece), :reach], image[top : top + reach], out=piece)
    return means


MEASURES = {"ssim": ssim, "mi": mutual_information}  # of pixels, by the name of the strategy
