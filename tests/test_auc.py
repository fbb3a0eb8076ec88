import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from common import auc


def scores(n, classes, seed, ties):
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes), rng.integers(0, classes, n - classes)]
    raw = rng.random((n, classes)) + 0.3 * np.eye(classes)[labels]
    raw = np.round(raw, 1) if ties else raw
    return labels, raw / raw.sum(1, keepdims=True)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 11])
def test_auc_is_that_of_scikit_learn(classes, ties):
    labels, p = scores(300, classes, classes, ties)
    expected = roc_auc_score(
        labels, p[:, 1] if classes == 2 else p, multi_class="ovr", average="macro"
    )
    assert auc.metrics(labels, p)["auc"] == pytest.approx(expected, abs=1e-12)


def test_weighted_auc_is_that_of_the_resampled_images():
    labels, p = scores(60, 2, 0, True)
    rng = np.random.default_rng(1)
    picks = [np.r_[0, 1, rng.integers(0, 60, 58)] for _ in range(20)]
    weights = np.array([np.bincount(pick, minlength=60) for pick in picks])
    expected = [roc_auc_score(labels[pick], p[pick, 1]) for pick in picks]
    assert np.allclose(auc.weighted_auc(labels, p, weights), expected)


def test_bootstrap_is_stratified_paired_and_centred():
    labels, p = scores(200, 2, 2, False)
    images = np.arange(200)
    draws = auc.bootstrap(labels, p, images)
    assert len(draws) == auc.DRAWS and np.array_equal(draws, auc.bootstrap(labels, p, images))
    assert draws.mean() == pytest.approx(auc.metrics(labels, p)["auc"], abs=0.005)
    assert np.allclose(
        draws - auc.bootstrap(labels, p**0.5, images), 0
    )  # a monotone change of scores changes no draw
    low, high = auc.interval(draws)
    assert low < auc.metrics(labels, p)["auc"] < high


def test_p_value_counts_the_rarer_side():
    differences = np.r_[np.full(30, -1.0), np.full(970, 1.0)]
    assert auc.p_value(differences) == pytest.approx(0.06)
    assert auc.p_value(np.ones(1000)) == 0.001 and auc.p_value(np.zeros(1000)) == 1


def test_holm_is_that_of_a_plain_loop():
    p = np.random.default_rng(0).random(20) ** 4
    p[3] = p[5]
    largest, expected = 0.0, {}
    for rank, i in enumerate(sorted(range(20), key=lambda i: p[i])):
        largest = max(largest, min(1, p[i] * (20 - rank)))
        expected[i] = largest
    assert np.allclose(auc.holm(p), [expected[i] for i in range(20)]) and auc.holm([]).size == 0
    assert np.allclose(auc.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])


def test_over_runs_is_that_of_a_plain_loop():
    draws = np.random.default_rng(0).normal(size=(3, 500))
    drawn = np.random.default_rng(0).integers(3, size=(3, 500))
    plain = [sum(draws[drawn[run, i], i] for run in range(3)) / 3 for i in range(500)]
    np.testing.assert_allclose(auc.over_runs(draws), plain)
    np.testing.assert_array_equal(auc.over_runs(draws[:1]), draws[0])
    wide = draws + np.array([[-3.0], [0.0], [3.0]])  # runs that differ by much more than images do
    assert np.var(auc.over_runs(wide)) == pytest.approx(9 * (2 / 3) / 3 + 1 / 3, rel=0.2)
