"""AUC, its confidence interval and paired differences by bootstrap over the test images. Knows no images, no torch."""

import zlib
from functools import lru_cache

import numpy as np
from scipy.sparse import csr_array  # comes with scikit-learn
from sklearn.metrics import accuracy_score, f1_score

DRAWS = 2000


def metrics(labels, probabilities):
    """{"auc", "f1", "accuracy"} of int [n] and float [n, classes].

    AUC: of class 1, or the macro mean over one-vs-rest for more than two classes; F1: of class 1, or macro.
    """
    predicted = probabilities.argmax(1)
    average = "binary" if probabilities.shape[1] == 2 else "macro"
    return {
        "auc": float(weighted_auc(labels, probabilities, np.ones((1, len(labels))))[0]),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0)),
        "accuracy": float(accuracy_score(labels, predicted)),
    }


def weighted_auc(labels, probabilities, weights):
    """AUC under each of many weightings of the images: weights [draws, n] -> [draws]; macro one-vs-rest over classes."""
    classes = range(probabilities.shape[1]) if probabilities.shape[1] > 2 else [1]
    return np.mean([binary_auc(labels == c, probabilities[:, c], weights) for c in classes], axis=0)


def binary_auc(positive, scores, weights):
    """P(score of a positive > score of a negative), ties counting half: bool [n], [n], [draws, n] -> [draws]."""
    levels, level = np.unique(scores[positive], return_inverse=True)
    negatives = np.flatnonzero(~positive)
    halves = np.full(len(negatives), 0.5, np.result_type(weights, np.float32))
    beaten = 0  # weight of the negatives below each level of a positive, half of those at it: [levels, draws]
    for side in ("left", "right"):
        first = np.searchsorted(
            levels, scores[negatives], side
        )  # the first level that counts a negative
        sums = (
            csr_array((halves, (first, negatives)), shape=(len(levels) + 1, len(scores)))
            @ weights.T
        )
        beaten = beaten + np.cumsum(sums[:-1], axis=0)
    own = weights.T[positive]
    return (
        np.einsum("pd,pd->d", own, beaten[level], dtype=float)
        / own.sum(0, dtype=float)
        / weights.T[negatives].sum(0, dtype=float)
    )


def bootstrap(labels, probabilities, images, draws=DRAWS):
    """AUC of `draws` stratified bootstrap samples of the test images, [draws].

    images: the images' numbers. The same images give the same samples whatever the scores, so that the draws of two
    encoders are paired.
    """
    weights = sample_weights(
        np.asarray(labels, np.int64).tobytes(), np.asarray(images, np.int64).tobytes(), draws
    )
    portions = [weights[:, start : start + 200].T for start in range(0, draws, 200)]  # for memory
    return np.concatenate([weighted_auc(labels, probabilities, portion) for portion in portions])


@lru_cache(maxsize=8)  # most rows of a table are tested on the same images
def sample_weights(labels, images, draws):
    """How often each stratified sample holds each image: float32 [n, draws], from int64 labels and numbers as bytes."""
    rng, labels = np.random.default_rng(zlib.crc32(images)), np.frombuffer(labels, np.int64)
    weights = np.zeros((len(labels), draws), np.float32)
    for start in range(0, draws, 200):
        size = min(200, draws - start)
        for rows in (np.flatnonzero(labels == label) for label in np.unique(labels)):
            weights[rows, start : start + size] = rng.multinomial(
                len(rows), np.full(len(rows), 1 / len(rows)), size
            ).T
    return weights


def interval(draws):
    """The 95 % percentile interval."""
    return np.percentile(draws, [2.5, 97.5])


def over_runs(draws):
    """Mean over pre-training runs, of runs drawn anew with replacement for each draw of the images: [runs, draws] -> [draws].

    So the interval covers the luck of both, images and pre-training (Beiden, Wagner and Campbell 2000 draw readers and
    cases like this). With k runs it shows (k - 1) / k of the variance between them: none of it where k is 1.
    """
    drawn = np.random.default_rng(0).integers(len(draws), size=draws.shape)
    return np.take_along_axis(draws, drawn, axis=0).mean(axis=0)


def p_value(differences):
    """Two-sided bootstrap p of a difference: twice the share of draws on the rarer side of 0, at least 1 / draws."""
    below, above = (differences <= 0).mean(), (differences >= 0).mean()
    return float(np.clip(2 * min(below, above), 1 / len(differences), 1))


def holm(p_values):
    """p-values corrected for their number (Holm 1979), which holds however they depend on each other: [m] -> [m]."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(
        p_values[order] * np.arange(len(p_values), 0, -1)
    ).clip(max=1)
    return corrected
