"""The similarities of pixels against slow, obvious ones."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.metrics import normalized_mutual_info_score

from common import similarity


def slices_like_ct(size, n=8):
    """Smooth blobs that drift on noisy air, then constant, noisy, bright, two-valued slices."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size - 0.5
    slices = [
        255 * np.exp(-20 * ((x - i / 40) ** 2 + y**2))
        + rng.normal(0, 4, (size, size)) * (x**2 + y**2 < 0.16)
        for i in range(n)
    ]
    slices += [np.zeros((size, size)), np.full((size, size), 255), 255.0 * (x > 0)]
    slices += [rng.integers(0, 256, (size, size)), rng.integers(250, 252, (size, size))]
    return np.clip(slices, 0, 255).astype(np.uint8)


def slow_ssim(a, b):
    """Wang et al. 2004, equations 13 to 16, one 11 x 11 window after the other, in float64."""
    g = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / g.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    first, second = (sliding_window_view(x.astype(float), (11, 11)) for x in (a, b))
    for row, column in np.ndindex(first.shape[:2]):
        p, q = first[row, column], second[row, column]
        mp, mq = (w * p).sum(), (w * q).sum()
        vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
        covariance = (w * (p - mp) * (q - mq)).sum()
        luminance = (2 * mp * mq + c1) / (mp**2 + mq**2 + c1)
        values.append(luminance * (2 * covariance + c2) / (vp + vq + c2))
    return np.mean(values)


def slow_mutual_information(a, b):
    return normalized_mutual_info_score(a.ravel() // 8, b.ravel() // 8)


@pytest.mark.parametrize("size", [11, 12, 35, 224])
def test_ssim_of_a_slice_with_itself_is_1_at_any_size(size):
    compare = similarity.ssim(slices_like_ct(size, n=2))
    assert [compare(i, [i])[0] for i in range(7)] == pytest.approx(np.ones(7), abs=1e-6)


def test_ssim_of_slices_smaller_than_its_window_gets_one_line():
    with pytest.raises(SystemExit, match="11 pixels or more, not --size 10"):
        similarity.ssim(np.zeros((2, 10, 10), np.uint8))


@pytest.mark.parametrize(
    "fast, slow, size, error",
    [
        (similarity.ssim, slow_ssim, 28, 1e-5),
        (similarity.mutual_information, slow_mutual_information, 64, 1e-9),
    ],
)
def test_similarities_are_those_of_the_paper_and_of_scikit_learn(fast, slow, size, error):
    slices = slices_like_ct(size)
    compare = fast(slices)
    for i in range(0, 13, 1 + (fast is similarity.ssim)):
        expected = [slow(slices[i], other) for other in slices]
        assert compare(i, np.arange(13)) == pytest.approx(expected, abs=error)
