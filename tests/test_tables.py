"""The tables, recomputed from the saved scores with scikit-learn and a plain loop."""

import zlib

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from common.tables import COLUMNS, tables
from evaluate import write_row

ROWS = {  # name: slices, steps, how well its scores tell the classes
    "scratch": ("", "", 0.3),
    "ALL": (100, 50, 0.6),
    "Hash-6": (20, 10, 0.9),
    "Random": (20, 10, 0.6),
    "Hash-6-steps": (20, 50, 0.6),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A results.csv of 5 rows with 2 seeds each on 80 test images: (its path, labels, {(name, seed): probabilities})."""
    results = tmp_path_factory.mktemp("tables") / "results.csv"
    rng = np.random.default_rng(0)
    labels, found = np.r_[np.zeros(50, int), np.ones(30, int)], {}
    for name, (slices, steps, signal) in ROWS.items():
        for seed in range(2):
            p = rng.random(80) + signal * labels
            p = (np.round(p / p.max(), 2)).astype(np.float32)
            found[name, seed] = p
            row = dict.fromkeys(COLUMNS, "1") | {
                "task": "covid-ct",
                "name": name,
                "protocol": "linear",
                "seed": seed,
                "test": 80,
                "encoder": f"{name}-{seed}" if "steps" in name else name,
                "slices": slices,
                "steps": steps,
            }
            row["auc"] = roc_auc_score(labels, p)
            write_row(results, row, np.arange(80), labels, np.stack([1 - p, p], 1))
    return results, labels, found


def plain_draws(p):
    """AUC of 2,000 resampled test sets, one after the other; each class is drawn anew with replacement."""
    rng = np.random.default_rng(zlib.crc32(np.arange(80).tobytes()))
    found = []
    for _ in range(10):
        counts = np.hstack([rng.multinomial(n, np.full(n, 1 / n), 200) for n in (50, 30)])
        for c in counts:
            up, down = np.repeat(p[50:], c[50:])[:, None], np.repeat(p[:50], c[:50])
            found.append(
                ((up > down) + 0.5 * (up == down)).mean()
            )  # the share of pairs in the right order
    return np.array(found)


def test_auc_interval_difference_and_p_are_those_of_a_plain_loop(made):
    results, labels, scores = made
    text = tables(results)
    draws = {
        name: np.mean([plain_draws(scores[name, seed]) for seed in range(2)], 0)
        for name in ("ALL", "Hash-6")
    }
    aucs = [roc_auc_score(labels, scores["Hash-6", seed]) for seed in range(2)]
    low, high = np.percentile(draws["Hash-6"], [2.5, 97.5])
    assert f"{np.mean(aucs):.3f} ± {np.std(aucs, ddof=1):.3f} [{low:.3f}, {high:.3f}]" in text
    differences = np.array([a - b for a, b in zip(draws["Hash-6"], draws["ALL"])])
    low, high = np.percentile(differences, [2.5, 97.5])
    p = max(2 * min((differences <= 0).mean(), (differences >= 0).mean()), 1 / 2000)
    assert (
        f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}] p{'<0.001' if p < 0.001 else f'={p:.3f}'}"
        in text
    )


def test_differences_cover_images_and_pretraining_runs(made):
    """Hash-6-steps has a pre-training run for each seed: its difference to another baseline draws runs and images anew."""
    results, _, scores = made
    runs = [
        plain_draws(scores["Hash-6-steps", seed]) - plain_draws(scores["Random", seed])
        for seed in range(2)
    ]
    drawn = np.random.default_rng(0).integers(2, size=(2, 2000))
    differences = np.array([(runs[a][i] + runs[b][i]) / 2 for i, (a, b) in enumerate(drawn.T)])
    low, high = np.percentile(differences, [2.5, 97.5])
    assert (
        f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        in tables(results, "Random").split("### Difference to Random")[1]
    )
    with pytest.raises(SystemExit):
        tables(results, "Nothing")


def section(text, title):
    """Row names of the table under a heading that starts so."""
    table = text.split(title)[1].split("\n\n")[1]
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]


def test_equal_budgets_and_equal_steps_have_tables_of_their_own(made):
    text = tables(made[0])
    assert section(text, "## linear: AUC") == list(ROWS)
    assert section(text, "as many slices as Hash-6: 20") == ["Hash-6", "Random", "Hash-6-steps"]
    assert "over the 4 differences of this table" in text
    assert section(text, "as many optimiser steps as ALL: 50") == ["ALL", "Hash-6-steps"]
    assert (
        "on 80 test images, two rows whose AUC differs by less than about 0.0" in text
        and "(may be chance)" in text
    )
