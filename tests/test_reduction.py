"""The selections against slow, obvious ones; budgets; the dose."""

import imagehash
import numpy as np
import pytest

from common import hashing, reduction
from common.reduction import STRATEGIES, Group


def slow_greedy(similarity, threshold):
    """The rule in the plainest words, on a table: [representative], [similarity to it]."""
    representative = list(range(len(similarity)))
    remaining = representative.copy()
    while remaining:
        first = remaining[0]
        for i in remaining.copy():
            if i == first or similarity[first][i] >= threshold:
                representative[i] = first
                remaining.remove(i)
    return representative, [similarity[first][i] for i, first in enumerate(representative)]


def random_walk(n, seed=0):
    """Bits like those of neighbouring slices, bool [n, 64]: a few turn from each to the next."""
    rng = np.random.default_rng(seed)
    bits = rng.random((n, 64)) < np.r_[1, np.full(n - 1, 0.04)][:, None]
    bits[0] &= rng.random(64) < 0.5
    return np.logical_xor.accumulate(bits, 0)


def group_of(bits):
    hashes = np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)
    return Group(hashes, None, None, np.random.default_rng(0))


def kept_by(strategy, group, count):
    """The slices kept by a strategy of a given number; the nearest of them represents each."""
    representative, bits = reduction.keep_count(STRATEGIES[strategy].by_count, group, count)
    assert bits.tolist() == hashing.hamming(group.hashes, group.hashes[representative]).tolist()
    index = range(len(representative))
    kept = [i for i in index if representative[i] == i]
    nearest = [min(kept, key=lambda other: (abs(other - i), other)) for i in index]
    assert representative.tolist() == nearest, "the lower one on a tie"
    return kept


def test_dhash_golden_value():
    """A ramp: brighter to the right, so every bit is set (definition of the difference hash)."""
    ramp = np.tile(np.arange(90, dtype=np.uint8), (80, 1))
    assert hashing.slice_hash(ramp) == "ffffffffffffffff"
    assert hashing.slice_hash(ramp[:, ::-1].copy()) == "0000000000000000"


def test_thresholds_by_default_are_those_of_the_readme():
    defaults = {name: of.default for name, of in STRATEGIES.items() if of.by_threshold}
    ours = {"every-n": 8, "ssim": 0.7, "mi": 0.45, "embedding": 0.997}
    assert defaults == ours | {"hash": 6}  # paper


@pytest.mark.parametrize("threshold", [0, 1, 3, 6, 12, 30, 64])
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_hash_selection_is_the_plain_loop_over_imagehash(threshold, order):
    bits = random_walk(100, threshold)
    shuffled = np.random.default_rng(0).permutation(bits)
    bits = {"forward": bits, "backward": bits[::-1], "shuffled": shuffled}[order]
    images = [imagehash.ImageHash(b.reshape(8, 8)) for b in bits]
    expected = slow_greedy([[-(a - b) for b in images] for a in images], -threshold)
    representative, differ = STRATEGIES["hash"].by_threshold(group_of(bits), threshold)
    assert (representative.tolist(), (-differ).tolist()) == expected


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9, 1.1])
def test_greedy_compares_only_what_remains(threshold):
    """On a table of similarities that are not symmetric, so that the order of a pair counts."""
    table = np.random.default_rng(0).random((40, 40))
    compared = []

    def compare(first, others):
        compared.append(len(others))
        return table[first, others]

    representative, alike = reduction.greedy(np.arange(40), compare, threshold)
    assert (representative.tolist(), alike.tolist()) == slow_greedy(table, threshold)
    assert compared[0] == 40 and all(b < a for a, b in zip(compared, compared[1:], strict=False))


@pytest.mark.parametrize("n, count", [(100, 10), (37, 4), (13, 1), (250, 30)])
def test_baselines_keep_a_given_number_and_every_n_at_even_distances(n, count):
    group = group_of(random_walk(n))
    assert len(kept_by("random", group, count)) == count
    even = kept_by("every-n", group, count)
    assert len(even) == count and set(np.diff([*even, n])) <= {n // count, n // count + 1}
    representative, _ = STRATEGIES["every-n"].by_threshold(group, 4)
    assert representative.tolist() == [i // 4 * 4 for i in range(n)]


def test_random_draws_every_slice_equally_often():
    group = group_of(random_walk(10))
    drawn = np.bincount([i for _ in range(2000) for i in kept_by("random", group, 3)])
    assert drawn == pytest.approx(np.full(10, 600), abs=100)  # 5 standard deviations


@pytest.mark.parametrize("budget", [52, 53, 60, 100, 570])
def test_a_budget_is_kept_to_the_slice_when_many_volumes_are_tiny(budget):
    """Every volume keeps one, so the long ones give up what the tiny ones take too much."""
    sizes = np.array([1] * 30 + [200, 300] + [2] * 20)
    counts = reduction.share_out(sizes, budget)
    assert counts.sum() == budget and (1 <= counts).all() and (counts <= sizes).all()
    assert counts.tolist() == reduction.share_out(sizes, budget / sizes.sum()).tolist()
    in_proportion = reduction.share_out([100, 37, 13, 250], 0.1) - [10, 3.7, 1.3, 25]
    assert (np.abs(in_proportion) <= 1).all() and abs(in_proportion.sum()) < 1e-9


@pytest.mark.parametrize("count", [1, 7, 30, 119])
def test_redundant_keeps_those_with_the_most_near_duplicates(count):
    """Ranked by a plain double loop; each slice comes twice, so that z order decides too."""
    bits = np.tile(random_walk(60), (2, 1))
    differ = [[int((a != b).sum()) for b in bits] for a in bits]
    near = [sum(d <= 6 for d in row) for row in differ]
    assert len(set(near)) < 60
    ranked = sorted(range(120), key=lambda i: (-near[i], sum(differ[i]), i))
    assert kept_by("redundant", group_of(bits), count) == sorted(ranked[:count])


def keep_first(count):
    """A selection of 100 slices that keeps the first ones."""
    index = np.arange(100)
    return np.where(index < count, index, 0), np.full(100, count)


@pytest.mark.parametrize("default", [None, 0.9, -0.7])
@pytest.mark.parametrize("target", [3, 4, 10, 37, 99.6, 100])
def test_the_threshold_searched_comes_closest_to_the_budget(target, default):
    """The number kept grows with the threshold in jumps, as ties make them, from 4 on."""
    steps = np.sort(np.random.default_rng(2).random(24) ** 0.2)

    def select_at(threshold):
        return keep_first(4 + 4 * int((steps <= threshold).sum()))

    strategy = reduction.Strategy("", default=default)
    closest = min(abs(4 + 4 * k - target) for k in range(25))
    threshold, (representative, kept) = reduction.search(select_at, strategy, target)
    assert abs(kept[0] - target) == closest
    assert representative.tolist() == select_at(threshold)[0].tolist()


@pytest.mark.parametrize("target", [14, 14.5, 37, 99.6, 100])
def test_of_whole_thresholds_each_is_tried(target):
    whole = reduction.Strategy("", thresholds=range(30))
    threshold, _ = reduction.search(lambda t: keep_first(100 - 3 * t), whole, target)
    misses = [abs(100 - 3 * t - target) for t in range(30)]
    assert threshold == misses.index(min(misses)), "the lower one on a tie"


@pytest.mark.parametrize("n", [1, 2, 40, 128, 129, 300])
def test_the_dose_is_what_shuffled_batches_hold(n):
    """Counted in 400 shuffled epochs by a plain double loop over each batch."""
    rng = np.random.default_rng(n)
    bits = random_walk(n, n)
    volumes = np.arange(n) * 3 // n
    near = (volumes[:, None] == volumes) & ((bits[:, None] != bits).sum(2) <= 6)
    met = 0
    for _ in range(400):
        for batch in np.array_split(rng.permutation(n), -(-n // 128)):
            met += near[np.ix_(batch, batch)].sum() - len(batch)  # less each with itself
    dose = reduction.expected_dose(group_of(bits).hashes, volumes)
    assert dose == pytest.approx(met / 400 / n, rel=0.005)
    assert (dose > 1) == (n > 2)
