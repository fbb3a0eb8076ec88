"""The tables, recomputed from the saved scores with scikit-learn and a plain loop."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from common import tables as tables_module
from common.auc import bootstrap, sample_weights
from common.results import COLUMNS, read_results, scores_folder, write_line
from common.tables import tables, task_statistics

ROWS = {  # name: slices, steps, dose, how well its scores tell the classes
    "scratch": ("", "", "", 0.3),
    "ALL": (1000, 500, 1.7, 0.6),
    "Hash-6": (200, 100, 0.0, 0.9),
    "Random": (201, 101, 1.6, 0.6),
    "Hash-6-steps": (199, 504, 0.0, 0.6),
    "Hash-3": (210, 520, 0.5, 0.6),
    "imagenet": ("", "", "", 0.8),
}
LABELS = np.r_[np.zeros(50, int), np.ones(30, int)]
GROUPS = np.r_[np.arange(50), 50 + np.arange(30) // 2]  # the positives come in pairs


def make(results, task, protocol, share="1", folds="", rows=ROWS, runs=3):
    """Lines of a task, one a run (imagenet: 2 of one run). {(name, seed): scores of class 1}."""
    rng = np.random.default_rng(0)
    made = {}
    for name in rows:
        slices, steps, dose, signal = ROWS[name]
        for seed in range(2 if name == "imagenet" else runs):
            p = rng.random(80) + signal * LABELS
            p = np.round(p / p.max(), 2).astype(np.float32)
            made[name, seed] = p
            encoder = name if name in ("scratch", "imagenet") else f"{name}-{seed}"
            line = dict.fromkeys(COLUMNS, "1") | {
                "task": task,
                "name": name,
                "encoder": encoder,
                "protocol": protocol,
                "seed": seed,
                "label_share": share,
                "folds": folds,
                "test": 80,
                "slices": slices,
                "steps": steps,
                "dose": dose,
                "pretrain_seconds": steps,
                "settings": f"{protocol} as set",
                "auc": f"{roc_auc_score(LABELS, p):.5f}",
            }
            write_line(results, line, np.arange(80), LABELS, GROUPS, np.stack([1 - p, p], 1))
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A results.csv with two variants: (its path, the scores of the first)."""
    results = tmp_path_factory.mktemp("tables") / "results.csv"
    scores = make(results, "covid-ct", "linear")
    make(results, "organ", "linear", "0.01", "5x10", ["scratch", "ALL"], runs=2)
    return results, scores


def section(text, title):
    """{row: its cells} of the table under a heading that starts so."""
    parts = text.split(f"# {title}\n\n")[1].split("\n\n")
    table = next(part for part in parts if part.startswith("| row"))
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines if line[0] != "---"}


def plain_draws(p):
    """AUC of resampled test sets, one after the other."""
    found = []
    for counts in sample_weights(LABELS, GROUPS).T.astype(int):
        rows = np.repeat(np.arange(80), counts)
        above, below = p[rows[LABELS[rows] == 1]][:, None], p[rows[LABELS[rows] == 0]]
        found.append(((above > below) + 0.5 * (above == below)).mean())
    return np.array(found)


def plain_estimate(scores, names, seeds=range(3)):
    """(value, half the interval, p) of a row or of a difference, statement by statement."""
    runs = {name: np.array([plain_draws(scores[name, seed]) for seed in seeds]) for name in names}
    aucs = {name: [roc_auc_score(LABELS, scores[name, s]) for s in seeds] for name in names}
    pooled = []
    for name in ROWS:
        if name != "imagenet":
            pooled.append(np.var([roc_auc_score(LABELS, scores[name, s]) for s in seeds], ddof=1))
    run_part = np.mean(pooled) * len(names) / 3
    value = np.mean(aucs[names[0]])
    draws = runs[names[0]].mean(0)
    if len(names) == 2:
        value -= np.mean(aucs[names[1]])
        draws = draws - runs[names[1]].mean(0)
    image_part = draws.var(ddof=1)
    for name in names:  # the part of a run's images is in the run part already
        image_part -= np.cov(runs[name] - runs[name].mean(0)).trace() / 2 / 3
    error = (run_part + image_part) ** 0.5
    freedom = error**4 / (run_part**2 / (2 * len(pooled)) + image_part**2 / 64)
    return value, stats.t.ppf(0.975, freedom) * error, 2 * stats.t.sf(abs(value) / error, freedom)


def test_auc_and_its_interval_are_those_of_a_plain_loop(made):
    results, scores = made
    found = section(tables(results), "linear")
    for name in ("ALL", "scratch"):
        aucs = [roc_auc_score(LABELS, scores[name, seed]) for seed in range(3)]
        value, half, _ = plain_estimate(scores, [name])
        expected = f"{value:.3f} ± {np.std(aucs, ddof=1):.3f} "
        assert found[name][-1] == expected + f"[{value - half:.3f}, {value + half:.3f}]"
    assert found["Hash-6"][-1].endswith(", 1.000]")  # where it would reach beyond


def test_differences_are_those_of_a_plain_loop(made):
    results, scores = made
    text = tables(results)
    found = section(text, "linear: difference to ALL")
    for name in ("scratch", "Hash-6", "Hash-3"):
        value, half, p = plain_estimate(scores, [name, "ALL"])
        p = "p<0.001" if p < 0.001 else f"p={p:.3f}"
        expected = f"{value:+.3f} [{value - half:+.3f}, {value + half:+.3f}] {p}, Holm p"
        assert found[name][0].startswith(expected)
    assert "Holm" in found["scratch"][0] and "(may be chance)" in found["Random"][0]
    assert "(may be chance)" not in found["Hash-6"][0]
    assert "for which Holm corrects: 5." in text  # imagenet has no p
    other = section(tables(results, "random"), "linear: difference to Random")
    value, half, _ = plain_estimate(scores, ["ALL", "Random"])
    assert other["ALL"][0].startswith(f"{value:+.3f} [{value - half:+.3f}, {value + half:+.3f}]")
    with pytest.raises(SystemExit, match="no row Nothing"):
        tables(results, "Nothing")


def test_one_run_has_no_p_and_no_spread(made):
    """Two lines of one encoder are one run: their SD says nothing about pre-training."""
    text = tables(made[0])
    row, difference = (
        section(text, f"linear{end}")["imagenet"][-1] for end in ("", ": difference to ALL")
    )
    assert "±" not in row and row.endswith("] images only")
    assert (
        difference.endswith("] images only, p needs 2 runs of both rows")
        and "Holm" not in difference
    )


def test_the_power_sentence_says_what_80_percent_power_needs(made):
    results, scores = made
    needed = []
    for name in ROWS:
        if name not in ("ALL", "imagenet"):
            value, half, _ = plain_estimate(scores, [name, "ALL"])
            needed.append(half)
    sentence = tables(results).split("covid-ct: ")[1].split("\n")[0]
    shown = float(sentence.split("true difference of ")[1].split()[0])
    # 80 % power asks for t(0.975) + t(0.8) standard errors, about 1.42 times half the interval
    assert shown == pytest.approx(1.42 * np.median(needed), rel=0.02)


def test_rows_within_1_percent_of_a_budget_or_of_the_steps_are_marked(made):
    found = section(tables(made[0]), "linear")
    assert {name: cells[2] for name, cells in found.items() if name != "row"} == {
        "scratch": "-",
        "ALL": "ALL's steps",
        "Hash-6": "Hash-6's slices",
        "Random": "Hash-6's slices",
        "Hash-6-steps": "Hash-6's slices, ALL's steps",
        "Hash-3": "-",
        "imagenet": "-",
    }
    assert found["Random"][:6] == ["201", "101", "Hash-6's slices", "1.60", "101 s", "5.0 x"]


def test_each_variant_has_its_tables_and_its_caveat_first(made):
    text = tables(made[0])
    title = "linear, 1 % of the training labels, 5 folds x 10 repeats"
    found = section(text, title)
    assert list(found) == ["row", "scratch", "ALL"]
    assert (
        found["row"][-1].startswith("organ (n=80, 65 groups") and "too narrow" in found["row"][-1]
    )
    part = text.split(f"## {title}\n")[1]
    assert part.index("no new data") < part.index("| row")
    assert "too narrow" in section(text, f"{title}: difference to ALL")["row"][0]
    assert "unconfirmed" in text and "| Hash-6 | 0.830 |" in text


def test_tables_without_the_scores(tmp_path):
    """The image part is kept; a changed line makes it anew; without either, the tables say so."""
    results = tmp_path / "results.csv"
    make(results, "covid-ct", "linear", rows=["ALL", "Hash-6"])
    text = tables(results)
    scores_folder(results).rename(tmp_path / "elsewhere")
    assert tables(results) == text
    results.write_text(results.read_text().replace("ALL-0", "ALL-9"))
    runs_only = tables(results)
    assert "no test scores" in runs_only and "no test scores" not in text
    assert runs_only.index("no test scores") < runs_only.index("| row")
    (tmp_path / "elsewhere").rename(scores_folder(results))
    assert tables(results) == text
    (scores_folder(results) / "covid-ct-ALL-linear-0.npz").unlink()
    assert tables(results) == text  # the image part of these lines is known
    results.write_text(results.read_text().replace("ALL-9", "ALL-8"))
    with pytest.raises(SystemExit, match="missing or damaged"):
        tables(results)
    results.with_name("results-draws.jsonl").write_text("{")
    with pytest.raises(SystemExit, match="results-draws.jsonl: damaged"):
        tables(results)


def test_samples_that_miss_a_class_do_not_count(tmp_path):
    """Both positives lie in groups of negatives, so that a sample may hold none."""
    results = tmp_path / "results.csv"
    labels = np.array([0, 0, 1, 0, 0, 1, 0, 0, 0, 0])
    groups = np.array([0, 0, 0, 1, 1, 1, 2, 3, 4, 5])
    p = np.random.default_rng(0).random((10, 2)).astype(np.float32)
    line = dict.fromkeys(COLUMNS, "1") | {"task": "covid-ct", "name": "ALL"}
    write_line(results, line, np.arange(10), labels, groups, p)
    draws = bootstrap(labels, p, sample_weights(labels, groups))
    assert np.isnan(draws).any()
    for _ in ("from the scores", "from results-draws.jsonl"):
        found = task_statistics(results, read_results(results), "covid-ct")
        assert found["covariance"][0, 0] == pytest.approx(np.nanvar(draws, ddof=1), rel=1e-3)


def test_rows_of_other_settings_are_not_compared(tmp_path):
    results = tmp_path / "results.csv"
    make(results, "covid-ct", "linear", rows=["ALL", "Hash-6"])
    results.write_text(results.read_text().replace("as set", "size=32", 1))
    with pytest.raises(SystemExit, match="ALL and ALL cannot be compared: linear size=32 is not"):
        tables(results)


def test_rows_tested_on_other_images_are_refused(tmp_path):
    results = tmp_path / "results.csv"
    made = make(results, "covid-ct", "linear", rows=["ALL", "Hash-6"])
    line = read_results(results)[-1]
    p = made["Hash-6", 2]
    write_line(results, line, np.arange(80) + 1, LABELS, GROUPS, np.stack([1 - p, p], 1))
    with pytest.raises(SystemExit, match="Hash-6 seed 2 was not tested on the images of ALL"):
        tables(results)


def test_draws_that_another_table_adds_meanwhile_are_kept(tmp_path, monkeypatch):
    results = tmp_path / "results.csv"
    make(results, "covid-ct", "linear", rows=["scratch", "ALL"])
    kept = tmp_path / "results-draws.jsonl"
    make_record = tables_module.make_record

    def make_another(results, line):
        kept.write_text('{"line": "of another table"}\n')
        return make_record(results, line)

    monkeypatch.setattr(tables_module, "make_record", make_another)
    tables(results)
    assert len(kept.read_text().splitlines()) == 1 + 6 and "of another table" in kept.read_text()
