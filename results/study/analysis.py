"""The analysis that plan.md fixes in advance, as Markdown (README.md), and its figure.

python results/study/analysis.py results/study/results.csv --figure results/study/figure.svg
"""

import math
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import auc
from common.files import Flags, fail, run_script
from common.tables import (
    auc_cell,
    identity,
    interval_text,
    markdown,
    p_text,
    read_draws,
    read_tables,
    title,
)
from results.study.figure import draw
from results.study.make import PLAN

OUTCOMES = {  # column: task, protocol, label share, folds
    "organ 1 %": ("organ", "linear", "0.01", ""),
    "organ 10 %": ("organ", "linear", "0.1", ""),
    "organ 100 %": ("organ", "linear", "1", ""),
    "covid-ct": ("covid-ct", "linear", "1", "5x10"),
    "covid-ct, official split": ("covid-ct", "linear", "1", ""),
    "head-ct": ("head-ct", "linear", "1", "5x10"),
}
PRIMARY = "organ 1 %"
HYPOTHESES = {
    "H1": "Hash-6 - ALL",
    "H2": "Hash-6 - Random-matched",
    "H3": "ALL-c32-masked - ALL-c32",
}
PREDICTED = "ALL - ALL-c32"  # at most H3's gain, by the paper's explanation
GAIN = "ALL - scratch"  # of pre-training; a third of it is H1's margin of equivalence
SPLIT = [  # the parts add up to the last
    ("negatives", "ALL-masked - ALL"),
    ("weighting of anatomy", "Clusters-6 - ALL-masked"),
    ("throwing slices away", "Hash-6 - Clusters-6"),
    ("together", "Hash-6 - ALL"),
]
SECONDARY = [
    ("neighbours in a batch", "ALL-c8 - ALL"),
    ("neighbours in a batch", "ALL-c32 - ALL"),
    ("near-duplicate negatives taken out", "ALL-c8-masked - ALL-c8"),
    ("all negatives of the volume taken out", "ALL-c32-masked-volume - ALL-c32"),
    ("as many negatives taken out at random", "ALL-c32-random - ALL-c32"),
    ("as many negatives taken out at random", "ALL-c32-masked - ALL-c32-random"),
    ("more variety in a batch, the same negatives", "ALL-double - ALL"),
    ("more variety in a batch, the same negatives", "ALL-c32-double - ALL-c32"),
    ("more variety in a batch, the same negatives", "ALL-double - ALL-c32-double - ALL + ALL-c32"),
    ("another strategy than chance", "EveryN - Random-matched"),
    ("another strategy than chance", "SSIM-budget - Random-matched"),
    ("another strategy than chance", "MI-budget - Random-matched"),
    ("another strategy than chance", "Embedding-budget - Random-matched"),
    ("another strategy than chance", "Redundant - Random-matched"),
    ("half the steps", "Hash-6-steps-x0.5 - ALL-steps-x0.5"),
    ("half the steps", "Hash-6-steps-x0.5 - Random-matched-steps-x0.5"),
    ("three times the steps", "Hash-6-steps-x3 - ALL-steps-x3"),
    ("three times the steps", "Hash-6-steps-x3 - Random-matched-steps-x3"),
    ("equal epochs, as the paper compares", "Hash-6-steps-x0.146 - ALL"),
    ("equal epochs, as the paper compares", "Hash-6-steps-x0.146 - Random-matched-steps-x0.146"),
]
# Rows held against H1's rule of equivalence, to see whether it can fail.
EQUIVALENCE = ["Hash-6", "Random-matched", "EveryN", "Redundant", "ALL-c32", "ALL-steps-x0.5"]
FILES = """\
## Files

This file is what `python results/study/analysis.py results/study/results.csv` prints, and
`tables.md` what `evaluate.py tables results/study/results.csv` does; runs shared a GPU, 16 at a
time, so their seconds say nothing. `results.csv`, `results-draws.jsonl` (the bootstrap of each
line) and `runs.jsonl` (settings and log of each run) are the runs of plan.md; `pilot`, `cpu`, `c1`
(without draws) and `finetune` are told of there. The draws were converted once, after the study: a
record named its line by a digest, and now does by key, encoder and AUC; no number was changed."""


def main():
    parser = Flags(description=__doc__)
    parser.add_argument("results", type=Path, help="CSV of the runs that make.py made")
    parser.add_argument("--figure", type=Path, help="SVG file to write")
    args = parser.parse_args()
    print(analysis(args.results))
    if args.figure:
        key = OUTCOMES[PRIMARY]
        draw(read_tables(args.results)[key], f"AUC: {title(key)}", args.figure)


def analysis(results):
    """The whole analysis of a results.csv as one Markdown text."""
    all_tables = read_tables(results)
    tables = {column: all_tables.get(key) for column, key in OUTCOMES.items()}
    table = tables[PRIMARY]
    if table is None:
        fail(f"{results}: holds no results of {title(OUTCOMES[PRIMARY])}")
    paragraphs = [
        how_many_runs(tables),
        "Intervals [95 %] cover other pre-training runs and other test images. They hold for one "
        "set of pre-training slices, for one selection Hash-6 of it, and for the draws of labels "
        "at hand, the same for all rows. They are not corrected for their number.",
        *(
            f"{column}: intervals cover runs only, as results-draws.jsonl lacks lines."
            for column, table in tables.items()
            if table and not table.groups
        ),
        f"## Primary: organ ({table.images()}), 1 % of the training labels",
        "Difference in macro AUC. Holm: p corrected for these three; no other p is shown. Welch: p "
        "where each row has a variance of its own; a difference counts where both are small. "
        "Detectable: the true difference that these runs find with 80 % power, uncorrected. "
        "Labels: standard error over the draws of labels, which the interval leaves out.",
        markdown(hypotheses_table(table, label_draws(results, table))),
        "## Equivalence in H1",
        *equivalence(table),
        "## Hash-6 - ALL, split",
        "Difference in macro AUC on organ, 1 % of the labels. The differences add up, intervals "
        "do not. Weighting of anatomy: Clusters-6 also meets near-duplicates, a dose of 0.1.",
        differences_table("part", table, SPLIT),
        "## Secondary",
        "Difference in macro AUC on organ, 1 % of the labels. That of four rows: below 0 where "
        "variety makes up for neighbours.",
        differences_table("question", table, SECONDARY),
        "## All rows",
        "AUC: mean over runs ± their SD [95 % interval]; covid-ct and head-ct by 5 folds x 10 "
        "repeats, which add no new images, if not by the official split. Last: difference on "
        "organ, 1 % of the labels.",
        markdown(rows_table(tables)),
        "## Length",
        "Slices seen: in thousands, in batches of at most 128 (rows named double: 256). Minutes: "
        "wall time of pre-training, mean over runs; where runs shared a machine, they tell little.",
        markdown(length_table(table)),
        "Length that reaches the AUC of ALL's planned one: mean AUC by log steps, interpolated "
        "between the lengths above. Where lengths hardly differ, runs decide it.",
        markdown(reach_table(table)),
        FILES,
    ]
    return "\n\n".join(paragraphs)


# --- Differences, written as "Hash-6 - ALL".


def weights_of(difference):
    """{"Hash-6": 1, "ALL": -1} of "Hash-6 - ALL"."""
    words = f"+ {difference}".split()
    weights = {}
    for sign, row in zip(words[::2], words[1::2], strict=True):
        weights[row] = weights.get(row, 0) + {"+": 1, "-": -1}[sign]
    return weights


def runs(table, row):
    return len(table.aucs.get(row, [])) if table else 0


def estimate(table, difference):
    """auc.Estimate of a difference, or of {row: weight}; None unless each row has two runs."""
    weights = weights_of(difference) if isinstance(difference, str) else difference
    several = min(runs(table, row) for row in weights) > 1
    return table.estimate(weights) if several else None


def difference_text(table, difference):
    estimated = estimate(table, difference)
    if estimated is None:
        return "-"
    return f"{estimated.value:+.4f}{interval_text(table, estimated, '+.4f')}"


def cells(table, difference):
    """Rows, runs and difference, as text."""
    of_each = ", ".join(str(runs(table, row)) for row in weights_of(difference))
    return [difference, of_each, difference_text(table, difference)]


def differences_table(head, table, differences):
    lines = [[label, *cells(table, difference)] for label, difference in differences]
    return markdown([[head, "rows", "runs", "difference"], *lines])


def how_many_runs(tables):
    done = sum(
        min(planned, *(runs(table, row) for table in tables.values()))
        for row, (_, _, planned) in PLAN.items()
    )
    of_plan = sum(planned for _, _, planned in PLAN.values())
    text = f"{done} of {of_plan} planned runs, with all evaluations."
    return text if done == of_plan else f"{text} **No p counts before all are made (plan.md).**"


# --- H1 to H3.


def hypotheses_table(table, draws):
    """Lines of the primary table, its head first; below H3 what the paper predicts for it."""
    estimates = {name: estimate(table, difference) for name, difference in HYPOTHESES.items()}
    # a hypothesis that cannot be tested yet counts with p = 1, which makes Holm strictest
    holm = auc.holm([tested.p if tested else 1 for tested in estimates.values()])
    lines = [["", "rows", "runs", "difference", "p", "Holm", "Welch", "detectable", "labels"]]
    for (name, tested), corrected in zip(estimates.items(), holm, strict=True):
        difference = HYPOTHESES[name]
        of_tests = ["-"] * 4
        if tested:
            p_values = tested.p, corrected, welch(table, difference).p
            of_tests = [*map(p_text, p_values), f"{tested.detectable:.4f}"]
        lines.append([name, *cells(table, difference), *of_tests, label_error(draws, difference)])
    predicted = cells(table, PREDICTED)
    return [*lines, ["H3's gain at most, as the paper explains it", *predicted, *["-"] * 5]]


def welch(table, difference):
    """auc.Estimate of a difference by the variance between runs of these two rows alone."""
    between_runs = own_variance([table.aucs[row] for row in weights_of(difference)])
    return estimate(table._replace(between_runs=between_runs), difference)


def own_variance(pair):
    """In place of auc.variance_between_runs, for the difference of two rows: theirs (Welch 1947).

    pair: the AUCs of the runs of each, 2 or more. (variance, degrees of freedom), such that the
    error and freedom of auc.estimate are those of Welch's t test where there is no image part.
    """
    parts = [np.var(aucs, ddof=1) / len(aucs) for aucs in pair]
    variance = sum(parts) / sum(1 / len(aucs) for aucs in pair)
    if variance == 0:
        return 0.0, 1
    squares = sum(part**2 / (len(aucs) - 1) for part, aucs in zip(parts, pair, strict=True))
    return variance, sum(parts) ** 2 / squares


def label_draws(results, table):
    """{row: AUC with each draw of labels, mean over runs, [draws]}; empty where a line has none."""
    records = read_draws(results)
    of_runs = {}
    for line in table.lines:
        if identity(line) not in records:
            return {}
        of_runs.setdefault(line["name"], []).append(records[identity(line)]["parts"])
    return {row: np.mean(parts, axis=0) for row, parts in of_runs.items()}


def label_error(draws, difference):
    """Standard error, over the draws of labels, of a difference; runs' noise is part of it."""
    weights = weights_of(difference)
    if not set(weights) <= set(draws):
        return "-"
    differences = sum(weight * draws[row] for row, weight in weights.items())
    if len(differences) < 2:
        return "-"
    return f"{stats.sem(differences):.4f}"


def equivalence(table):
    """Whether Hash-6 - ALL is surely less than a third of what pre-training gains: paragraphs."""
    tested, gain = estimate(table, HYPOTHESES["H1"]), estimate(table, GAIN)
    if not tested or not gain:
        return ["-"]
    gained = f"{GAIN} = {difference_text(table, GAIN)}"
    if gain.interval[0] <= 0:
        return [f"Equivalence is **not claimed**: pre-training may gain nothing here, {gained}."]
    low, high = tested.interval_90
    claimed = "claimed" if within_margin(table, "Hash-6") else "not claimed"
    text = (
        f"Equivalence is **{claimed}**: the 90 % interval of "
        f"Hash-6 - ALL is [{low:+.4f}, {high:+.4f}]; it would have to lie within "
        f"±{gain.value / 3:.4f}, a third of {gained}, also with the error of that third. A "
        "difference by H1 may be equivalent all the same: there is one, but a small one."
    )
    others = "The same rule for other rows; one that all of them pass would tell nothing."
    return [text, others, markdown(equivalence_table(table, gain.value))]


def within_margin(table, row):
    """H1's rule for any row: the 90 % interval of row - ALL within a third of (ALL - scratch).

    As planned, with that third taken as known; and, since ALL is on both sides, with its error: two
    one-sided t tests at 5 % of row - ALL against plus and minus a third of (ALL - scratch).
    """
    third = estimate(table, GAIN).value / 3
    low, high = estimate(table, f"{row} - ALL").interval_90
    above = estimate(table, {row: 1, "ALL": -2 / 3, "scratch": -1 / 3}).interval_90[0]
    below = estimate(table, {row: 1, "ALL": -4 / 3, "scratch": 1 / 3}).interval_90[1]
    return -third < low and high < third and above > 0 and below < 0


def equivalence_table(table, gain):
    lines = [["row - ALL", "runs", "90 % interval", "share of ALL - scratch", "within a third"]]
    for row in EQUIVALENCE:
        tested = estimate(table, f"{row} - ALL")
        if tested is None:
            lines.append([row, runs(table, row), "-", "-", "-"])
            continue
        low, high = tested.interval_90
        share = f"up to {max(-low, high) / gain:.0%}"
        verdict = "yes" if within_margin(table, row) else "no"
        lines.append([row, runs(table, row), f"[{low:+.4f}, {high:+.4f}]", share, verdict])
    return lines


# --- All rows, and their lengths.


def rows_table(tables):
    """Planned rows first."""
    primary = tables[PRIMARY]
    evaluated = [row for table in tables.values() if table for row in table.aucs]
    lines = [["row", "slices", "dose", "runs", *tables, "difference to ALL"]]
    for row in dict.fromkeys([*PLAN, *evaluated]):
        cost = primary.cost(row)
        costs = [f"{cost['slices']:.0f}", f"{cost['dose']:.2f}"] if cost else ["-"] * 2
        planned = f" of {PLAN[row][2]}" if row in PLAN else ", not planned"
        aucs = [auc_cell(table, row) if runs(table, row) else "-" for table in tables.values()]
        to_all = "-" if row == "ALL" else difference_text(primary, f"{row} - ALL")
        lines.append([row, *costs, f"{runs(primary, row)}{planned}", *aucs, to_all])
    return lines


def lengths_of(table):
    """{row: [(steps, its name, cost), ...] by steps} of the rows of several lengths."""
    lengths = {}
    for name in table.aucs:
        cost = table.cost(name)
        if cost:
            lengths.setdefault(name.split("-steps")[0], []).append((cost["steps"], name, cost))
    return {row: sorted(lengths[row]) for row in lengths if len(lengths[row]) > 1}


def length_table(table):
    lines = [["row", "steps", "slices seen", "minutes", "runs", PRIMARY]]
    for row, lengths in lengths_of(table).items():
        for steps, name, cost in lengths:
            length = length_cells(row, cost, steps)
            lines.append([name, *length, runs(table, name), auc_cell(table, name)])
    return lines


def length_cells(row, cost, steps):
    """Steps, slices seen in them in thousands, and minutes, as text."""
    # an epoch is cut into near-equal batches of at most the batch size
    batches = math.ceil(cost["slices"] / (256 if row.endswith("double") else 128))
    minutes = cost["pretrain_seconds"] / 60 * steps / cost["steps"]
    return [f"{steps:.0f}", f"{steps * cost['slices'] / batches / 1000:.1f}", f"{minutes:.2f}"]


def reach_table(table):
    """What it takes to reach the AUC of ALL."""
    lines = [["row", "steps", "slices seen", "minutes"]]
    target = np.mean(table.aucs.get("ALL", np.inf))
    for row, lengths in lengths_of(table).items():
        steps = [length[0] for length in lengths]
        aucs = [np.mean(table.aucs[name]) for _, name, _ in lengths]
        reached = next((i for i, value in enumerate(aucs) if value >= target), None)
        if reached is None:
            lines.append([row, f"more than {steps[-1]:.0f}", "-", "-"])
            continue
        needed, sign = steps[reached], "" if reached else "at most "
        if reached:
            ends = slice(reached - 1, reached + 1)
            needed = math.exp(np.interp(target, aucs[ends], np.log(steps[ends])))
        length = length_cells(row, lengths[reached][2], needed)
        lines.append([row, *(sign + number for number in length)])
    return lines


if __name__ == "__main__":
    run_script(main)
