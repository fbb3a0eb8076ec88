import numpy as np
import pytest
from scipy import stats
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


def test_f1_and_accuracy_by_hand():
    """Two classes: F1 of class 1 (covid, haemorrhage); more: mean over classes."""
    p = np.array([0.1, 0.2, 0.6, 0.8, 0.3])  # one true, one false and one missed positive
    found = auc.metrics(np.array([0, 0, 0, 1, 1]), np.stack([1 - p, p], 1))
    assert found == {"f1": 0.5, "accuracy": 0.6, "auc": 5 / 6}
    found = auc.metrics(np.array([0, 1, 2]), np.array([[0, 1, 0], [0, 1, 0], [0, 0, 1]]))
    assert found["f1"] == pytest.approx((0 + 2 / 3 + 1) / 3) and found["accuracy"] == 2 / 3


def test_bootstrap_is_stratified_paired_and_centred():
    labels, p = scores(200, 2, 2, False)
    weights = auc.sample_weights(labels, np.arange(200))
    assert np.array_equal(weights, auc.sample_weights(labels, np.arange(200)))
    positives = labels == 1
    assert (weights[positives].sum(0) == positives.sum()).all()  # each class keeps its number
    assert (weights.sum(0) == 200).all() and weights.max() > 3
    assert weights.var() == pytest.approx(1, abs=0.05)  # as with replacement: Poisson, about
    draws = auc.bootstrap(labels, p, weights)
    assert draws.shape == (500,) and draws.std() > 0.02
    assert draws.mean() == pytest.approx(auc.metrics(labels, p)["auc"], abs=0.005)
    # a monotone change of scores changes no draw: the two are paired
    assert np.allclose(draws, auc.bootstrap(labels, p**0.5, weights))


def test_bootstrap_draws_whole_groups():
    labels = np.repeat([0, 0, 1, 1, 0, 1, 0, 1], [3, 2, 4, 1, 2, 2, 1, 2])
    groups = np.repeat([7, 3, 9, 1, 5, 6], [3, 2, 4, 1, 4, 3])  # 5 and 6 hold both classes
    weights = auc.sample_weights(labels, groups, 400)
    for group in np.unique(groups):
        assert (weights[groups == group] == weights[groups == group][0]).all()
    first = np.unique(groups, return_index=True)[1]
    times = dict(zip(groups[first], weights[first], strict=True))
    # a group is of its larger class (6: of class 1), or else of the first (5: of class 0)
    assert (times[7] + times[3] + times[5] == 3).all()
    assert (times[9] + times[1] + times[6] == 3).all()
    # images that say the same are one: their AUC varies more than that of as many free images
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    labels = np.repeat(np.arange(40) % 2, 5)
    score = np.repeat(rng.normal(size=40), 5) + labels
    p = np.stack([-score, score], 1)
    of_groups = auc.bootstrap(labels, p, auc.sample_weights(labels, groups)).std()
    of_images = auc.bootstrap(labels, p, auc.sample_weights(labels, np.arange(200))).std()
    assert of_groups / of_images == pytest.approx(5**0.5, rel=0.15)


def test_bootstrap_over_parts_is_that_of_a_plain_loop():
    """Two folds, each with NaN for the other's images, are two AUCs under the same weights."""
    labels, p = scores(60, 3, 4, True)
    fold = np.arange(60) % 2
    parts = np.stack([np.where(fold[:, None] == part, p, np.nan) for part in (0, 1)])
    weights = auc.sample_weights(labels, np.arange(60), 250)  # more than one PORTION
    found = auc.bootstrap(labels, parts, weights)
    for draw in (0, 1, 124, 125, 249):
        times = weights[:, draw].astype(int)
        aucs = []
        for part in (0, 1):
            images = np.repeat(np.flatnonzero(fold == part), times[fold == part])
            aucs += [roc_auc_score(labels[images] == c, p[images, c]) for c in range(3)]
        assert found[draw] == pytest.approx(np.mean(aucs))


def test_what_misses_a_class_does_not_count():
    """A class without images, in one of its folds or in all."""
    labels, p = scores(30, 3, 0, False)
    rest = labels != 2
    expected = [roc_auc_score(labels[rest] == c, p[rest, c]) for c in (0, 1)]
    assert auc.weighted_auc(labels, p, rest[:, None] * 1.0) == pytest.approx(np.mean(expected))
    labels = np.array([0, 0, 0, 1, 0, 1])
    p = np.random.default_rng(0).random((6, 2))
    parts = np.full((2, 6, 2), np.nan)
    parts[0, :2], parts[1, 2:] = p[:2], p[2:]
    [found] = auc.bootstrap(labels, parts, np.ones((6, 1)))
    assert found == roc_auc_score(labels[2:], p[2:, 1])
    assert np.isnan(auc.bootstrap(labels, parts[:1], np.ones((6, 1)))).all()


def test_the_covariance_is_that_between_rows_less_the_runs_own_part():
    """Rows of one run: the plain covariance of their draws. Of several: their own part is out."""
    draws = np.random.default_rng(0).normal(size=(4, 500)) * [[1], [2], [3], [5]]
    assert np.allclose(auc.image_covariance([draws[:1], draws[1:2]]), np.cov(draws[:2]))
    found = auc.image_covariance([draws[:3], draws[3:]])
    mean = draws[:3].mean(axis=0)
    own = sum(np.var(run - mean, ddof=1) for run in draws[:3]) / 2 / 3
    assert found[0, 0] == pytest.approx(np.var(mean, ddof=1) - own)
    assert found[1, 1] == pytest.approx(np.var(draws[3], ddof=1))
    assert found[0, 1] == found[1, 0] == pytest.approx(np.cov(mean, draws[3])[0, 1])
    draws[3, :9] = np.nan  # samples that hold one class only
    found = auc.image_covariance([draws[:1], draws[3:]])
    assert np.allclose(found, np.cov(draws[[0, 3], 9:]))


def t_interval(value, run_part, image_part):
    """95 % interval by variances of 11 and 99 degrees of freedom (Satterthwaite 1946)."""
    variance = run_part + image_part
    freedom = variance**2 / (run_part**2 / 11 + image_part**2 / 99)
    return pytest.approx(stats.t(freedom, value, variance**0.5).interval(0.95))


def test_estimate_is_that_of_the_textbook():
    """Runs alone: Student's two-sample t test. With images: their variance is added."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.80, 0.01, 5), rng.normal(0.78, 0.01, 8)
    spread = auc.variance_between_runs([a, b])
    found = auc.estimate([a, b], [1, -1], np.zeros((2, 2)), spread, 100)
    expected = stats.ttest_ind(a, b)
    assert found.p == pytest.approx(expected.pvalue) and found.runs == 5
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.interval_90 == pytest.approx(tuple(expected.confidence_interval(0.90)))
    images = np.array([[5.0, 3.0], [3.0, 2.0]]) * 1e-4  # variance of the difference: 1e-4
    found = auc.estimate([a, b], [1, -1], images, spread, 100)
    assert found.interval == t_interval(a.mean() - b.mean(), spread[0] * (1 / 5 + 1 / 8), 1e-4)
    alone = auc.estimate([a], [1], images[:1, :1], spread, 100)
    assert alone.value == a.mean() and alone.interval == t_interval(a.mean(), spread[0] / 5, 5e-4)
    thirds = auc.estimate([a, b], [1 / 3, -2], images, spread, 100)
    image_part = 5e-4 / 9 - 2 * 2 / 3 * 3e-4 + 4 * 2e-4
    run_part = spread[0] * (1 / 9 / 5 + 4 / 8)
    assert thirds.interval == t_interval(a.mean() / 3 - 2 * b.mean(), run_part, image_part)
    with pytest.raises(ValueError):
        auc.estimate([a, b], [1], np.zeros((1, 1)), spread, 100)


def test_an_interval_ends_where_auc_does():
    far = np.array([0.5, 0.98])
    spread = auc.variance_between_runs([far])
    assert auc.estimate([far], [1], np.zeros((1, 1)), spread, 9).interval == (0, 1)
    found = auc.estimate([far, far], [1, -1], np.zeros((2, 2)), spread, 9)
    assert found.interval == found.interval_90 == (-1, 1) and found.p == 1


def test_one_run_has_no_p_and_no_difference_at_all_has_p_1():
    a, b = np.array([0.8]), np.array([0.7, 0.72, 0.74])
    images = np.diag([3e-4, 1e-4])
    found = auc.estimate([a, b], [1, -1], images, auc.variance_between_runs([a, b]), 50)
    assert found.p is None and found.detectable is None and found.runs == 1
    half = stats.t.ppf(0.975, 49) * 0.02
    assert found.interval == pytest.approx((0.08 - half, 0.08 + half))
    assert auc.variance_between_runs([a]) == (0, 0)
    same = np.array([1.0, 1.0])
    found = auc.estimate([same, same], [1, -1], np.zeros((2, 2)), (0.0, 1), 9)
    assert found.p == 1 and found.interval == (0, 0)


def made_rows(rng, labels, runs, effect, run_sd, row_sd, noise_sd):
    """Scores of the runs of two rows, [runs, images]: shared part, row's part, signal and noise.

    effect: by how much the second row separates the classes better.
    """
    shared = rng.normal(size=len(labels))
    for row, k in enumerate(runs):
        row_part = row_sd * rng.normal(size=len(labels))
        signal = 1.2 + effect * row + run_sd * rng.normal(size=(k, 1))
        noise = noise_sd * rng.normal(size=(k, len(labels)))
        yield shared + row_part + signal * labels + noise


def comparisons(runs, nulls, effect=0.0, **spread):
    """auc.estimate of the difference of two made-up rows, many times; the second has the effect."""
    labels = np.repeat([0, 1], 25)
    weights = auc.sample_weights(labels, np.arange(50), 100)
    weights = np.concatenate([np.ones((50, 1), np.float32), weights], 1)  # the AUC itself first
    rng = np.random.default_rng(0)
    found = []
    for _ in range(nulls):
        rows = made_rows(rng, labels, runs, effect, **spread)
        draws = [
            np.array([auc.binary_auc(labels == 1, run, weights) for run in row]) for row in rows
        ]
        aucs = [row[:, 0] for row in draws]
        covariance = auc.image_covariance([row[:, 1:] for row in draws])
        found.append(auc.estimate(aucs, [1, -1], covariance, auc.variance_between_runs(aucs), 50))
    return found


RUNS_DOMINATE = {"run_sd": 0.4, "row_sd": 0.2, "noise_sd": 0.2}
IMAGES_DOMINATE = {"run_sd": 0.05, "row_sd": 0.8, "noise_sd": 0.3}
NOISE_DOMINATES = {"run_sd": 0.0, "row_sd": 0.0, "noise_sd": 0.8}


@pytest.mark.parametrize("spread", [RUNS_DOMINATE, IMAGES_DOMINATE, NOISE_DOMINATES])
@pytest.mark.parametrize("runs", [(3, 3), (3, 8)])
def test_true_nulls_are_called_different_in_3_to_7_percent(runs, spread):
    """Runs that differ, rows whose images differ, and noise of each run on each image.

    The last is part of both spreads: counted twice, 1 % of the nulls would be called different.
    """
    found = comparisons(runs, 2000, **spread)
    assert 0.03 <= np.mean([one.p < 0.05 for one in found]) <= 0.07
    covered = [one.interval_90[0] <= 0 <= one.interval_90[1] for one in found]
    assert 0.87 <= np.mean(covered) <= 0.93


def test_the_detectable_difference_is_found_with_80_percent_power():
    spread = {"run_sd": 0.2, "row_sd": 0.3, "noise_sd": 0.2}
    found = comparisons((5, 5), 300, effect=0.7, **spread)
    difference = -np.mean([one.value for one in found])
    assert difference == pytest.approx(np.median([one.detectable for one in found]), rel=0.05)
    assert 0.73 <= np.mean([one.p < 0.05 for one in found]) <= 0.87
    large = comparisons((3, 3), 50, effect=2.0, **spread)
    assert np.mean([one.p < 0.05 for one in large]) > 0.95


def test_holm_is_that_of_a_plain_loop():
    p = np.random.default_rng(0).random(20) ** 4
    p[3] = p[5]
    largest, expected = 0.0, {}
    for rank, i in enumerate(sorted(range(20), key=lambda i: p[i])):
        largest = max(largest, min(1, p[i] * (20 - rank)))
        expected[i] = largest
    assert np.allclose(auc.holm(p), [expected[i] for i in range(20)]) and auc.holm([]).size == 0
    assert np.allclose(auc.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
