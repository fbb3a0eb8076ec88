"""The analysis that results/study/plan.md fixes in advance, as Markdown."""

import math

from common import auc
from common.files import fail
from common.results import read_results
from common.tables import (
    auc_cell,
    caveats,
    cost,
    estimate_row,
    interval_text,
    markdown,
    p_text,
    row_of,
    task_head,
    task_statistics,
    unique,
    variant_title,
    variants,
)

PLANNED = {  # row: pre-training runs
    "scratch": 12,
    "ALL": 12,
    "Hash-6": 8,
    "Random-matched": 8,
    "ALL-masked": 8,
    "Clusters-6": 8,
    "ALL-c8": 6,
    "ALL-c8-masked": 6,
    "ALL-c32": 6,
    "ALL-c32-masked": 6,
    "ALL-c32-random": 6,
    "ALL-double": 6,
    "ALL-c32-double": 6,
    "EveryN": 3,
    "SSIM-budget": 3,
    "MI-budget": 3,
    "Embedding-budget": 3,
    "Redundant": 3,
    "ALL-steps-x0.5": 4,
    "Hash-6-steps-x0.5": 4,
    "Random-matched-steps-x0.5": 4,
    "ALL-steps-x3": 4,
    "Hash-6-steps-x3": 4,
    "Random-matched-steps-x3": 4,
    "Hash-6-steps-x0.146": 4,
    "Random-matched-steps-x0.146": 4,
}
PRIMARY = "organ 1 %"
OUTCOMES = {  # column: task, variant
    PRIMARY: ("organ", ("linear", "0.01", "")),
    "organ 100 %": ("organ", ("linear", "1", "")),
    "covid-ct": ("covid-ct", ("linear", "1", "5x10")),
    "head-ct": ("head-ct", ("linear", "1", "5x10")),
}
HYPOTHESES = {
    "H1": ("Hash-6", "ALL"),
    "H2": ("Hash-6", "Random-matched"),
    "H3": ("ALL-c32-masked", "ALL-c32"),
}
PREDICTED = ("ALL", "ALL-c32")  # of H3's gain, by the paper's explanation
SPLIT = {  # the parts add up to the difference of Hash-6 to ALL
    "negatives": ("ALL-masked", "ALL"),
    "weighting of anatomy": ("Clusters-6", "ALL-masked"),
    "throwing slices away": ("Hash-6", "Clusters-6"),
    "together": ("Hash-6", "ALL"),
}
MORE_RUNS = "needs more runs"


def study(results):
    """The study's analysis of a results.csv, as one Markdown text."""
    rows = read_results(results)
    found = {column: statistics(results, rows, *OUTCOMES[column]) for column in OUTCOMES}
    primary = found[PRIMARY]
    if primary is None:
        fail(f"{results}: holds no results of organ, {variant_title(OUTCOMES[PRIMARY][1])}")
    evaluated = {column: found[column] for column in found if found[column]}
    return "\n\n".join(
        [
            how_many_runs(primary),
            *caveats(OUTCOMES[PRIMARY][1], evaluated),
            f"## Primary: {task_head('organ', primary)}, 1 % of the training labels",
            "Difference in macro AUC [95 % interval]. Holm over these three; no other p is shown.",
            markdown(hypotheses_table(primary)),
            "## Equivalence in H1",
            equivalence(primary),
            "## Hash-6 - ALL, split",
            "Difference in macro AUC on organ, 1 % of the labels [95 % interval].",
            markdown(split_table(primary)),
            "## All rows",
            "AUC: mean over runs ± their SD [95 % interval]; covid-ct and head-ct by 5 folds x 10 "
            "repeats, which add no new images. Last: difference on organ, 1 % of the labels.",
            markdown(rows_table(rows, found)),
            "## Length",
            "C: slices seen, in thousands. Batches hold 128 slices (rows named double: 256), which "
            "the results do not tell, or fewer where a row's slices do not divide evenly. Minutes: "
            "wall time of pre-training on the study's machines, mean over runs.",
            markdown(length_table(rows, primary)),
        ]
    )


def statistics(results, rows, task, variant):
    """tables.task_statistics, or None where there are no results yet."""
    lines = variants(rows).get(variant, [])
    return task_statistics(results, lines, task) if task in unique(lines, "task") else None


def how_many_runs(primary):
    done = sum(min(runs(primary, name), PLANNED[name]) for name in PLANNED)
    return (
        f"{done} of {sum(PLANNED.values())} planned runs. Intervals cover other runs and other "
        "test images, and hold for the 10 draws of labels at hand, the same for all rows."
    )


def runs(found, name):
    return len(found["aucs"].get(name, []))


def difference(found, name, other):
    """tables.estimate_row of name - other; None unless both rows have two runs."""
    if min(runs(found, name), runs(found, other)) < 2:
        return None
    return estimate_row(found, name, other)


def difference_text(found, name, other):
    estimated = difference(found, name, other)
    if estimated is None:
        return MORE_RUNS
    return f"{estimated['value']:+.4f}{interval_text(estimated, '+.4f', found['groups'])}"


def pair_cells(found, name, other):
    """Rows, runs and difference, as text."""
    both_runs = f"{runs(found, name)}, {runs(found, other)}"
    return [f"{name} - {other}", both_runs, difference_text(found, name, other)]


def hypotheses_table(found):
    """Lines of the primary table, its head first; below H3 what the paper predicts for it."""
    estimates = [difference(found, *pair) for pair in HYPOTHESES.values()]
    # a hypothesis that cannot be tested yet counts with p = 1, which makes Holm strictest
    p_values = [one["p"] if one else 1 for one in estimates]
    lines = [["", "rows", "runs", "difference", "p", "Holm"]]
    for key, p, corrected, one in zip(HYPOTHESES, p_values, auc.holm(p_values), estimates):
        tests = [p_text(p), p_text(corrected)] if one else ["-", "-"]
        lines.append([key, *pair_cells(found, *HYPOTHESES[key]), *tests])
    predicted = pair_cells(found, *PREDICTED)
    return [*lines, ["H3's gain, as the paper explains it", *predicted, "-", "-"]]


def equivalence(found):
    """Whether the 90 % interval of H1 lies within a third of what pre-training gains."""
    tested = difference(found, *HYPOTHESES["H1"])
    gain = difference(found, "ALL", "scratch")
    if tested is None or gain is None:
        return f"{MORE_RUNS.capitalize()} of Hash-6, ALL or scratch."
    low, high = tested["interval_90"]
    margin = gain["value"] / 3
    claimed = "claimed" if -margin < low and high < margin else "not claimed"
    return (
        f"Equivalence is **{claimed}**: the 90 % interval of Hash-6 - ALL is "
        f"[{low:+.4f}, {high:+.4f}]; it would have to lie within ±{margin:.4f}, a third of "
        f"ALL - scratch = {difference_text(found, 'ALL', 'scratch')}."
    )


def split_table(found):
    head = ["part", "rows", "runs", "difference"]
    return [head, *([part, *pair_cells(found, *SPLIT[part])] for part in SPLIT)]


def rows_table(rows, found):
    """Lines of the table of all rows, planned ones first, its head first."""
    primary = found[PRIMARY]
    lines = [["row", "slices", "dose", "runs", *found, "difference to ALL"]]
    for name in dict.fromkeys([*PLANNED, *unique(rows, "name")]):
        known = cost(rows, name)
        costs = [f"{known['slices']:.0f}", f"{known['dose']:.2f}"] if known else ["-", "-"]
        planned = f" of {PLANNED[name]}" if name in PLANNED else ", not planned"
        aucs = [auc_cell(found[column], name) if found[column] else "-" for column in found]
        to_all = "-" if name == "ALL" else difference_text(primary, name, "ALL")
        lines.append([name, *costs, f"{runs(primary, name)}{planned}", *aucs, to_all])
    return lines


def length_table(rows, found):
    """Lines of the table of rows with several lengths, by steps, its head first."""
    costs = {name: cost(rows, name) for name in found["aucs"]}
    lengths = {}
    for name in costs:
        if costs[name]:
            lengths.setdefault(row_of(name), []).append(name)
    lines = [["row", "steps", "C", "minutes", "runs", PRIMARY]]
    for row in lengths:
        if len(lengths[row]) > 1:
            for name in sorted(lengths[row], key=lambda name: costs[name]["steps"]):
                cells = length_cells(row, costs[name])
                lines.append([name, *cells, runs(found, name), auc_cell(found, name)])
    return lines


def length_cells(row, known):
    """Steps, C in thousands and minutes, as text."""
    # an epoch is cut into near-equal batches of at most the batch size
    batches = math.ceil(known["slices"] / (256 if row.endswith("double") else 128))
    seen = known["steps"] * known["slices"] / batches
    minutes = known["pretrain_seconds"] / 60
    return f"{known['steps']:.0f}", f"{seen / 1000:.1f}", f"{minutes:.1f}"
