"""results.csv, and its tables recomputed from the scores with scikit-learn and a plain loop."""

import json
from multiprocessing import Pool

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from common import auc
from common.auc import bootstrap, holm, sample_weights
from common.tables import (
    COLUMNS,
    add_line,
    identity,
    made_by,
    p_text,
    read_draws,
    read_results,
    read_tables,
    tables,
    title,
)

ROWS = {  # name: slices, steps, dose, how well its scores tell the classes
    "scratch": ("", "", "", 0.3),
    "ALL": (1000, 500, 1.7, 0.6),
    "Hash-6": (200, 100, 0.0, 0.9),
    "Random": (201, 101, 1.6, 0.6),
    "Hash-3": (210, 520, 0.5, 0.6),
    "imagenet": ("", "", "", 0.8),
}
LABELS = np.r_[np.zeros(50, int), np.ones(30, int)]
GROUPS = np.r_[np.arange(50), 50 + np.arange(30) // 2]  # the positives come in pairs


def line_of(task="covid-ct", name="ALL", seed=0, auc=0.8, **cells):
    slices, steps, dose, _ = ROWS[name]
    encoder = name if name in ("scratch", "imagenet") else f"{name}-{seed}"
    line = dict.fromkeys(COLUMNS, "1") | {"task": task, "name": name, "encoder": encoder}
    line |= {"protocol": "linear", "seed": seed, "folds": "", "test": 80, "auc": f"{auc:.5f}"}
    line |= {"slices": slices, "steps": steps, "dose": dose, "pretrain_seconds": steps}
    return line | {"settings": "size=64 c=0.01", "code": "evaluate.py=12 common/auc.py=34"} | cells


def add(results, line, p):
    """Add a line whose test images have scores p of class 1."""
    add_line(results, line, np.arange(80), LABELS, GROUPS, np.stack([1 - p, p], 1))


def make(results, task, rows=ROWS, runs=3, **cells):
    """Lines of a task, one a run (imagenet: 2 of one run). {(name, seed): scores of class 1}."""
    rng = np.random.default_rng(0)
    made = {}
    for name in rows:
        for seed in range(2 if name == "imagenet" else runs):
            p = rng.random(80) + ROWS[name][-1] * LABELS
            made[name, seed] = p = np.round(p / p.max(), 2).astype(np.float32)
            add(results, line_of(task, name, seed, roc_auc_score(LABELS, p), **cells), p)
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A results.csv with two tables: (its path, the scores of the first)."""
    results = tmp_path_factory.mktemp("tables") / "results.csv"
    scores = make(results, "covid-ct")
    make(results, "images", ["scratch", "Hash-6"], 2, label_share="0.01", folds="5x10")
    return results, scores


def covid_ct(results):
    return read_tables(results)["covid-ct", "linear", "1", ""]


def cells_of(text, title):
    """{row: {column: cell}} of the table under a heading."""
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if "|" in line]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def plain_draws(p):
    """AUC of resampled test sets, one after the other."""
    aucs = []
    for counts in sample_weights(LABELS, GROUPS).T.astype(int):
        images = np.repeat(np.arange(80), counts)
        above, below = p[images[LABELS[images] == 1]][:, None], p[images[LABELS[images] == 0]]
        aucs.append(((above > below) + 0.5 * (above == below)).mean())
    return np.array(aucs)


@pytest.fixture(scope="module")
def plain(made):
    """plain(row, another or none): the t distribution of the row or difference, plainly."""
    scores = {key: p for key, p in made[1].items() if key[0] != "imagenet"}
    names = list(dict.fromkeys(name for name, _ in scores))
    draws = {n: np.array([plain_draws(scores[n, seed]) for seed in range(3)]) for n in names}
    aucs = {n: [roc_auc_score(LABELS, scores[n, seed]) for seed in range(3)] for n in names}
    between = np.mean([np.var(aucs[name], ddof=1) for name in names])

    def call(*rows):
        signs = dict(zip(rows, (1, -1), strict=False))
        image_part = sum(signs[row] * draws[row].mean(0) for row in rows).var(ddof=1)
        for row in rows:  # the part of a run's images is in the part of runs already
            image_part -= np.cov(draws[row] - draws[row].mean(0)).trace() / 2 / 3
        run_part, image_part = between * len(rows) / 3, max(image_part, 0)
        error = (run_part + image_part) ** 0.5
        freedom = error**4 / (run_part**2 / (2 * len(names)) + image_part**2 / 64)
        return stats.t(freedom, sum(signs[row] * np.mean(aucs[row]) for row in rows), error)

    return call


def shown(estimate):
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(estimate.mean(), *estimate.interval(0.95))


def test_every_number_of_a_table_is_that_of_a_plain_loop(made, plain):
    results, scores = made
    text = tables(results)
    found = cells_of(text, "covid-ct, linear")
    assert list(found) == list(ROWS)
    others = ("scratch", "Hash-6", "Random", "Hash-3")  # imagenet has no p
    for name in (*others, "ALL"):
        cells, estimate = found[name], plain(name)
        sd = np.std([roc_auc_score(LABELS, scores[name, seed]) for seed in range(3)], ddof=1)
        low, high = estimate.interval(0.95)
        interval = f"[{low:.3f}, {min(high, 1):.3f}]"
        assert cells["AUC (n=80, 65 groups)"] == f"{estimate.mean():.3f} ± {sd:.3f} {interval}"
        slices, steps, dose, _ = ROWS[name]
        cost = [f"{slices}", f"{steps}", f"{dose:.2f}", f"{steps}"] if slices else ["-"] * 4
        assert [cells[key] for key in ("slices", "steps", "dose", "pretrain_seconds")] == cost
        assert cells["runs"] == "3"
    differences = [plain(name, "ALL") for name in others]
    p_values = [2 * min(one.cdf(0), one.sf(0)) for one in differences]
    for name, one, p, corrected in zip(others, differences, p_values, holm(p_values), strict=True):
        cells = [found[name][key] for key in ("difference to ALL", "p", "Holm")]
        assert cells == [shown(one), p_text(p), p_text(corrected)]
    assert [p_text(p) for p in (0.0004, 0.0306)] == ["<0.001", "0.031"]
    assert [found["ALL"][key] for key in ("difference to ALL", "p", "Holm")] == ["-"] * 3
    # 80 % power asks for t(0.975) + t(0.8) standard errors, about 1.42 times half the interval
    half = np.median([one.ppf(0.975) - one.mean() for one in differences])
    detectable = float(text.split("true difference of ")[1].split(",")[0])
    assert detectable == pytest.approx(1.42 * half, rel=0.02)


def test_another_baseline_and_none(made, plain):
    found = cells_of(tables(made[0], "Random"), "covid-ct, linear")
    assert found["ALL"]["difference to Random"] == shown(plain("ALL", "Random"))
    heading = "images, linear, 1 % of the training labels, 5 folds x 10 repeats"
    found = cells_of(tables(made[0]), heading)
    assert list(found) == ["scratch", "Hash-6"] and "Holm" not in found["Hash-6"]
    assert title(("organ", "linear", "0.001", "")).endswith(", 0.1 % of the training labels")
    assert tables(made[0]).count(": the paper's numbers") == 1, "of its own tasks alone"


def test_two_lines_of_one_encoder_are_one_run(made):
    """Their SD says nothing about pre-training."""
    imagenet = cells_of(tables(made[0]), "covid-ct, linear")["imagenet"]
    assert imagenet["runs"] == "1" and "±" not in imagenet["AUC (n=80, 65 groups)"]
    assert imagenet["difference to ALL"].endswith("] images only")
    assert imagenet["p"] == imagenet["Holm"] == "-"
    # their image part is that of the mean of both
    draws = np.mean([plain_draws(made[1]["imagenet", seed]) for seed in (0, 1)], axis=0)
    assert covid_ct(made[0]).covariance[-1, -1] == pytest.approx(draws.var(ddof=1), rel=1e-3)


def test_a_run_counts_once_however_many_lines_it_has(tmp_path):
    """As in fine-tuning, where encoders take turns over the seeds: two lines of A, one of B."""
    results = tmp_path / "results.csv"
    for seed, (encoder, value) in enumerate([("A", 0.7), ("B", 0.9), ("A", 0.8)]):
        seconds = {"A": 100, "B": 400}[encoder]
        line = line_of(seed=seed, auc=value, encoder=encoder, pretrain_seconds=seconds)
        add(results, line, np.full(80, 0.5))
    table = covid_ct(results)
    assert table.aucs["ALL"] == pytest.approx([0.75, 0.9])
    assert table.cost("ALL")["pretrain_seconds"] == 250 and table.cost("scratch") == {}


def test_the_last_line_of_a_key_counts_also_for_its_bootstrap(tmp_path):
    results = tmp_path / "results.csv"
    make(results, "covid-ct", ["ALL", "Hash-6"])
    before = tables(results)
    add(results, line_of(auc=0.0), 1.0 - LABELS)
    assert len(read_results(results)) == 6 and len(results.read_text().splitlines()) == 1 + 7
    table = covid_ct(results)
    assert 0.0 in table.aucs["ALL"] and list(table.aucs) == ["ALL", "Hash-6"]
    add(results, line := line_of(auc=0.0), LABELS.astype(float))  # as after an edit of the code
    assert (read_draws(results)[identity(line)]["draws"] == 1).all()
    make(results, "covid-ct", ["ALL"])
    assert tables(results) == before
    for cells in ({}, {"folds": "5x2"}, {"label_share": "0.1"}, {"protocol": "finetune"}):
        make(tmp_path / "more.csv", "covid-ct", ["ALL"], 1, **cells)
    make(tmp_path / "more.csv", "organ", ["ALL", "Hash-6"], 2)
    assert len(read_results(tmp_path / "more.csv")) == 4 + 4  # none replaces another
    with open(results, "a") as file:
        file.write("covid-ct,ALL,of a killed run")  # no end of line
    assert tables(results) == before
    with open(results, "a") as file:
        file.write("\n")
    with pytest.raises(SystemExit, match="results.csv: damaged"):
        tables(results)


def test_without_the_draws_of_a_line_intervals_cover_runs_only(tmp_path):
    results = tmp_path / "results.csv"
    make(results, "covid-ct", ["ALL", "Hash-6"])
    assert "cover runs only" not in tables(results)
    whole, auc_of_first = results.read_text(), read_results(results)[0]["auc"]
    results.write_text(whole.replace(auc_of_first, "0.12345"))  # of another evaluation
    assert "cover runs only" in tables(results)
    results.write_text(whole.replace("ALL-0", "ALL-9"))  # of another encoder
    assert "cover runs only" in tables(results)
    table = covid_ct(results)
    expected = stats.ttest_ind(table.aucs["Hash-6"], table.aucs["ALL"])
    assert table.estimate({"Hash-6": 1, "ALL": -1}).p == pytest.approx(expected.pvalue)


def test_samples_and_folds_that_miss_a_class_do_not_count(tmp_path):
    """Both positives lie in groups of negatives, so that a sample may hold none."""
    results = tmp_path / "results.csv"
    labels = np.array([0, 0, 1, 0, 0, 1, 0, 0, 0, 0])
    groups = np.array([0, 0, 0, 1, 1, 1, 2, 3, 4, 5])
    p = np.full((2, 10, 2), np.nan)
    p[0], p[1, 6:] = np.random.default_rng(0).random((10, 2)), 0.5  # no positive in the second
    add_line(results, line_of(), np.arange(10), labels, groups, p)
    draws = bootstrap(labels, p[0].astype(np.float32), sample_weights(labels, groups))
    assert np.isnan(draws).any()
    table = covid_ct(results)
    assert table.covariance[0, 0] == pytest.approx(np.nanvar(draws, ddof=1), rel=1e-3)
    record = json.loads(results.with_name("results-draws.jsonl").read_text())
    assert record["parts"] == [round(1e5 * roc_auc_score(labels, p[0, :, 1])), None]


def test_rows_of_other_settings_are_not_compared(tmp_path):
    """Among the settings is the digest of the task's images, labels and groups."""
    results = tmp_path / "results.csv"
    make(results, "covid-ct", ["ALL", "Hash-6"])
    results.write_text(results.read_text().replace("size=64", "size=32", 1))
    why = "covid-ct, linear: cannot compare lines of size=32 c=0.01 and of size=64"
    with pytest.raises(SystemExit, match=why):
        tables(results)


def test_a_line_tells_what_made_it_and_keeps_its_scores(made):
    first = read_results(made[0])[0]
    assert made_by(first) == {
        "settings": {"size": "64", "c": "0.01"},
        "code": {"evaluate.py": "12", "common/auc.py": "34"},
    }
    # a line of an older version names no files, and must not pass for one of today's
    assert made_by(first | {"code": "4de3c762"})["code"] == {"4de3c762": ""}
    scores = np.load(made[0].with_name("results-scores") / "covid-ct-Hash-6-linear-2.npz")
    assert np.array_equal(scores["probabilities"][:, 1], made[1]["Hash-6", 2])
    assert np.array_equal(scores["labels"], LABELS) and scores["images"].size == 80


def test_what_fails_leaves_no_line(tmp_path, monkeypatch):
    """Scores, then draws, then the line: a line has all that its table needs."""
    results = tmp_path / "results.csv"
    monkeypatch.setattr(auc, "bootstrap", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(results, "covid-ct", ["ALL"])
    assert not results.exists()


def add_lines(results, name):
    for seed in range(8):
        add(results, line_of(name=name, seed=seed), np.full(80, 0.5))


def test_processes_that_add_lines_at_a_time_lose_none(tmp_path):
    with Pool(2) as pool:
        pool.starmap(add_lines, [(tmp_path / "results.csv", name) for name in ("ALL", "Hash-6")])
    table = covid_ct(tmp_path / "results.csv")
    assert [len(table.aucs[name]) for name in ("ALL", "Hash-6")] == [8, 8] and table.groups == 65
