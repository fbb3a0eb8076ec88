"""AUC, its confidence interval and paired differences by bootstrap over the test images. Knows no images, no torch."""

import zlib

import numpy as np
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
    order = np.argsort(scores, kind="stable")
    scores, positive, weights = scores[order], positive[order], weights[:, order]
    ties = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])  # where each run of equal scores starts
    up = np.add.reduceat(weights * positive, ties, axis=1)
    down = np.add.reduceat(weights * ~positive, ties, axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    return (up * below).sum(1) / (up.sum(1) * down.sum(1))


def bootstrap(labels, probabilities, images, draws=DRAWS):
    """AUC of `draws` stratified bootstrap samples of the test images, [draws].

    images: the images' numbers. The same images give the same samples whatever the scores, so that the draws of two
    encoders are paired.
    """
    rng = np.random.default_rng(zlib.crc32(np.asarray(images, np.int64).tobytes()))
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    found = []
    for start in range(0, draws, 200):  # in portions, for memory
        weights = np.zeros((min(200, draws - start), len(labels)), np.float32)
        for rows in members:
            weights[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), len(weights))
        found.append(weighted_auc(labels, probabilities, weights))
    return np.concatenate(found)


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
    corrected[order] = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)).clip(max=1)
    return corrected
