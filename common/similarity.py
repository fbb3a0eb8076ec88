"""How alike two slices are: SSIM, mutual information, cosine of embeddings. 1 for equal slices, less for others.

Each function takes the slices of one volume, works out what concerns a single slice, and returns
measure(first, others): the similarity of slice `first` to every slice of the index array `others`.
"""

import numpy as np

SIGMA, RADIUS = 1.5, 5  # pixels: an 11 x 11 Gaussian window (Wang et al. 2004)
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # K1, K2 and the range of 8 bits (Wang et al. 2004)
ROWS = 24  # rows filtered by one matrix product: the window's matrix is mostly zeros, so small pieces waste less
BINS = 32  # of the joint histogram, on each axis (our choice)


def ssim(slices):
    """Mean structural similarity over all windows inside the slice (Wang et al. 2004), with population covariance.

    slices: uint8 [n, size, size], size at least 11. As scikit-image's structural_similarity with gaussian_weights,
    sigma 1.5, use_sample_covariance False and data_range 255 gives it, to 1e-5.
    """
    n, size, _ = slices.shape
    inside = size - 2 * RADIUS
    shifts = (32 * np.rint(slices.mean((1, 2)) / 32)).astype(
        np.int16
    )  # float32 covariances of values about 0 lose fewer
    # digits; in coarse steps, so that air, equal in neighbours, stays equal and its rounding errors cancel
    centered = slices - shifts[:, None, None]
    means, variances = np.empty((2, n, inside, inside), np.float32)  # of the centered slices
    product, rows = np.empty((size, size), np.float32), np.empty((inside, size), np.float32)
    cov, m, mean_i = np.empty(
        (3, inside, inside), np.float32
    )  # work space, made once: it stays in the processor's cache

    def covariance(x, mean, i):
        """cov = E[x y] - E[x] E[y] in every window, y being centered slice i."""
        filtered(np.multiply(x, centered[i], out=product), rows, cov)
        np.subtract(cov, np.multiply(mean, means[i], out=m), out=cov)

    for i in range(n):
        x = centered[i].astype(np.float32)
        filtered(x, rows, means[i])
        covariance(x, means[i], i)
        variances[i] = cov

    def measure(first, others):
        x, mean = centered[first].astype(np.float32), means[first] + shifts[first]
        square, variance = mean * mean + np.float32(C1), variances[first] + np.float32(C2)

        def compare(i):
            """Mean of (2 m + C1) (2 cov + C2) / ((mean^2 + mean_i^2 + C1) (variance + variance_i + C2)), m = mean mean_i."""
            covariance(x, means[first], i)
            np.add(cov, C2 / 2, out=cov)
            np.add(means[i], shifts[i], out=mean_i)
            np.multiply(mean, mean_i, out=m)
            np.add(m, C1 / 2, out=m)
            np.multiply(cov, m, out=cov)
            np.multiply(mean_i, mean_i, out=m)
            np.add(m, square, out=m)
            np.divide(cov, m, out=cov)
            np.add(variance, variances[i], out=m)
            np.divide(cov, m, out=cov)
            return 4 * float(cov.mean())

        return np.array([compare(i) for i in others])

    return measure


def filtered(image, rows, out):
    """Gaussian-weighted means of all windows inside the image, [size, size] -> out, rows and columns exchanged."""
    filter_rows(image, rows)
    filter_rows(rows.T, out)


def filter_rows(image, out):
    for top in range(0, len(out), ROWS):
        piece = out[top : top + ROWS]
        np.matmul(
            WINDOW[: len(piece), : len(piece) + 2 * RADIUS],
            image[top : top + len(piece) + 2 * RADIUS],
            out=piece,
        )


def window_matrix():
    """[ROWS, ROWS + 10]: each row holds the 1-D Gaussian window, one place further than the row before."""
    weights = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
    matrix = np.zeros((ROWS, ROWS + 2 * RADIUS), np.float32)
    for row in range(ROWS):
        matrix[row, row : row + 2 * RADIUS + 1] = weights / weights.sum()
    return matrix


WINDOW = window_matrix()


def mutual_information(slices):
    """Normalised mutual information, 2 I(x, y) / (H(x) + H(y)), of the joint histogram of 32 x 32 grey values.

    slices: uint8 [n, size, size]. As scikit-learn's normalized_mutual_info_score of the binned pixels gives it: two
    constant slices count as equal (1), a constant and another as unrelated (0).
    """
    binned = (slices // (256 // BINS)).reshape(len(slices), -1)
    pixels = binned.shape[1]
    count = np.arange(pixels + 1.0)
    plogp = (
        -count / pixels * np.log(np.maximum(count, 1) / pixels)
    )  # by count, so that no logarithm is taken twice
    entropies = np.array([plogp[np.bincount(x, minlength=BINS)].sum() for x in binned])

    def measure(first, others):
        x = binned[first].astype(np.uint16) * BINS
        joint = np.array(
            [plogp[np.bincount(x + binned[other], minlength=BINS**2)].sum() for other in others]
        )
        both = entropies[first] + entropies[others]
        shared = np.maximum(both - joint, 0)
        return np.divide(2 * shared, both, out=np.ones_like(both), where=both > 0)

    return measure


def cosine(features):
    """Cosine of the angle between embeddings: float32 [n, d], of any length but 0."""
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    return lambda first, others: features[others] @ features[first]


MEASURES = {"ssim": ssim, "mi": mutual_information}  # of the pixels, by the name of the strategy
