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
from common.tables import auc_cell, identity, markdown, p_text, read_draws, read_tables, title
from results.study.figure import SELECTIONS, draw, lengths_of
from results.study.make import PLAN

RUNS = {row: runs for row, (_, _, runs) in PLAN.items()}
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
INTERVAL = "[{:+.4f}, {:+.4f}]"
FILES = """\
## Files

This file is what `python results/study/analysis.py results/study/results.csv` prints, and
`tables.md` what `evaluate.py tables results/study/results.csv` does; runs shared a GPU, 16 at a
time, so their seconds say nothing. `results.csv`, `results-draws.jsonl` (the bootstrap of each
line) and `runs.jsonl` (settings and log of each run) are the runs of plan.md; `pilot`, `cpu`, `c1`
(without draws) and `finetune` (by commit 1aba59e, whose fine-tuning stayed at 1e-4 and flipped top
to bottom) are told of there. The draws were converted once, after the study: a record named its
line by a digest, and now does by key, encoder and AUC; no number was changed."""


def main():
    parser = Flags(description=__doc__)
    parser.add_argument("results", type=Path, help="CSV of the runs that make.py made")
    parser.add_argument("--figure", type=Path, help="SVG file to write")
    args = parser.parse_args()
    tables = planned_tables(args.results)
    print(analysis(tables, read_draws(args.results)))
    if args.figure:
        draw(tables[PRIMARY], f"AUC: {title(OUTCOMES[PRIMARY])}", args.figure)


def planned_tables(results):
    """{column of OUTCOMES: Table} of a results.csv; by plan.md no p counts before all runs."""
    held = read_tables(results)
    tables = {column: held[key] for column, key in OUTCOMES.items() if key in held}
    if PRIMARY not in tables:
        fail(f"{results}: holds no results of {title(OUTCOMES[PRIMARY])}")
    for column, table in tables.items():
        for row in RUNS | table.aucs:
            made, planned = len(table.aucs.get(row, [])), RUNS.get(row, 0)
            if made != planned:
                why = f"{row} has {made} of {planned} planned runs"
                fail(f"{results}: {column}: {why}: evaluate.py tables shows what there is")
    return tables


def analysis(tables, records):
    """The whole analysis as one Markdown text. records: read_draws of the results."""
    table = tables[PRIMARY]
    lengths, lengths_to_reach = length_tables(table)
    runs = sum(RUNS.values())
    evaluations = "all evaluations" if len(tables) == len(OUTCOMES) else ", ".join(tables)
    if not all(table.groups for table in tables.values()):
        evaluations += "; where draws are missing, intervals cover runs only"
    paragraphs = [
        f"{runs} of {runs} planned runs, with {evaluations}.",
        "Intervals [95 %] cover other pre-training runs and other test images. They hold for one "
        "set of pre-training slices, for one selection Hash-6 of it, and for the draws of labels "
        "at hand, the same for all rows. They are not corrected for their number.",
        f"## Primary: organ ({table.images()}), 1 % of the training labels",
        "Difference in macro AUC. Holm: p corrected for these three; no other p is shown. Welch: p "
        "where each row has a variance of its own; a difference counts where both are small. "
        "Detectable: the true difference that these runs find with 80 % power, uncorrected. "
        "Labels: standard error over the draws of labels, which the interval leaves out.",
        hypotheses_table(table, records),
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
        rows_table(tables),
        "## Length",
        "Slices seen: in thousands, in batches of at most 128 (rows named double: 256). Minutes: "
        "wall time of pre-training, mean over runs; where runs shared a machine, they tell little.",
        lengths,
        "Length that reaches the AUC of ALL's planned one: mean AUC by log steps, interpolated "
        "between the lengths above. Where lengths hardly differ, runs decide it.",
        lengths_to_reach,
        FILES,
    ]
    return "\n\n".join(paragraphs)


def weights_of(difference):
    """{"Hash-6": 1, "ALL": -1} of "Hash-6 - ALL"."""
    words = f"+ {difference}".split()
    weight = {"+": 1, "-": -1}
    return {row: weight[sign] for sign, row in zip(words[::2], words[1::2], strict=True)}


def estimate(table, difference):
    return table.estimate(weights_of(difference))


def cells(table, difference):
    """Rows, runs and difference, as text."""
    runs = ", ".join(str(len(table.aucs[row])) for row in weights_of(difference))
    estimated = estimate(table, difference)
    return [difference, runs, f"{estimated.value:+.4f} {INTERVAL.format(*estimated.interval)}"]


def differences_table(head, table, differences):
    lines = [[label, *cells(table, difference)] for label, difference in differences]
    return markdown([[head, "rows", "runs", "difference"], *lines])


def hypotheses_table(table, records):
    lines = [["", "rows", "runs", "difference", "p", "Holm", "Welch", "detectable", "labels"]]
    estimates = [estimate(table, difference) for difference in HYPOTHESES.values()]
    corrected = auc.holm([tested.p for tested in estimates])
    for i, (name, difference) in enumerate(HYPOTHESES.items()):
        p_values = map(p_text, [estimates[i].p, corrected[i], welch(table, difference)])
        detectable = f"{estimates[i].detectable:.4f}"
        labels = label_error(table, difference, records)
        lines.append([name, *cells(table, difference), *p_values, detectable, labels])
    predicted = ["H3's gain at most, as the paper explains it", *cells(table, "ALL - ALL-c32")]
    return markdown([*lines, [*predicted, *["-"] * 5]])


def welch(table, difference):
    """p of a difference of two rows by the variance between the runs of these two alone."""
    return estimate(by_own_variance(table, difference), difference).p


def by_own_variance(table, difference):
    """The Table for a difference of two rows by the variance between the runs of these two alone.

    Without an image part auc.estimate with this variance and freedom is the t test of Welch 1947.
    """
    pair = [table.aucs[row] for row in weights_of(difference)]
    parts = [np.var(aucs, ddof=1) / len(aucs) for aucs in pair]
    variance = sum(parts) / sum(1 / len(aucs) for aucs in pair)
    squares = sum(part**2 / (len(aucs) - 1) for part, aucs in zip(parts, pair, strict=True))
    between_runs = variance, sum(parts) ** 2 / squares
    return table._replace(between_runs=between_runs)


def label_error(table, difference, records):
    """Standard error, over the draws of labels, of a difference; runs' noise is part of it."""
    if not table.groups:
        return "-"  # draws are missing
    by_draw = 0
    for row, weight in weights_of(difference).items():
        parts = [records[identity(line)]["parts"] for line in table.lines if line["name"] == row]
        by_draw += weight * np.mean(parts, axis=0)
    return f"{stats.sem(by_draw):.4f}"


def equivalence(table):
    """Whether Hash-6 - ALL is surely less than a third of what pre-training gains: paragraphs."""
    gain = estimate(table, GAIN)
    gained = f"{GAIN} = {cells(table, GAIN)[-1]}"
    if gain.interval[0] <= 0:
        return [f"Equivalence is **not claimed**: pre-training may gain nothing here, {gained}."]
    claimed = "claimed" if within_margin(table, HYPOTHESES["H1"], GAIN) else "not claimed"
    tested = INTERVAL.format(*estimate(table, HYPOTHESES["H1"]).interval_90)
    text = (
        f"Equivalence is **{claimed}**: the 90 % interval of Hash-6 - ALL is {tested}; it would "
        f"have to lie within ±{gain.value / 3:.4f}, a third of {gained}, also with the error of "
        "that third. A difference by H1 may be equivalent all the same: there is one, but a small "
        "one."
    )
    others = "The same rule for other rows; one that all of them pass would tell nothing."
    lines = [["row - ALL", "runs", "90 % interval", "share of ALL - scratch", "within a third"]]
    for row in EQUIVALENCE:
        low, high = estimate(table, f"{row} - ALL").interval_90
        share = f"up to {max(-low, high) / gain.value:.0%}"
        verdict = "yes" if within_margin(table, f"{row} - ALL", GAIN) else "no"
        lines.append([row, len(table.aucs[row]), INTERVAL.format(low, high), share, verdict])
    return [text, others, markdown(lines)]


def within_margin(table, difference, gain):
    """H1's rule: the 90 % interval of a difference within a third of a gain, such as GAIN.

    As planned, with that third taken as known; and, since a row may be on both sides, with its
    error: two one-sided t tests at 5 % of the difference against plus and minus a third of the
    gain.
    """
    low, high = estimate(table, difference).interval_90
    third = estimate(table, gain).value / 3
    ends = []
    for sign in (1, -1):
        weights = weights_of(difference)
        for row, weight in weights_of(gain).items():
            weights[row] = weights.get(row, 0) + sign * weight / 3
        ends += table.estimate(weights).interval_90
    return -third < low and high < third and ends[0] > 0 and ends[3] < 0


def rows_table(tables):
    primary = tables[PRIMARY]
    lines = [["row", "slices", "dose", "runs", *tables, "difference to ALL"]]
    for row, planned in RUNS.items():
        to_all = "-" if row == "ALL" else cells(primary, f"{row} - ALL")[-1]
        lines.append([*row_cells(tables, row, f"{planned} of {planned}"), to_all])
    return markdown(lines)


def row_cells(tables, row, runs):
    cost = tables[PRIMARY].cost(row)
    costs = [f"{cost['slices']:.0f}", f"{cost['dose']:.2f}"] if cost else ["-"] * 2
    return [row, *costs, runs, *(auc_cell(table, row) for table in tables.values())]


def length_cells(cost, steps):
    """Steps, slices seen in them in thousands, and minutes at the cost of a row, as text."""
    # an epoch is cut into near-equal batches of at most 128
    slices = steps * cost["slices"] / math.ceil(cost["slices"] / 128)
    minutes = cost["pretrain_seconds"] / 60 * steps / cost["steps"]
    return [f"{steps:.0f}", f"{slices / 1000:.1f}", f"{minutes:.2f}"]


def length_tables(table):
    """AUC and cost of each length; and what it takes to reach ALL's AUC, if within the lengths."""
    lines = [["row", "steps", "slices seen", "minutes", "runs", PRIMARY]]
    reached = [["row", "steps", "slices seen", "minutes"]]
    target = np.mean(table.aucs["ALL"])
    for row in SELECTIONS:
        steps, names = zip(*lengths_of(table, row), strict=True)
        for name in names:
            cost = table.cost(name)
            length = length_cells(cost, cost["steps"])
            lines.append([name, *length, RUNS[name], auc_cell(table, name)])
        best = np.maximum.accumulate([np.mean(table.aucs[name]) for name in names])
        needed = math.exp(np.interp(target, best, np.log(steps)))
        known = best[0] <= target <= best[-1]
        reached.append([row, *(length_cells(table.cost(row), needed) if known else ["-"] * 3)])
    return markdown(lines), markdown(reached)


if __name__ == "__main__":
    run_script(main)
