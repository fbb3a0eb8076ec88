"""Fast similarities and selections against slow, obvious ones."""

import imagehash
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score

from common import hashing, reduction, similarity


def slices_like_ct(size=64, n=8):
    """Smooth blobs that drift from slice to slice on air, then what is hard: constant, noisy,
    bright, two-valued slices."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size - 0.5
    body = [
        255 * np.exp(-20 * ((x - i / 40) ** 2 + y**2))
        + rng.normal(0, 4, (size, size)) * (x**2 + y**2 < 0.16)
        for i in range(n)
    ]
    hard = [
        np.zeros((size, size)),
        np.full((size, size), 255),
        rng.integers(0, 256, (size, size)),
        rng.integers(250, 252, (size, size)),
        255.0 * (x > 0),
    ]
    return np.stack([np.clip(s, 0, 255).astype(np.uint8) for s in [*body, *hard]])


def slow_ssim(a, b):
    """Wang et al. 2004, equations 13 to 16, one 11 x 11 window after the other, in float64."""
    g = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / g.sum() ** 2
    found = []
    for p, q in zip(
        sliding_window_view(a.astype(float), (11, 11)).reshape(-1, 11, 11),
        sliding_window_view(b.astype(float), (11, 11)).reshape(-1, 11, 11),
    ):
        mp, mq = (w * p).sum(), (w * q).sum()
        vp, vq, cov = (
            (w * (p - mp) ** 2).sum(),
            (w * (q - mq) ** 2).sum(),
            (w * (p - mp) * (q - mq)).sum(),
        )
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        found.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(found)


def test_ssim_is_that_of_the_paper():
    slices = slices_like_ct(size=40)
    compare = similarity.ssim(slices)
    for i in (0, 3, 8, 9, 10, 11, 12):
        expected = [slow_ssim(slices[i], s) for s in slices]
        assert compare(i, np.arange(len(slices))) == pytest.approx(expected, abs=1e-5)
        plain = [similarity.plain_ssim(slices[i], s) for s in slices]
        assert plain == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("size", [11, 12, 35, 224])
def test_ssim_of_a_slice_with_itself_is_1_at_any_size(size):
    slices = slices_like_ct(size=size, n=2)
    compare = similarity.ssim(slices)
    with_itself = [compare(i, [i])[0] for i in range(len(slices))]
    assert with_itself == pytest.approx(np.ones(len(slices)), abs=1e-6)


def test_mutual_information_is_that_of_scikit_learn():
    slices = slices_like_ct()
    compare = similarity.mutual_information(slices)
    everything = np.arange(len(slices))
    for i in everything:
        expected = [
            normalized_mutual_info_score(slices[i].ravel() // 8, s.ravel() // 8) for s in slices
        ]
        assert compare(i, everything) == pytest.approx(expected, abs=1e-9)


def test_cosine():
    features = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    for i in range(6):
        expected = [
            a @ features[i] / np.linalg.norm(a) / np.linalg.norm(features[i]) for a in features
        ]
        assert similarity.cosine(features)(i, np.arange(6)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9, 1.1])
def test_greedy_is_the_plain_loop_for_a_similarity(threshold):
    slices = slices_like_ct(n=20)[np.random.default_rng(1).permutation(25)]
    compare = similarity.mutual_information(slices)
    remaining = list(range(25))
    expected = {}
    while remaining:
        first = remaining[0]
        for i in remaining.copy():
            found = compare(first, [i])[0]
            if i == first or found >= threshold:
                expected[i] = first, found
                remaining.remove(i)
    representative, values = reduction.select_similar(25, compare, threshold)
    assert representative.tolist() == [expected[i][0] for i in range(25)]
    assert values.tolist() == [expected[i][1] for i in range(25)]


@pytest.mark.parametrize("threshold", [-1, 0.5, 0.8, 0.9, 0.97, 1.1])
@pytest.mark.parametrize("n", [1, 16, 600])
def test_embeddings_block_by_block_are_selected_as_by_greedy(monkeypatch, n, threshold):
    """600 embeddings that drift, as along z, in blocks of 16: 38 blocks, each part 256 long."""
    monkeypatch.setattr(reduction, "BLOCK", 16)
    features = np.random.default_rng(0).normal(size=(n, 24)).cumsum(0).astype(np.float32)
    compare = similarity.cosine(features)
    cosines = np.array([compare(i, np.arange(n)) for i in range(n)])
    assert np.abs(cosines - threshold).min() > 1e-6, "rounding must not decide"
    expected, values = reduction.select_similar(n, compare, threshold)
    representative, cosine = reduction.select_embeddings(features, threshold)
    assert representative.tolist() == expected.tolist()
    assert cosine == pytest.approx(values, abs=1e-6)
    if n == 600 and threshold >= 0.9:
        assert len(set(expected)) > 16, "more than a block of slices stay"


@pytest.mark.parametrize("threshold", [0, 1, 3, 6, 10, 20])
def test_the_index_over_hashes_changes_no_selection(threshold):
    """5,000 hashes, clustered as those of 40 volumes: above 4,096 select_hash uses the index up to
    10 bits."""
    rng = np.random.default_rng(threshold)
    turns = rng.random((5000, 64)) < 0.03
    turns[::125] = rng.random((40, 64)) < 0.3  # near enough that volumes overlap
    packed = np.packbits(np.logical_xor.accumulate(turns, 0), axis=1)
    hashes = packed.view(">u8").ravel().astype(np.uint64)

    def compare(first, others):
        return hashing.hamming(hashes[first], hashes[others])

    brute, _ = reduction.greedy(5000, compare, lambda bits: bits <= threshold)
    assert reduction.select_hash(hashes, threshold).tolist() == brute.tolist()


def test_dhash_is_that_of_imagehash_bit_for_bit():
    rng = np.random.default_rng(0)
    for n in range(600):
        height, width = rng.integers(1, 30, 2) if n % 4 == 0 else rng.integers(16, 530, 2)
        if n % 25 == 1:  # near and beyond the size up to which float32 is exact
            height, width = rng.integers(1000, 1700, 2)
        pixels = rng.integers(0, 256, (height, width), dtype=np.uint8)
        if n % 3 == 0:  # smooth
            pixels = np.asarray(
                Image.fromarray(pixels[:9, :9]).resize(
                    (int(width), int(height)), Image.Resampling.BICUBIC
                )
            )
        if n % 3 == 1:  # two values, as far apart as can be
            pixels = (pixels > 127).astype(np.uint8) * 255
        assert hashing.dhash(pixels) == str(imagehash.dhash(Image.fromarray(pixels))), (
            height,
            width,
        )


@pytest.mark.parametrize("source", [16, 512, 1024, 4096])
def test_the_sums_of_dhash_are_exact(source):
    """On pixels that make the sums of the weights' pieces as large as can be, and on noise."""
    weights = hashing.lanczos_weights(source, 9).astype(int)
    noise = np.random.default_rng(0).integers(0, 256, (100, source))
    rest = weights - 256 * np.rint(weights / 256).astype(int)
    image = np.concatenate([noise, 255 * (weights > 0), 255 * (rest > 0), 255 * (rest < 0)])
    assert (hashing.weighted_sums(image.astype(np.uint8), source, 9) == image @ weights.T).all()


@pytest.mark.parametrize("target", [3, 4, 10, 37, 99.6, 100])
def test_the_threshold_searched_comes_closest_to_the_budget(target):
    """On counts that grow in jumps, as ties make them, from 4 groups to 100 slices."""
    steps = np.sort(np.random.default_rng(2).random(24) ** 0.2)

    def count(threshold):
        return 4 + 4 * int((steps <= threshold).sum())

    best = reduction.search_threshold(count, 4, 100, target, 0.9)
    assert abs(count(best) - target) == min(abs(4 + 4 * k - target) for k in range(25))
