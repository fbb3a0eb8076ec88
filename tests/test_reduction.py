import csv

import imagehash
import numpy as np
import pytest
from PIL import Image

from common import hashing, reduction


def slow_greedy(hashes, threshold):
    """The rule in the plainest words, on imagehash's own objects: [(kept, [its slices])]."""
    remaining = list(enumerate(hashes))
    found = []
    while remaining:
        first, kept = remaining[0]
        represented = [i for i, h in remaining if h - kept <= threshold]
        found.append((first, represented))
        remaining = [(i, h) for i, h in remaining if i not in represented]
    return found


def random_walk(n, rng):
    """Hashes like those of neighbouring slices: each differs from the one before in a few bits."""
    bits = rng.random((n, 64)) < np.r_[1, np.full(n - 1, 0.04)][:, None]
    bits[0] &= rng.random(64) < 0.5
    return np.logical_xor.accumulate(bits, 0)


@pytest.mark.parametrize("threshold", [0, 1, 3, 6, 12, 30, 64])
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_hash_selection_is_the_plain_loop(threshold, order):
    rng = np.random.default_rng(threshold)
    bits = random_walk(150, rng)
    bits = {"forward": bits, "backward": bits[::-1], "shuffled": rng.permutation(bits)}[order]
    expected = np.empty(150, int)
    for kept, members in slow_greedy(
        [imagehash.ImageHash(b.reshape(8, 8)) for b in bits], threshold
    ):
        expected[members] = kept
    hashes = np.array([int(str(imagehash.ImageHash(b.reshape(8, 8))), 16) for b in bits], np.uint64)
    assert reduction.select_hash(hashes, threshold).tolist() == expected.tolist()


@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (100, 333), (401, 37)])
def test_the_stored_dhash_is_that_of_imagehash_at_full_resolution(tmp_path, run, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels.flat[:2] = 0, 255  # so that min-max scaling changes nothing
    (tmp_path / "data").mkdir()
    Image.fromarray(pixels).save(tmp_path / "data" / "p_1.png")
    run(
        "reduce.py",
        tmp_path / "data",
        tmp_path / "out",
        "--strategy",
        "all",
        "--workers",
        1,
        "--size",
        32,
    )
    with open(tmp_path / "out" / "slices.csv") as file:
        [row] = csv.DictReader(file)
    assert row["dhash"] == str(imagehash.dhash(Image.fromarray(pixels)))


def test_dhash_golden_value():
    """A ramp: brighter to the right, so every bit is set; from imagehash 4.3.2, Pillow 12.3.0."""
    ramp = np.tile(np.arange(90, dtype=np.uint8), (80, 1))
    assert hashing.dhash(ramp) == "ffffffffffffffff"
    assert hashing.dhash(ramp[:, ::-1].copy()) == "0000000000000000"


def test_baselines_keep_what_the_budget_says():
    sizes = np.array([100, 37, 13, 250])
    counts = reduction.share_out(sizes, 0.1)
    assert counts.sum() == 40 and (counts >= 1).all() and (np.abs(counts - sizes * 0.1) <= 1).all()
    for n, count in zip(sizes, counts):
        evenly = reduction.select_evenly(n, count)
        at_random = reduction.select_random(n, count, np.random.default_rng(0))
        for chosen in (evenly, at_random):
            kept = np.flatnonzero(chosen == np.arange(n))
            assert len(kept) == count
            assert all(abs(i - chosen[i]) == np.abs(i - kept).min() for i in range(n))
    assert reduction.select_every(10, 4).tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]


def test_a_budget_is_kept_to_the_slice_when_many_volumes_are_tiny():
    """Every volume keeps one, so the long ones give up what the tiny ones take too much."""
    sizes = np.array([1] * 30 + [200, 300] + [2] * 20)
    for budget in (52, 53, 60, 100, 570):
        counts = reduction.share_out(sizes, budget / sizes.sum())
        assert counts.sum() == budget
        assert (1 <= counts).all() and (counts <= sizes).all()


def test_redundant_keeps_those_with_the_most_near_duplicates():
    """Ranked by a plain double loop over all pairs of a volume in which the same slice comes twice,
    so that z order decides too."""
    rng = np.random.default_rng(0)
    bits = np.tile(random_walk(60, rng), (2, 1))
    hashes = np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)
    differ = [[int((a != b).sum()) for b in bits] for a in bits]
    near = [sum(d <= 6 for d in row) - 1 for row in differ]
    assert reduction.count_near_duplicates(hashes).tolist() == near and len(set(near)) < 60
    ranked = sorted(range(120), key=lambda i: (-near[i], sum(differ[i]), i))
    for count in (1, 7, 30, 119):
        representative = reduction.select_redundant(hashes, count)
        kept = np.flatnonzero(representative == np.arange(120))
        assert kept.tolist() == sorted(ranked[:count])
        assert all(abs(i - representative[i]) == np.abs(i - kept).min() for i in range(120))


@pytest.mark.parametrize("n", [1, 2, 40, 128, 129, 300])
def test_the_dose_is_what_shuffled_batches_hold(n):
    """Counted in 400 shuffled epochs by a plain double loop over each batch."""
    rng = np.random.default_rng(n)
    hashes = np.packbits(random_walk(n, rng), axis=1).view(">u8").ravel().astype(np.uint64)
    volumes = np.arange(n) * 3 // n
    bits = [[int(a ^ b).bit_count() for b in hashes] for a in hashes]
    near = np.array(
        [[volumes[i] == volumes[j] and bits[i][j] <= 6 for j in range(n)] for i in range(n)]
    )
    met = 0
    for _ in range(400):
        for batch in np.array_split(rng.permutation(n), -(-n // 128)):
            met += near[np.ix_(batch, batch)].sum() - len(batch)  # less each with itself
    dose = reduction.expected_dose(hashes, volumes)
    assert dose == pytest.approx(met / 400 / n, rel=0.005)
    assert (dose > 1) == (n > 2)
