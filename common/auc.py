"""AUC, its interval, and comparisons that cover test images and pre-training runs."""

import hashlib
import warnings
from typing import NamedTuple

import numpy as np
from scipy import stats  # comes with scikit-learn
from sklearn.metrics import accuracy_score, f1_score

DRAWS = 500  # bootstrap samples of the test images: their variance is known to 6 %
PRECISION = 1e-5  # of the bootstrap's AUCs, as they are kept
PORTION = 200  # samples at once, which fit the processor's cache: 2 s a line of organ, not 5


def metrics(labels, probabilities):
    """{"auc", "f1", "accuracy"} of labels int [n] and probabilities float [n, classes].

    AUC and F1 of class 1, or for more than two classes macro means (AUC: one-vs-rest).
    """
    predicted = probabilities.argmax(1)
    average = "binary" if probabilities.shape[1] == 2 else "macro"
    return {
        "auc": float(weighted_auc(labels, probabilities, np.ones((len(labels), 1)))[0]),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0)),
        "accuracy": float(accuracy_score(labels, predicted)),
    }


def weighted_auc(labels, probabilities, weights):
    """The AUC of metrics under weights of the images, [n, draws] -> [draws].

    A class whose images, or all others, weigh nothing is left out.
    """
    classes = range(probabilities.shape[1]) if probabilities.shape[1] > 2 else [1]
    aucs = [binary_auc(labels == c, probabilities[:, c], weights) for c in classes]
    return mean_of_defined(aucs)


def binary_auc(positive, scores, weights):
    """P(score of a positive > score of a negative), ties counting half.

    positive bool [n], scores [n], weights [n, draws] -> [draws]; NaN where a draw holds one class.
    """
    negatives = np.flatnonzero(~positive)
    negatives = negatives[np.argsort(scores[negatives])]
    # below[j]: weight of the j negatives with the lowest scores
    below = np.zeros((len(negatives) + 1, weights.shape[1]), weights.dtype)
    np.cumsum(weights[negatives], axis=0, out=below[1:])
    lower = np.searchsorted(scores[negatives], scores[positive], "left")
    not_higher = np.searchsorted(scores[negatives], scores[positive], "right")
    beaten = (below[lower] + below[not_higher]) / 2
    positives = weights[positive]
    pairs = positives.sum(axis=0, dtype=float) * below[-1]
    with np.errstate(invalid="ignore"):
        return (positives * beaten).sum(axis=0, dtype=float) / pairs


def mean_of_defined(aucs):
    """Mean over the first axis without NaN; NaN where there is nothing else."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of nothing but NaN
        return np.nanmean(aucs, axis=0)


def sample_weights(labels, groups, draws=DRAWS):
    """How often each bootstrap sample of the test set holds each image, float32 [n, draws].

    Whole groups are drawn (images of a patient or paper are not independent), class by class: a
    group is of the class that most of its images have (our choice). The same labels and groups
    give the same samples: encoders are compared on the same images.
    """
    _, group = np.unique(groups, return_inverse=True)
    images_of_class = np.zeros((group.max() + 1, labels.max() + 1), int)
    np.add.at(images_of_class, (group, labels), 1)
    class_of_group = images_of_class.argmax(axis=1)
    rng = np.random.default_rng(0)
    times = np.empty((len(class_of_group), draws), np.float32)
    for label in np.unique(class_of_group):
        members = np.flatnonzero(class_of_group == label)
        equal = np.full(len(members), 1 / len(members))
        times[members] = rng.multinomial(len(members), equal, draws).T
    return times[group]


def bootstrap(labels, probabilities, weights):
    """AUC under each column of weights, [draws].

    probabilities: [n, classes], or [parts, n, classes] of a line that is a mean over parts: draws
    of labels, or every fold of every repeat (NaN for the images that a part does not test).
    """
    aucs = []
    for part in probabilities if probabilities.ndim == 3 else [probabilities]:
        tested = ~np.isnan(part[:, 0])
        portions = np.array_split(weights[tested], -(-weights.shape[1] // PORTION), axis=1)
        portions = [weighted_auc(labels[tested], part[tested], portion) for portion in portions]
        aucs.append(np.concatenate(portions))
    return mean_of_defined(aucs)


def bootstrap_of(tested, labels, groups, probabilities):
    """What was tested, and its AUC under each bootstrap sample and of each part.

    In units of PRECISION, None where a class is missing.
    """
    parts = probabilities if probabilities.ndim == 3 else [probabilities]
    once = np.ones((len(labels), 1))
    aucs = {
        "draws": bootstrap(labels, probabilities, sample_weights(labels, groups)),
        "parts": np.concatenate([bootstrap(labels, part, once) for part in parts]),
    }
    data = b"".join(array.tobytes() for array in (tested, labels, groups))
    record = {"tested": hashlib.sha256(data).hexdigest()[:8], "groups": len(np.unique(groups))}
    for key, values in aucs.items():
        record[key] = [None if np.isnan(value) else round(value / PRECISION) for value in values]
    return record


def image_covariance(rows):
    """Covariance, over samples of the test images, between the mean AUCs of rows: [rows, rows].

    rows: for each one the bootstrap of its runs, [runs, draws]. What the images do to one run alone
    is left out where a row has several: the spread between runs holds it already (so do Obuchowski
    and Rockette 1995, whose readers are our runs).
    """
    defined = ~np.isnan(np.concatenate(rows)).any(axis=0)  # samples that hold both classes
    rows = [draws[:, defined] for draws in rows]
    means = np.array([draws.mean(axis=0) for draws in rows])
    covariance = np.cov(means, ddof=1).reshape(len(rows), len(rows))
    for i, draws in enumerate(rows):
        if len(draws) > 1:
            own = (draws - means[i]).var(axis=1, ddof=1).sum() / (len(draws) - 1)
            covariance[i, i] -= own / len(draws)
    return covariance


def variance_between_runs(rows):
    """(variance between the runs of a row, pooled over rows with 2 runs or more; its freedom).

    rows: the AUCs of each row's runs, [runs]. The rows are taken to vary alike. If two of many have
    twice the SD of the others, 26 % of true nulls between them have p < 0.05 (simulated);
    results/study/analysis.py prints Welch's p too.
    """
    repeated = [aucs for aucs in rows if len(aucs) > 1]
    freedom = sum(len(aucs) - 1 for aucs in repeated)
    squares = sum((len(aucs) - 1) * np.var(aucs, ddof=1) for aucs in repeated)
    return squares / max(freedom, 1), freedom


class Estimate(NamedTuple):
    """Of the mean AUC of a row, a difference, or another weighted sum of rows."""

    value: float
    interval: tuple[float, float]  # 95 %
    interval_90: tuple[float, float]  # for equivalence: two one-sided tests at 5 %
    p: float | None  # two-sided, of no difference; None where a row has one run
    detectable: float | None  # the true difference that is found with 80 % power at p < 0.05
    runs: int  # the fewest of a row


def estimate(rows, weights, covariance, between_runs, groups):
    """Estimate of a weighted sum of the mean AUCs of rows, such as [1, -1] for a difference.

    rows: the AUCs of the runs of each, [runs]. covariance: image_covariance of these rows.
    between_runs: variance_between_runs of the table. groups: independent groups of images.

    A t interval over runs with the images added: variance = s2 (1 / k0 + 1 / k1) + that of the
    images, for a difference; degrees of freedom after Satterthwaite 1946, where the image part has
    groups - 1. With one run in any row the interval covers images only, and there is no p.
    """
    weights = np.array(weights, float)
    value = float(sum(weight * np.mean(aucs) for weight, aucs in zip(weights, rows, strict=True)))
    image_part = max(float(weights @ covariance @ weights), 0.0)
    runs = [len(aucs) for aucs in rows]
    variance, run_freedom = between_runs
    run_part = variance * sum(weights**2 / runs) if min(runs) > 1 else 0.0
    error = (run_part + image_part) ** 0.5
    freedom = max(groups - 1, 1)
    if run_part > 0:
        freedom = error**4 / (run_part**2 / run_freedom + image_part**2 / freedom)
    half, half_90, power = error * stats.t.ppf([0.975, 0.95, 0.8], freedom)
    p = float(2 * stats.t.sf(abs(value) / error, freedom)) if error else float(value == 0)
    lowest, highest = weights.clip(max=0).sum(), weights.clip(min=0).sum()
    return Estimate(
        value=value,
        interval=(max(value - half, lowest), min(value + half, highest)),
        interval_90=(max(value - half_90, lowest), min(value + half_90, highest)),
        p=p if min(runs) > 1 else None,
        detectable=half + power if min(runs) > 1 else None,
        runs=min(runs),
    )


def holm(p_values):
    """p-values corrected for their number (Holm 1979), dependent or not: [m] -> [m]."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(p_values[order] * factors).clip(max=1)
    return corrected
