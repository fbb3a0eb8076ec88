"""AUC, its interval, and comparisons that cover test images and pre-training runs.

In the order of use: metrics of one run; bootstrap of its test images; image_covariance and
variance_between_runs of a table's rows; estimate of a row or a difference.
"""

import numpy as np
from scipy import stats  # comes with scikit-learn
from sklearn.metrics import accuracy_score, f1_score

DRAWS = 500  # bootstrap samples of the test images: their variance is known to 6 %
PORTION = 200  # samples worked on at once: what fits the processor's cache


def metrics(labels, probabilities):
    """{"auc", "f1", "accuracy"} of labels int [n] and probabilities float [n, classes].

    AUC: of class 1, or the macro mean over one-vs-rest for more than two classes. F1: of class 1,
    or macro.
    """
    predicted = probabilities.argmax(1)
    average = "binary" if probabilities.shape[1] == 2 else "macro"
    return {
        "auc": float(weighted_auc(labels, probabilities, np.ones((len(labels), 1)))[0]),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0)),
        "accuracy": float(accuracy_score(labels, predicted)),
    }


def weighted_auc(labels, probabilities, weights):
    """AUC under each of many weightings of the images: weights [n, draws] -> [draws].

    Macro one-vs-rest over classes; a class whose images, or all others, weigh nothing is left out.
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
    aucs = np.asarray(aucs)
    defined = ~np.isnan(aucs)
    with np.errstate(invalid="ignore"):
        return np.where(defined, aucs, 0).sum(axis=0) / defined.sum(axis=0)


def sample_weights(labels, groups, draws=DRAWS):
    """How often each bootstrap sample of the test set holds each image, float32 [n, draws].

    Whole groups are drawn, since images of one group (a patient, a paper) are not independent. They
    are drawn class by class: a group counts to the class that most of its images have (our choice).
    The same labels and groups give the same samples, so that two encoders are compared on the same
    images.
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
    """AUC under each column of sample_weights, [draws].

    probabilities: [n, classes], or [parts, n, classes] for a mean over parts (draws of training
    labels, folds), each with NaN for the images that it does not test.
    """
    parts = probabilities if probabilities.ndim == 3 else probabilities[None]
    return mean_of_defined([bootstrap_part(labels, part, weights) for part in parts])


def bootstrap_part(labels, probabilities, weights):
    tested = np.flatnonzero(~np.isnan(probabilities[:, 0]))
    labels, probabilities, weights = labels[tested], probabilities[tested], weights[tested]
    starts = range(0, weights.shape[1], PORTION)
    portions = [weights[:, start : start + PORTION] for start in starts]
    return np.concatenate([weighted_auc(labels, probabilities, portion) for portion in portions])


def image_covariance(rows):
    """Covariance, over samples of the test images, between the mean AUCs of rows: [rows, rows].

    rows: for each one the bootstrap of its runs, [runs, draws]. What the images do to one run alone
    is left out where a row has several: it is part of the spread between runs already, and would
    count twice (so do Obuchowski and Rockette 1995, whose readers are our runs).
    """
    defined = ~np.isnan(np.concatenate(rows)).any(axis=0)  # samples that hold both classes
    rows = [draws[:, defined] for draws in rows]
    means = np.array([draws.mean(axis=0) for draws in rows])
    covariance = np.cov(means, ddof=1).reshape(len(rows), len(rows))
    for i, draws in enumerate(rows):
        runs = len(draws)
        if runs > 1:
            by_run = (draws - means[i]).var(axis=1, ddof=1).sum() / (runs - 1)
            covariance[i, i] -= by_run / runs
    return covariance


def variance_between_runs(rows):
    """Variance between the runs of a row, pooled over the rows with at least 2 runs.

    rows: the AUCs of each row's runs, [runs]. (variance, degrees of freedom), 0 without such a row.
    The rows are taken to vary alike. If two of many rows have twice the SD of the others, 26 % of
    true nulls between them are below 0.05 in a simulation: see own_variance.
    """
    repeated = [aucs for aucs in rows if len(aucs) > 1]
    freedom = sum(len(aucs) - 1 for aucs in repeated)
    squares = sum((len(aucs) - 1) * np.var(aucs, ddof=1) for aucs in repeated)
    return squares / max(freedom, 1), freedom


def own_variance(pair):
    """In place of variance_between_runs, for the difference of two rows: theirs alone (Welch 1947).

    pair: the AUCs of the runs of each, 2 or more. (variance, degrees of freedom), such that the
    error and freedom of `estimate` are those of Welch's t test where there is no image part.
    """
    parts = [np.var(aucs, ddof=1) / len(aucs) for aucs in pair]
    variance = sum(parts) / sum(1 / len(aucs) for aucs in pair)
    if variance == 0:
        return 0.0, 1
    squares = sum(part**2 / (len(aucs) - 1) for part, aucs in zip(parts, pair))
    return variance, sum(parts) ** 2 / squares


def estimate(rows, weights, covariance, between_runs, groups):
    """A weighted sum of the mean AUCs of rows, with all that can be said about it.

    rows: the AUCs of the runs of each, [runs]. weights: [1] for a row itself, [1, -1] for the
    difference of two. covariance: image_covariance of these rows. between_runs:
    variance_between_runs of the table. groups: independent groups of images.

    A t interval over runs with the images added: variance = s2 (1 / k0 + 1 / k1) + that of the
    images, for a difference; degrees of freedom after Satterthwaite 1946, where the image part has
    groups - 1. With one run in any row nothing is known about the runs: the interval covers images
    only, no p.

    {"value", "runs": the fewest of a row, "error": standard error, "freedom", "interval" (95 %),
    "interval_90" (for equivalence: two one-sided tests at 5 %), "p" or None,
    "detectable": the true difference that is found with 80 % power at p < 0.05, or None}
    """
    weights = np.array(weights, float)
    value = float(sum(weight * np.mean(aucs) for weight, aucs in zip(weights, rows)))
    image_part = max(float(weights @ covariance @ weights), 0.0)
    runs = min(len(aucs) for aucs in rows)
    run_part, run_freedom = 0.0, 1
    if runs > 1:
        variance, run_freedom = between_runs
        run_part = variance * sum(w**2 / len(aucs) for w, aucs in zip(weights, rows))
    error = (run_part + image_part) ** 0.5
    freedom = max(groups - 1, 1)
    if run_part > 0:
        freedom = error**4 / (run_part**2 / run_freedom + image_part**2 / freedom)
    half, half_90, power = error * stats.t.ppf([0.975, 0.95, 0.8], freedom)
    lowest, highest = weights.clip(max=0).sum(), weights.clip(min=0).sum()  # AUCs of 0 and 1
    found = {
        "value": value,
        "runs": runs,
        "error": error,
        "freedom": freedom,
        "interval": (max(value - half, lowest), min(value + half, highest)),
        "interval_90": (max(value - half_90, lowest), min(value + half_90, highest)),
        "p": None,
        "detectable": None,
    }
    if runs > 1:
        found["p"] = p_value(value, error, freedom)
        found["detectable"] = half + power
    return found


def p_value(difference, error, freedom):
    """Two-sided p of a t test; 1 for no difference at all."""
    if difference == 0 or error == 0:
        return float(difference == 0)
    return float(2 * stats.t.sf(abs(difference) / error, freedom))


def holm(p_values):
    """p-values corrected for their number (Holm 1979), dependent or not: [m] -> [m]."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(p_values[order] * factors).clip(max=1)
    return corrected
