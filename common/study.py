"""The analysis that results/study/plan.md fixes in advance, as Markdown."""

import math

import numpy as np

from common import auc
from common.files import fail
from common.results import read_results
from common.runs import OUTCOMES, PLANNED, PRIMARY
from common.tables import (
    PRECISION,
    auc_cell,
    bootstraps,
    caveats,
    cost,
    estimate_sum,
    interval_text,
    line_digest,
    markdown,
    p_text,
    row_of,
    task_head,
    task_statistics,
    unique,
    variant_title,
    variants,
)

# Differences are tuples of rows: (a, b) is a - b, and (a, b, c, d) is (a - b) - (c - d).
HYPOTHESES = {
    "H1": ("Hash-6", "ALL"),
    "H2": ("Hash-6", "Random-matched"),
    "H3": ("ALL-c32-masked", "ALL-c32"),
}
PREDICTED = ("ALL", "ALL-c32")  # at most H3's gain, by the paper's explanation
SPLIT = {  # the parts add up to the difference of Hash-6 to ALL
    "negatives": ("ALL-masked", "ALL"),
    "weighting of anatomy": ("Clusters-6", "ALL-masked"),
    "throwing slices away": ("Hash-6", "Clusters-6"),
    "together": ("Hash-6", "ALL"),
}
SECONDARY = {
    "neighbours in a batch": [("ALL-c8", "ALL"), ("ALL-c32", "ALL")],
    "near-duplicate negatives taken out": [("ALL-c8-masked", "ALL-c8")],
    "all negatives of the volume taken out": [("ALL-c32-masked-volume", "ALL-c32")],
    "as many negatives taken out at random": [
        ("ALL-c32-random", "ALL-c32"),
        ("ALL-c32-masked", "ALL-c32-random"),
    ],
    "more variety in a batch, the same negatives": [
        ("ALL-double", "ALL"),
        ("ALL-c32-double", "ALL-c32"),
        ("ALL-double", "ALL-c32-double", "ALL", "ALL-c32"),
    ],
    "another strategy than chance": [
        ("EveryN", "Random-matched"),
        ("SSIM-budget", "Random-matched"),
        ("MI-budget", "Random-matched"),
        ("Embedding-budget", "Random-matched"),
        ("Redundant", "Random-matched"),
    ],
    "half the steps": [
        ("Hash-6-steps-x0.5", "ALL-steps-x0.5"),
        ("Hash-6-steps-x0.5", "Random-matched-steps-x0.5"),
    ],
    "three times the steps": [
        ("Hash-6-steps-x3", "ALL-steps-x3"),
        ("Hash-6-steps-x3", "Random-matched-steps-x3"),
    ],
    "equal epochs, as the paper compares": [
        ("Hash-6-steps-x0.146", "ALL"),
        ("Hash-6-steps-x0.146", "Random-matched-steps-x0.146"),
    ],
}
# Rows held against H1's rule of equivalence, to see whether it can fail.
EQUIVALENCE = ["Hash-6", "Random-matched", "EveryN", "Redundant", "ALL-c32", "ALL-steps-x0.5"]
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
            how_many_runs(found),
            "Intervals [95 %] cover other pre-training runs and other test images. They hold for "
            "one set of pre-training slices, for one selection Hash-6 of it, and for the draws of "
            "labels at hand, the same for all rows. They are not corrected for their number: "
            "about one of 20 true zeros lies outside of its own.",
            *caveats(OUTCOMES[PRIMARY][1], evaluated),
            f"## Primary: {task_head('organ', primary)}, 1 % of the training labels",
            "Difference in macro AUC. Holm: p corrected for these three; no other p is shown. "
            "Welch: p where each row has a variance of its own, not that of all rows; a difference "
            "counts where both are small. Detectable: the true difference that these runs find "
            "with 80 % power, uncorrected. Labels: standard error over the draws of labels, which "
            "the interval leaves out.",
            markdown(hypotheses_table(primary, label_draws(results, rows))),
            "## Equivalence in H1",
            *equivalence(primary),
            "## Hash-6 - ALL, split",
            "Difference in macro AUC on organ, 1 % of the labels. The differences add up, intervals "
            "do not. Weighting of anatomy: Clusters-6 also meets near-duplicates, a dose of 0.1.",
            markdown([["part", "rows", "runs", "difference"], *split(primary)]),
            "## Secondary",
            "Difference in macro AUC on organ, 1 % of the labels. (a - b) - (c - d): below 0 where "
            "variety makes up for neighbours.",
            markdown([["question", "rows", "runs", "difference"], *secondary(primary)]),
            "## All rows",
            "AUC: mean over runs ± their SD [95 % interval]; covid-ct and head-ct by 5 folds x 10 "
            "repeats, which add no new images, if not by the official split. Last: difference on organ, 1 % of the labels.",
            markdown(rows_table(rows, found)),
            "## Length",
            "C: slices seen, in thousands. Batches hold 128 slices (rows named double: 256), which "
            "the results do not tell, or fewer where a row's slices do not divide evenly. Minutes: "
            "wall time of pre-training, mean over runs; where runs shared a machine, they tell "
            "little of its speed.",
            markdown(length_table(rows, primary)),
            "Length that reaches the AUC of ALL's planned one: mean AUC by log steps, interpolated "
            "between the lengths above. Where lengths hardly differ, runs decide it.",
            markdown(reach_table(rows, primary)),
        ]
    )


def statistics(results, rows, task, variant):
    """tables.task_statistics, or None where there are no results yet."""
    lines = variants(rows).get(variant, [])
    return task_statistics(results, lines, task) if task in unique(lines, "task") else None


def label_draws(results, rows):
    """{row: AUC with each draw of labels, mean over runs, [draws]} of the primary outcome.

    Empty where test scores are missing, and results-draws.jsonl does not tell of all lines.
    """
    task, variant = OUTCOMES[PRIMARY]
    lines = [line for line in variants(rows)[variant] if line["task"] == task]
    known = bootstraps(results, task, lines)
    if known is None or any("parts" not in known[line_digest(line)] for line in lines):
        return {}  # an older version kept no parts
    found = {}
    for line in lines:
        found.setdefault(line["name"], []).append(known[line_digest(line)]["parts"])
    return {name: PRECISION * np.mean(found[name], axis=0) for name in found}


def how_many_runs(found):
    done = sum(
        min(planned, *(runs(found[column], name) for column in OUTCOMES))
        for name, planned in PLANNED.items()
    )
    text = f"{done} of {sum(PLANNED.values())} planned runs, with all evaluations."
    if done < sum(PLANNED.values()):
        text += (
            " **No p counts before the study has ended**, which is when its time does, not when a "
            "p is small (plan.md)."
        )
    return text


def runs(found, name):
    return len(found["aucs"].get(name, [])) if found else 0


def difference(found, *names):
    """tables.estimate_sum of a - b or (a - b) - (c - d); None unless each row has two runs."""
    return weighted(found, dict(zip(names, (1, -1, -1, 1))))


def weighted(found, weights):
    if min(runs(found, name) for name in weights) < 2:
        return None
    return estimate_sum(found, weights)


def difference_text(found, *names):
    estimated = difference(found, *names)
    if estimated is None:
        return MORE_RUNS
    return f"{estimated['value']:+.4f}{interval_text(estimated, '+.4f', found['groups'])}"


def cells(found, *names):
    """Rows, runs and difference, as text."""
    first, *second = (f"{a} - {b}" for a, b in zip(names[::2], names[1::2]))
    rows = f"({first}) - ({second[0]})" if second else first
    of_each = ", ".join(str(runs(found, name)) for name in names)
    return [rows, of_each, difference_text(found, *names)]


def hypotheses_table(found, draws):
    """Lines of the primary table, its head first; below H3 what the paper predicts for it."""
    estimates = [difference(found, *pair) for pair in HYPOTHESES.values()]
    # a hypothesis that cannot be tested yet counts with p = 1, which makes Holm strictest
    p_values = [one["p"] if one else 1 for one in estimates]
    head = ["", "rows", "runs", "difference", "p", "Holm", "Welch", "detectable", "labels"]
    lines = [head]
    for key, p, corrected, one in zip(HYPOTHESES, p_values, auc.holm(p_values), estimates):
        pair = HYPOTHESES[key]
        tests = ["-"] * 4
        if one:
            welch = own_variance(found, *pair)["p"]
            tests = [p_text(p), p_text(corrected), p_text(welch), f"{one['detectable']:.4f}"]
        lines.append([key, *cells(found, *pair), *tests, label_error(draws, *pair)])
    predicted = cells(found, *PREDICTED)
    return [*lines, ["H3's gain at most, as the paper explains it", *predicted, *["-"] * 5]]


def own_variance(found, name, other):
    """The difference of two rows with a variance between runs of their own."""
    pair = found["aucs"][name], found["aucs"][other]
    return difference(found | {"between_runs": auc.own_variance(pair)}, name, other)


def label_error(draws, name, other):
    """Standard error, over the draws of labels, of a difference; runs' noise is part of it."""
    if not {name, other} <= set(draws):
        return "-"
    differences = draws[name] - draws[other]
    if len(differences) < 2:
        return "-"
    return f"{np.std(differences, ddof=1) / len(differences) ** 0.5:.4f}"


def equivalence(found):
    """Whether Hash-6 - ALL is surely less than a third of what pre-training gains: paragraphs."""
    tested = difference(found, *HYPOTHESES["H1"])
    gain = difference(found, "ALL", "scratch")
    if tested is None or gain is None:
        return [f"{MORE_RUNS.capitalize()} of Hash-6, ALL or scratch."]
    gained = f"ALL - scratch = {difference_text(found, 'ALL', 'scratch')}"
    if gain["interval"][0] <= 0:
        return [f"Equivalence is **not claimed**: pre-training may gain nothing here, {gained}."]
    low, high = tested["interval_90"]
    claimed = within_margin(found, "Hash-6")
    text = (
        f"Equivalence is **{'claimed' if claimed else 'not claimed'}**: the 90 % interval of "
        f"Hash-6 - ALL is [{low:+.4f}, {high:+.4f}]; it would have to lie within "
        f"±{gain['value'] / 3:.4f}, a third of {gained}, also with the error of that third."
    )
    if claimed and tested["interval"][0] * tested["interval"][1] > 0:
        text += (
            " The 95 % interval leaves out 0: if H1 holds too, they differ, but by less than a "
            "third of what pre-training gains."
        )
    others = "The same rule for other rows; one that all of them pass would tell nothing."
    return [text, others, markdown(equivalence_table(found, gain["value"]))]


def within_margin(found, row):
    """H1's rule for any row: the 90 % interval of row - ALL within a third of (ALL - scratch).

    As planned, with that third taken as known; and, since ALL is on both sides, with its error: two
    one-sided t tests at 5 % of row - ALL against plus and minus a third of (ALL - scratch).
    """
    third = difference(found, "ALL", "scratch")["value"] / 3
    low, high = difference(found, row, "ALL")["interval_90"]
    above = weighted(found, {row: 1, "ALL": -2 / 3, "scratch": -1 / 3})["interval_90"][0]
    below = weighted(found, {row: 1, "ALL": -4 / 3, "scratch": 1 / 3})["interval_90"][1]
    return -third < low and high < third and above > 0 and below < 0


def equivalence_table(found, gain):
    """Lines of the table that holds other rows against H1's rule, its head first."""
    lines = [["row - ALL", "runs", "90 % interval", "share of ALL - scratch", "within a third"]]
    for row in EQUIVALENCE:
        tested = difference(found, row, "ALL")
        if tested is None:
            lines.append([row, runs(found, row), MORE_RUNS, "-", "-"])
            continue
        low, high = tested["interval_90"]
        share = f"up to {max(-low, high) / gain:.0%}"
        verdict = "yes" if within_margin(found, row) else "no"
        lines.append([row, runs(found, row), f"[{low:+.4f}, {high:+.4f}]", share, verdict])
    return lines


def split(found):
    return [[part, *cells(found, *SPLIT[part])] for part in SPLIT]


def secondary(found):
    return [
        [question, *cells(found, *names)] for question in SECONDARY for names in SECONDARY[question]
    ]


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


def lengths_of(rows, found):
    """{row: its names of different length, by steps}, of the rows that have several; {name: cost}."""
    costs = {name: cost(rows, name) for name in found["aucs"]}
    names = {}
    for name in costs:
        if costs[name]:
            names.setdefault(row_of(name), []).append(name)
    by_steps = {row: sorted(names[row], key=lambda name: costs[name]["steps"]) for row in names}
    return {row: by_steps[row] for row in by_steps if len(by_steps[row]) > 1}, costs


def length_table(rows, found):
    """Lines of the table of rows with several lengths, its head first."""
    lengths, costs = lengths_of(rows, found)
    lines = [["row", "steps", "C", "minutes", "runs", PRIMARY]]
    for name in sum(lengths.values(), []):
        steps, seconds = costs[name]["steps"], costs[name]["pretrain_seconds"]
        length = [f"{steps:.0f}", slices_seen(name, costs[name], steps), f"{seconds / 60:.2f}"]
        lines.append([name, *length, runs(found, name), auc_cell(found, name)])
    return lines


def slices_seen(name, known, steps):
    """C in thousands, as text."""
    # an epoch is cut into near-equal batches of at most the batch size
    batches = math.ceil(known["slices"] / (256 if row_of(name).endswith("double") else 128))
    return f"{steps * known['slices'] / batches / 1000:.1f}"


def reach_table(rows, found):
    """Lines of the table of what it takes to reach the AUC of ALL, its head first."""
    lengths, costs = lengths_of(rows, found)
    lines = [["row", "steps", "C", "minutes"]]
    if not runs(found, "ALL"):
        return lines
    target = np.mean(found["aucs"]["ALL"])
    for row, names in lengths.items():
        aucs = [np.mean(found["aucs"][name]) for name in names]
        steps = [costs[name]["steps"] for name in names]
        reached = next((i for i, value in enumerate(aucs) if value >= target), None)
        if reached is None:
            lines.append([row, f"more than {steps[-1]:.0f}", "-", "-"])
            continue
        needed, sign = steps[reached], "" if reached else "at most "
        if reached:
            ends = slice(reached - 1, reached + 1)
            needed = math.exp(np.interp(target, aucs[ends], np.log(steps[ends])))
        known = costs[names[reached]]
        minutes = known["pretrain_seconds"] / 60 * needed / steps[reached]
        length = [f"{needed:.0f}", slices_seen(row, known, needed), f"{minutes:.2f}"]
        lines.append([row, *(sign + number for number in length)])
    return lines
