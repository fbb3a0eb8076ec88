"""results.csv, the scores beside it, and the Markdown tables made from them, with the paper's numbers."""

import numpy as np

from common import auc
from common.files import fail
from common.results import read_results, scores_file

BUDGET = "Hash-6"  # rows that kept as many slices as this one make a table of their own

ABSTRACT = [
    ("COVID-CT", "0.78", "0.83"),
    ("OrganSMNIST", "0.97", "0.98"),
    ("brain haemorrhage", "0.73", "0.83"),
]
DRAFT_TASKS = {
    "covid-ct": 0,
    "head-ct": 2,
}  # first column of a task in DRAFT; head-ct stands in for the brain data
DRAFT = {  # AUC in %, drafts of the authors' charts: COVID after PET-CT, LIDC; brain after PET-CT, LIDC
    "scratch": (73.71, 73.71, 67.81, 67.81),
    "ALL": (77.51, 80.73, 72.66, 73.43),
    "EveryN": (80.16, 81.50, 79.52, 82.71),
    "SSIM": (81.99, 80.56, 79.92, 85.90),
    "MI": (83.84, 81.55, 76.00, 80.16),
    "Hash-3": (81.94, 81.34, 79.90, 79.05),
    "Hash-6": (82.99, 82.31, 83.18, 84.06),
    "Hash-12": (81.18, 81.12, 76.76, 79.81),
    "HashAll": (81.70, 82.57, 78.73, 86.76),
}


def tables(results, baseline="ALL"):
    """All tables of a results.csv as one Markdown text; every row is compared to the one named baseline, in any case."""
    rows = read_results(results)
    if not rows:
        fail(f"{results}: holds no results")
    names = unique(row["name"] for row in rows)
    if baseline != "ALL" and baseline.lower() not in [name.lower() for name in names]:
        fail(f"{results}: holds no row {baseline} to compare to: it has {', '.join(names)}")
    parts = [
        protocol_tables(results, rows, protocol, baseline)
        for protocol in unique(row["protocol"] for row in rows)
    ]
    return "\n\n".join([*parts, paper_tables()])


def protocol_tables(results, rows, protocol, baseline):
    """The tables of one protocol: AUC with cost; the same at an equal budget and at equal steps; difference to the
    baseline; F1 and accuracy; every seed; settings."""
    rows = [row for row in rows if row["protocol"] == protocol]
    tasks, names = unique(row["task"] for row in rows), unique(row["name"] for row in rows)
    cells = {
        (n, t): [row for row in rows if row["name"] == n and row["task"] == t]
        for n in names
        for t in tasks
    }
    draws = {
        key: {row["seed"]: seed_draws(results, row) for row in cell} for key, cell in cells.items()
    }
    base = next((name for name in names if name.lower() == baseline.lower()), None)
    costs = {name: cost(rows, name, base) for name in names}
    main, others, seeds = {}, [], []
    for name in names:
        own = {task: draws[name, task] for task in tasks}
        main[name] = [
            name,
            *costs[name],
            *(cell for t in tasks for cell in auc_cells(name, t, cells, own[t])),
        ]
        others.append([name, *(f1_cell(cells[name, t]) for t in tasks)])
        seeds.append(
            [name, *(" ".join(f"{float(row['auc']):.3f}" for row in cells[name, t]) for t in tasks)]
        )
    head = ["row", "slices", "steps", "pre-training", "speed-up"]
    for task in tasks:
        images = "/".join(unique(row["test"] for row in rows if row["task"] == task))
        head += [f"{task} (n={images})"] + ["draft of the paper: PET-CT / LIDC"] * (
            task in DRAFT_TASKS
        )
    text = [
        f"## {protocol}: AUC on the test images, mean over seeds ± SD, [95 % interval]",
        markdown(head, main.values()),
    ]
    for title, column, like in [("slices", 0, BUDGET), ("optimiser steps", 1, base)]:
        equal = [
            main[name]
            for name in names
            if like in costs and costs[name][column] == costs[like][column] != "-"
        ]
        if len(equal) > 1:
            text += [
                f"### The same, of rows with as many {title} as {like}: {costs[like][column]}",
                markdown(head, equal),
            ]
    compared = [name for name in names if base and name != base]
    differences = {
        (n, t): paired_draws(cells[n, t], draws[n, t], cells[base, t], draws[base, t])
        for n in compared
        for t in tasks
    }
    if compared:
        differences = {key: found for key, found in differences.items() if found is not None}
        corrected = dict(
            zip(differences, auc.holm([auc.p_value(found) for found in differences.values()]))
        )
        paired = [
            [n, *(difference_cell(differences.get((n, t)), corrected.get((n, t))) for t in tasks)]
            for n in compared
        ]
        text += [
            f"### Difference to {base}, paired by image, [95 % interval], p, corrected p",
            markdown(["row", *tasks], paired),
        ]
        text += [
            resolution(t, [differences[k] for k in differences if k[1] == t], cells[base, t])
            for t in tasks
        ]
    text += ["### F1 / accuracy, means over seeds", markdown(["row", *tasks], others)]
    text += [
        "<details><summary>AUC of every seed</summary>",
        markdown(["row", *tasks], seeds),
        "</details>",
    ]
    text += [
        f"Intervals and p: percentile bootstrap (Efron and Tibshirani 1993) over test images ({auc.DRAWS} draws, stratified by "
        "class, the same images for both rows, AUC averaged over seeds). The spread over seeds is the SD, not part of the "
        "interval of an AUC; differences and their p cover it where a row has several pre-training runs: these are drawn "
        "anew with the images (Beiden et al. 2000; with k runs (k - 1) / k of the variance between them). "
        f'Corrected p: Holm 1979, over the {len(differences)} differences of this table; "may be chance" '
        "marks those of 0.05 or more. "
        "Where each seed makes its own split (head-ct), the splits share images, so intervals are somewhat too narrow.",
        "Settings: " + "; ".join(unique(f"{row['task']}: {row['settings']}" for row in rows)) + ".",
    ]
    return "\n\n".join(text)


def seed_draws(results, row):
    path = scores_file(results, row)
    try:
        with np.load(path) as scores:
            return auc.bootstrap(scores["labels"], scores["probabilities"], scores["images"])
    except (OSError, KeyError, ValueError) as error:
        fail(
            f"{path}: scores missing or damaged ({error}): delete the line from {results} and evaluate again"
        )


def cost(rows, name, base):
    """Slices kept, steps, pre-training time (mean over encoders) and speed-up over the baseline."""

    def encoders(of):
        return {row["encoder"]: row for row in rows if row["name"] == of and row["slices"]}.values()

    def seconds(of):
        return np.mean([float(row["pretrain_seconds"]) for row in encoders(of)])

    if not encoders(name):
        return ["-"] * 4
    slices, steps = (
        "/".join(unique(row[key] for row in encoders(name))) for key in ("slices", "steps")
    )
    speed_up = f"{seconds(base) / seconds(name):.1f} x" if base and encoders(base) else "-"
    return [slices, steps, f"{seconds(name):.0f} s", speed_up]


def auc_cells(name, task, cells, draws):
    """Our AUC of a row and task, and the authors' draft of it where there is one."""
    cell = cells[name, task]
    ours = "-"
    if cell:
        low, high = auc.interval(np.mean(list(draws.values()), axis=0))
        ours = f"{spread([float(row['auc']) for row in cell])} [{low:.3f}, {high:.3f}]"
    if task not in DRAFT_TASKS:
        return [ours]
    first = DRAFT_TASKS[task]
    return [
        ours,
        " / ".join(f"{value / 100:.3f}" for value in DRAFT[name][first : first + 2])
        if name in DRAFT
        else "-",
    ]


def f1_cell(cell):
    return (
        " / ".join(
            f"{np.mean([float(row[key]) for row in cell]):.3f}" for key in ("f1", "accuracy")
        )
        if cell
        else "-"
    )


def difference_cell(differences, corrected):
    """Mean paired difference over the seeds that both rows have; marked where it may be chance."""
    if differences is None:
        return "-"
    low, high = auc.interval(differences)
    mark = " (may be chance)" if corrected >= 0.05 else ""
    return f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}] {p_text(auc.p_value(differences))}, {p_text(corrected)}{mark}"


def p_text(p):
    return "p<0.001" if p < 0.001 else f"p={p:.3f}"


def paired_draws(own, own_draws, base, base_draws):
    """Draws of the difference between two rows of results.csv lines, {seed: draws} of each: averaged over the seeds that
    both have with the same pre-training runs, and then over those runs; None where they share no seed."""
    encoders = {row["seed"]: row["encoder"] for row in base}
    runs = {}
    for row in own:
        if (seed := row["seed"]) in encoders:
            runs.setdefault((row["encoder"], encoders[seed]), []).append(
                own_draws[seed] - base_draws[seed]
            )
    return (
        auc.over_runs(np.array([np.mean(draws, axis=0) for draws in runs.values()]))
        if runs
        else None
    )


def resolution(task, differences, base):
    """What the number of test images can tell, in words: half the typical width of the intervals of the differences."""
    widths = [np.diff(auc.interval(draws))[0] / 2 for draws in differences]
    images = "/".join(unique(row["test"] for row in base))
    return (
        (
            f"{task}: on {images} test images, two rows whose AUC differs by less than about "
            f"{np.median(widths):.3f} cannot be told apart, even if only they are compared."
        )
        if widths
        else ""
    )


def spread(values):
    return f"{np.mean(values):.3f}" + (
        f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    )


def paper_tables():
    abstract = markdown(["task", "ALL", "reduced"], ABSTRACT)
    heads = ["row", "COVID-CT, PET-CT", "COVID-CT, LIDC", "brain, PET-CT", "brain, LIDC"]
    draft = markdown(
        heads,
        [[name, *(f"{value / 100:.3f}" for value in values)] for name, values in DRAFT.items()],
    )
    return "\n\n".join(
        [
            "## The paper's numbers",
            "AUC, from the abstract (pre-training up to nine times faster):",
            abstract,
            "AUC, from drafts of the authors' charts, published before the paper (unconfirmed; three cells agree with the "
            "abstract); task, pre-training data:",
            draft,
        ]
    )


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def unique(values):
    return list(dict.fromkeys(values))
