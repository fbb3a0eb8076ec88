"""The study's analysis against plain arithmetic on made-up AUCs, without scores: runs only."""

import csv
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats
from sklearn.metrics import roc_auc_score

from common import auc
from common.results import COLUMNS, read_scores, write_line
from common.study import EQUIVALENCE, OUTCOMES, PLANNED, PRIMARY, SECONDARY, SPLIT, study

MEANS = {"scratch": 0.86, "ALL-c32": 0.88, "ALL-c32-masked": 0.885, "Random-matched": 0.9}
HYPOTHESES = [("Hash-6", "ALL"), ("Hash-6", "Random-matched"), ("ALL-c32-masked", "ALL-c32")]


def made_up(spread=0.004, **means):
    """{row: AUC of each planned run of organ with 1 % of the labels}."""
    rng = np.random.default_rng(0)
    means = MEANS | {name.replace("_", "-"): mean for name, mean in means.items()}
    return {
        name: np.round(means.get(name, 0.91) + spread * rng.standard_normal(PLANNED[name]), 5)
        for name in PLANNED
    }


def write(path, aucs, outcomes=OUTCOMES):
    """results.csv with the lines of all outcomes: each column's AUCs are 0.01 below the last's."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for i, column in enumerate(outcomes):
            task, variant = OUTCOMES[column]
            for name in aucs:
                for seed, auc in enumerate(aucs[name]):
                    line = cost_of(name) | {"task": task, "name": name, "seed": seed}
                    line |= dict(zip(["protocol", "label_share", "folds"], variant))
                    encoder = name if name == "scratch" else f"{name}-{seed}"
                    line |= {"encoder": encoder, "test": 80, "auc": f"{auc - i / 100:.5f}"}
                    writer.writerow(line)
    return path


def cost_of(name):
    if name == "scratch":
        return {}
    reduced = name.startswith(("Hash", "Random"))
    steps = 700 * float(name.split("-steps-x")[1] if "-steps-x" in name else 1)
    return {
        "slices": 857 if reduced else 6075,
        "steps": round(steps),
        "dose": 0.4,
        "pretrain_seconds": steps * 0.6,
    }


def part(text, title):
    """What stands under a heading."""
    return text.split(f"\n## {title}")[1].split("\n## ")[0]


def table(text, title):
    """{first cell: the other cells} of the first table under a heading."""
    lines = part(text, title).split("\n\nLength that")[0].splitlines()
    lines = [line.strip("| ").split(" | ") for line in lines]
    return {line[0]: line[1:] for line in lines if len(line) > 2}


def plain(aucs, name, other):
    """(difference, half the 95 % interval, half the 90 % one, p) with the pooled variance."""
    freedom = sum(len(runs) - 1 for runs in aucs.values())
    squares = sum(((runs - runs.mean()) ** 2).sum() for runs in aucs.values())
    error = np.sqrt(squares / freedom * (1 / len(aucs[name]) + 1 / len(aucs[other])))
    value = aucs[name].mean() - aucs[other].mean()
    half, half_90 = error * stats.t.ppf([0.975, 0.95], freedom)
    return value, half, half_90, 2 * stats.t.sf(abs(value) / error, freedom)


def shown(aucs, name, other):
    value, half, *_ = plain(aucs, name, other)
    return f"{value:+.4f} [{value - half:+.4f}, {value + half:+.4f}]"


def p_shown(p):
    return "p<0.001" if p < 0.001 else f"p={p:.3f}"


def test_primary_differences_and_holm_are_plain_arithmetic(tmp_path):
    aucs = made_up(spread=0.006)
    text = study(write(tmp_path / "results.csv", aucs))
    assert (
        text.startswith("151 of 151 planned runs, with all evaluations.\n")
        and "draws of labels at" in text
    )
    assert text.index(f"{', '.join(OUTCOMES)}: no test scores") < text.index("| H1")
    found = table(text, "Primary")
    p = [plain(aucs, *pair)[3] for pair in HYPOTHESES]
    corrected = dict.fromkeys(range(3), 0.0)
    largest = 0
    for factor, i in zip((3, 2, 1), np.argsort(p)):
        largest = corrected[i] = max(largest, min(1, factor * p[i]))
    assert len(set(corrected.values())) == 3
    for i, (name, other) in enumerate(HYPOTHESES):
        welch = stats.ttest_ind(aucs[name], aucs[other], equal_var=False).pvalue
        freedom = sum(len(runs) - 1 for runs in aucs.values())
        half = plain(aucs, name, other)[1]
        detectable = half * (1 + stats.t.ppf(0.8, freedom) / stats.t.ppf(0.975, freedom))
        assert found[f"H{i + 1}"] == [
            f"{name} - {other}",
            f"{len(aucs[name])}, {len(aucs[other])}",
            shown(aucs, name, other),
            p_shown(p[i]),
            p_shown(corrected[i]),
            p_shown(welch),
            f"{detectable:.4f}",
            "-",  # no scores
        ]
    predicted = found["H3's gain at most, as the paper explains it"]
    assert predicted == ["ALL - ALL-c32", "12, 6", shown(aucs, "ALL", "ALL-c32"), *["-"] * 5]
    assert not re.search("p[=<]", text.replace(part(text, "Primary"), ""))  # no other p


def test_two_rows_that_vary_more_need_welch():
    """True nulls: H3's rows vary twice as much as the other rows, whose variance they are given."""
    rng = np.random.default_rng(0)
    pooled, own = [], []
    for _ in range(1000):
        sd = dict.fromkeys(PLANNED, 1) | {"ALL-c32": 2, "ALL-c32-masked": 2}
        rows = {name: sd[name] * rng.standard_normal(PLANNED[name]) for name in PLANNED}
        pair = rows["ALL-c32-masked"], rows["ALL-c32"]
        for found, between in (
            (pooled, auc.variance_between_runs(rows.values())),
            (own, auc.own_variance(pair)),
        ):
            found.append(auc.estimate(pair, [1, -1], np.zeros((2, 2)), between, 0)["p"] < 0.05)
    assert 0.22 <= np.mean(pooled) <= 0.30
    assert 0.03 <= np.mean(own) <= 0.07


def plain_equivalence(aucs, row):
    """The rule with the third taken as known, and the two t tests that count its error as well."""
    value, _, half_90, _ = plain(aucs, row, "ALL")
    margin = (aucs["ALL"].mean() - aucs["scratch"].mean()) / 3
    freedom = sum(len(runs) - 1 for runs in aucs.values())
    pooled = sum(((runs - runs.mean()) ** 2).sum() for runs in aucs.values()) / freedom
    claimed = abs(value) + half_90 < margin
    for sign in (1, -1):  # sign * (row - ALL) + (ALL - scratch) / 3 > 0
        parts = {row: sign, "ALL": 1 / 3 - sign, "scratch": -1 / 3}
        mean = sum(weight * aucs[name].mean() for name, weight in parts.items())
        error = (pooled * sum(w**2 / len(aucs[name]) for name, w in parts.items())) ** 0.5
        claimed = claimed and mean / error > stats.t.ppf(0.95, freedom)
    return claimed, margin, value, half_90


@pytest.mark.parametrize(
    "means, claimed",
    [
        ({}, True),
        ({"Hash_6": 0.918}, True),  # different, and equivalent all the same
        ({"Hash_6": 0.935}, False),  # better by more than the margin is not equivalent
        ({"Hash_6": 0.885}, False),
        ({"Hash_6": 0.9233}, False),  # within the margin, but not with the margin's error
    ],
)
def test_equivalence_is_claimed_within_a_third_of_the_gain(tmp_path, means, claimed):
    aucs = made_up(**means)
    whole = study(write(tmp_path / "results.csv", aucs))
    text = part(whole, "Equivalence")
    expected, margin, value, half_90 = plain_equivalence(aucs, "Hash-6")
    assert claimed == expected
    assert (abs(value) + half_90 < margin) == (means.get("Hash_6") not in (0.935, 0.885))
    assert ("**claimed**" in text, "**not claimed**" in text) == (claimed, not claimed)
    assert f"[{value - half_90:+.4f}, {value + half_90:+.4f}]" in text
    assert f"±{margin:.4f}, a third of ALL - scratch = {shown(aucs, 'ALL', 'scratch')}" in text
    assert ("they differ, but by less" in text) == (means.get("Hash_6") == 0.918)
    found = table(whole, "Equivalence")
    assert list(found)[2:] == EQUIVALENCE
    for row in EQUIVALENCE:
        claimed, _, value, half_90 = plain_equivalence(aucs, row)
        assert found[row][1] == f"[{value - half_90:+.4f}, {value + half_90:+.4f}]"
        assert found[row][2] == f"up to {(abs(value) + half_90) / margin / 3:.0%}"
        assert found[row][3] == ("yes" if claimed else "no")
    assert found["ALL-c32"][3] == "no"


def test_without_a_gain_nothing_is_equivalent(tmp_path):
    text = study(write(tmp_path / "results.csv", made_up(scratch=0.96)))
    assert "**not claimed**: pre-training may gain nothing here" in text
    assert not table(text, "Equivalence")


def test_secondary_differences_and_differences_of_differences(tmp_path):
    aucs = made_up()
    text = part(study(write(tmp_path / "results.csv", aucs)), "Secondary")
    lines = [line.strip("| ").split(" | ")[1:] for line in text.splitlines() if "|" in line][2:]
    of_all = [names for question in SECONDARY.values() for names in question]
    assert len(lines) == len(of_all)
    for line, names in zip(lines, of_all):
        if len(names) == 2:
            runs = ", ".join(str(len(aucs[name])) for name in names)
            assert line == [" - ".join(names), runs, shown(aucs, *names)]
    [line] = [line for line in lines if line[0].startswith("(")]
    assert line[0] == "(ALL-double - ALL-c32-double) - (ALL - ALL-c32)"
    a, b, c, d = (aucs[name] for name in ("ALL-double", "ALL-c32-double", "ALL", "ALL-c32"))
    value = a.mean() - b.mean() - (c.mean() - d.mean())
    _, half, *_ = plain(aucs, "ALL", "ALL-c32")
    half *= ((1 / 6 + 1 / 6 + 1 / 12 + 1 / 6) / (1 / 12 + 1 / 6)) ** 0.5
    assert line[2] == f"{value:+.4f} [{value - half:+.4f}, {value + half:+.4f}]"


def test_the_error_of_the_label_draws_is_that_of_differences_by_draw(tmp_path):
    """It is printed from results-draws.jsonl too, where the scores are gone."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    by_draw = {}
    for name in ("ALL", "Hash-6"):
        for seed in range(2):
            line = dict.fromkeys(COLUMNS, "1") | {"task": "organ", "name": name, "seed": seed}
            line |= {"encoder": f"{name}-{seed}", "label_share": "0.01", "folds": ""}
            line |= {"protocol": "linear", "auc": "0.8"}
            p = rng.random((10, 60, 2)).astype(np.float32)
            write_line(tmp_path / "results.csv", line, np.arange(60), labels, np.arange(60), p)
            read = read_scores(tmp_path / "results.csv", line)[3]
            aucs = [roc_auc_score(labels, part[:, 1]) for part in read]
            by_draw.setdefault(name, []).append(aucs)
    differences = np.mean(by_draw["Hash-6"], axis=0) - np.mean(by_draw["ALL"], axis=0)
    error = np.std(differences, ddof=1) / 10**0.5
    text = study(tmp_path / "results.csv")
    assert float(table(text, "Primary")["H1"][-1]) == pytest.approx(error, abs=1e-4)
    assert table(text, "Primary")["H2"][-1] == "-"
    shutil.rmtree(tmp_path / "results-scores")
    assert study(tmp_path / "results.csv") == text


def test_the_split_adds_up(tmp_path):
    aucs = made_up(ALL_masked=0.93, Clusters_6=0.9)
    found = table(study(write(tmp_path / "results.csv", aucs)), "Hash-6 - ALL, split")
    for name, pair in SPLIT.items():
        runs = ", ".join(str(len(aucs[row])) for row in pair)
        assert found[name] == [" - ".join(pair), runs, shown(aucs, *pair)]
    *parts, together = [float(found[name][-1].split()[0]) for name in SPLIT]
    assert sum(parts) == pytest.approx(together, abs=2e-4)  # as printed
    assert SPLIT["together"] == ("Hash-6", "ALL") and min(map(abs, parts)) > 0.005


def test_all_rows_and_what_they_cost(tmp_path):
    extra = {"Another": np.array([0.9, 0.92]), "EveryN": np.linspace(0.9, 0.92, 5)}
    aucs = made_up() | extra
    text = study(write(tmp_path / "results.csv", aucs))
    assert text.startswith("151 of 151")  # runs that were not planned do not count
    found = table(text, "All rows")
    assert list(found) == ["row", "---", *PLANNED, "Another"]
    assert found["scratch"][:3] == ["-", "-", "12 of 12"] and found["ALL"][-1] == "-"
    assert found["Hash-6"][:3] == ["857", "0.40", "8 of 8"]
    assert found["Another"][2] == "2, not planned" and found["EveryN"][2] == "5 of 3"
    for i in range(6):
        mean, sd = aucs["Hash-6"].mean() - i / 100, aucs["Hash-6"].std(ddof=1)
        assert found["Hash-6"][3 + i].startswith(f"{mean:.3f} ± {sd:.3f} [")
    assert found["Hash-6"][-1] == shown(aucs, "Hash-6", "ALL")


def test_length_counts_the_slices_that_steps_have_seen(tmp_path):
    aucs = made_up() | {name: np.array([0.9]) for name in ("ALL-double-steps-x2", "X-steps-x2")}
    found = table(study(write(tmp_path / "results.csv", aucs)), "Length")
    lengths = ["-steps-x0.146", "-steps-x0.5", "", "-steps-x3"]
    doubles = ["ALL-double", "ALL-double-steps-x2"]
    rows = [f"ALL{length}" for length in lengths[1:]]
    rows += [f"{row}{length}" for row in ("Hash-6", "Random-matched") for length in lengths]
    assert sorted(found) == sorted(["row", "---", *rows, *doubles])
    assert [row for row in found if row.startswith("Hash")] == [f"Hash-6{end}" for end in lengths]
    for row, batch_size in (("Hash-6", 128), ("ALL-steps-x3", 128), ("ALL-double", 256)):
        cost = cost_of(row)
        batches = np.array_split(np.arange(cost["slices"]), -(-cost["slices"] // batch_size))
        seen = cost["steps"] * np.mean([len(batch) for batch in batches])
        expected = [str(cost["steps"]), f"{seen / 1000:.1f}", f"{cost['steps'] / 100:.2f}"]
        assert found[row][:4] == [*expected, str(PLANNED[row])]
        assert found[row][4].startswith(f"{aucs[row].mean():.3f} ")
    assert found["Hash-6"][1] == "85.7"  # 100 epochs of 857


def test_what_it_takes_to_reach_all(tmp_path):
    """AUCs of all runs of a row alike, so that the crossing is known."""
    means = {"ALL-steps-x0.5": 0.89, "ALL": 0.9, "ALL-steps-x3": 0.91}
    means |= {"Hash-6-steps-x0.146": 0.88, "Hash-6-steps-x0.5": 0.89, "Hash-6": 0.91}
    means |= {"Hash-6-steps-x3": 0.92, "Random-matched": 0.89, "Random-matched-steps-x3": 0.895}
    means |= {"ALL-double": 0.95, "ALL-double-steps-x2": 0.96}
    aucs = {name: np.full(2, means[name]) for name in means}
    text = part(study(write(tmp_path / "results.csv", aucs)), "Length").split("Length that")[1]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    # halfway between 350 and 700 steps, on a logarithmic scale; 7 batches an epoch
    steps = 350 * 2**0.5
    hash_6 = [f"{steps:.0f}", f"{steps * 857 / 7 / 1000:.1f}", f"{steps * 0.6 / 60:.2f}"]
    assert lines[2:] == [
        ["ALL", "700", f"{700 * 6075 / 48 / 1000:.1f}", "7.00"],
        ["Hash-6", *hash_6],
        ["Random-matched", "more than 2100", "-", "-"],
        ["ALL-double", "at most 700", f"at most {700 * 6075 / 24 / 1000:.1f}", "at most 7.00"],
    ]


def test_a_study_cut_short(tmp_path):
    """Holm counts three, also where a row is missing or has one run."""
    aucs = made_up(spread=0.006)
    full = study(write(tmp_path / "results.csv", aucs))
    for name in ("scratch", "ALL", "Hash-6", "ALL-c32", "EveryN", "ALL-steps-x3"):
        rest = {row: aucs[row] for row in aucs if row != name}
        text = study(write(tmp_path / "results.csv", rest))
        assert text.startswith(
            f"{151 - PLANNED[name]} of 151 planned runs, with all evaluations. **No p"
        )
        cells = table(text, "All rows")[name]
        assert cells == ["-", "-", f"0 of {PLANNED[name]}", *["-"] * 6, cells[-1]]
        assert cells[-1] == ("-" if name == "ALL" else "needs more runs")
    short = aucs | {"ALL-c32": aucs["ALL-c32"][:1], "Random-matched": aucs["Random-matched"][:1]}
    text = study(write(tmp_path / "results.csv", short))
    found = table(text, "Primary")
    assert found["H3"][1:] == ["6, 1", "needs more runs", *["-"] * 5]
    assert found["H2"][1:] == ["8, 1", "needs more runs", *["-"] * 5]
    p = plain(short, "Hash-6", "ALL")[3]
    assert found["H1"][3:5] == [p_shown(p), p_shown(min(1, 3 * p))]
    assert table(full, "Primary")["H1"][4] != found["H1"][4]

    first_runs = {name: aucs[name][:1] for name in aucs}
    text = study(write(tmp_path / "results.csv", first_runs, outcomes=[PRIMARY]))
    assert text.startswith("0 of 151") and "Needs more runs of Hash-6, ALL or scratch." in text
    found = table(text, "All rows")
    for name in set(PLANNED) - {"ALL"}:
        assert found[name][4:] == [*["-"] * 5, "needs more runs"]


def test_the_plan_is_that_of_reproduce_sh():
    rows = re.search("^study_rows='(.*?)'", (ROOT / "reproduce.sh").read_text(), re.S | re.M)[1]
    pairs = [line.split("|") for line in rows.strip().splitlines()]
    assert {name.strip(): int(runs) for name, runs in pairs} == PLANNED


def test_the_command_prints_the_analysis_and_draws_the_figure(tmp_path, here):
    results = write(tmp_path / "results.csv", made_up())
    printed = here("evaluate.py", "study", results, "--figure", tmp_path / "figure.svg")
    assert printed == study(results) + "\n"
    assert "optimiser steps" in (tmp_path / "figure.svg").read_text()
    write(results, {"EveryN": [0.9, 0.91]})
    here("evaluate.py", "study", results, "--figure", tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()  # EveryN is on no curve
    write(results, made_up(), outcomes=["covid-ct"])
    with pytest.raises(SystemExit, match="holds no results of organ, linear, 1 % of the"):
        study(results)
