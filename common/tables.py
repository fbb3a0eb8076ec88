"""The Markdown tables made from a results.csv, and the paper's numbers."""

import hashlib
import inspect
import json
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import auc
from common.files import atomic_write, fail, locked, syntax_digest
from common.results import read_results, read_scores, scores_folder

BUDGET = "Hash-6"  # rows that keep as many slices as this one are marked
EQUAL = 0.01  # as many means within 1 %
PRECISION = 1e-5  # of the bootstrap's AUCs, as they are kept
BOOTSTRAP = [auc.bootstrap, auc.sample_weights, auc.weighted_auc, auc.binary_auc]
DEPENDENT = {  # tasks whose images depend on each other in a way that their file does not tell
    "organ": "no scan numbers, so intervals are too narrow"
}
ABSTRACT = [
    ("COVID-CT", "0.78", "0.83"),
    ("OrganSMNIST", "0.97", "0.98"),
    ("brain haemorrhage", "0.73", "0.83"),
]
DRAFTS = {  # AUC in %: COVID after PET-CT, after LIDC; brain after PET-CT, after LIDC
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
HOW_TO_READ = """\
A run is one pre-training (for scratch: one set of random weights). AUC: mean over runs ± their SD.
[95 % interval]: a t interval over runs with the test images added: the variance between runs, taken
as equal for all rows of a task, and that of a bootstrap of whole groups of test images, by class.
A row with one run says nothing about other runs: its interval covers images only, and it has no p.
Where few labels were drawn, all hold for these draws. With fewer than 20 groups of test images,
intervals are too narrow.
Holm: p corrected for all differences of a table; "may be chance" marks those of 0.05 or more."""


def tables(results, baseline="ALL"):
    """All tables of a results.csv as one Markdown text; rows are compared to the row baseline."""
    rows = read_results(results)
    if not rows:
        fail(f"{results}: holds no results")
    names = unique(rows, "name")
    if baseline != "ALL" and find_name(names, baseline) is None:
        fail(f"{results}: holds no row {baseline} to compare to: it has {', '.join(names)}")
    text = [HOW_TO_READ]
    for variant, lines in variants(rows).items():
        text += variant_tables(results, variant, lines, baseline)
    return "\n\n".join([*text, *paper_tables()])


def variants(rows):
    """{(protocol, label_share, folds): its lines}; each variant has tables of its own."""
    found = {}
    for row in rows:
        variant = row["protocol"], row["label_share"], row["folds"]
        found.setdefault(variant, []).append(row)
    return found


def title(variant):
    """Such as: linear, 1 % of the training labels, 5 folds x 10 repeats."""
    protocol, label_share, folds = variant
    text = protocol
    if label_share != "1":
        text += f", {100 * float(label_share):.3g} % of the training labels"
    if folds:
        text += ", {} folds x {} repeats".format(*folds.split("x"))
    return text


def variant_tables(results, variant, rows, baseline):
    """The tables of one variant: AUC with cost, differences to the baseline, their power."""
    names, tasks = unique(rows, "name"), unique(rows, "task")
    base = find_name(names, baseline)
    found = {task: task_statistics(results, variant, rows, task) for task in tasks}
    text = [f"## {title(variant)}", *caveats(variant, found)]
    text.append(markdown(auc_table(rows, names, base, found)))
    if base and len(names) > 1:
        text.append(f"### {title(variant)}: difference to {base}")
        text += difference_tables(names, tasks, base, found)
        text += [power(task, base, found[task]) for task in tasks]
    settings = dict.fromkeys(f"{row['task']}: {row['settings']}" for row in rows)
    return [*text, "Settings: " + "; ".join(settings) + "."]


def caveats(variant, found):
    """What must be known before the numbers of a variant are read."""
    text = []
    if variant[2]:
        text.append(
            "Repeats of cross-validation average out the luck of the split. They are no new data: "
            "intervals stay as wide as the images make them."
        )
    without = [task for task in found if not found[task]["groups"]]
    if without:
        text.append(
            f"{', '.join(without)}: no test scores beside results.csv, and no results-draws.jsonl "
            "made of these lines by this code: intervals cover runs only."
        )
    return text


def task_statistics(results, variant, rows, task):
    """All that estimate() needs of one task in one variant.

    {"aucs": {name: AUC of each run, [runs]}, "covariance": {(name, name): over the images},
    "groups": independent groups of test images, 0 without scores, "images": their number as text,
    "between_runs": auc.variance_between_runs}
    """
    lines = [row for row in rows if row["task"] == task]
    check_settings(results, lines)
    runs = {name: runs_of(lines, name) for name in unique(lines, "name")}
    aucs = {
        name: np.array([np.mean([float(line["auc"]) for line in run]) for run in runs[name]])
        for name in runs
    }
    covariance, groups = image_part(results, task, runs)
    return {
        "aucs": aucs,
        "covariance": covariance,
        "groups": groups,
        "images": "/".join(unique(lines, "test")),
        "between_runs": auc.variance_between_runs(aucs.values()),
    }


def check_settings(results, lines):
    """Stop with one line if rows that a table compares were evaluated with other settings."""
    for line in lines[1:]:
        if line["settings"] != lines[0]["settings"]:
            fail(
                f"{results}: {line['task']}: {lines[0]['name']} and {line['name']} cannot be "
                f"compared: {lines[0]['settings']} is not {line['settings']}: evaluate them alike"
            )


def runs_of(lines, name):
    """The lines of each pre-training run of a row; every seed of scratch is a run."""
    runs = {}
    for line in lines:
        if line["name"] == name:
            seed = line["seed"] if line["encoder"] == "scratch" else ""
            runs.setdefault((line["encoder"], seed), []).append(line)
    return list(runs.values())


def image_part(results, task, runs):
    """({(name, name): auc.image_covariance}, groups of test images); without scores all 0."""
    lines = [line for name in runs for run in runs[name] for line in run]
    records = line_records(results, task, lines)
    if records is None:
        return dict.fromkeys([(a, b) for a in runs for b in runs], 0.0), 0
    for line, record in zip(lines, records):
        if record["tested"] != records[0]["tested"]:
            fail(
                f"{results}: {task}: {line['name']} seed {line['seed']} was not tested on the "
                f"images of {lines[0]['name']}: delete one of these lines and evaluate again"
            )
    draws = (np.array(record["draws"]) * PRECISION for record in records)
    # the records are in the order of the lines: row by row, run by run
    rows = [
        np.array([np.mean([next(draws) for _ in run], axis=0) for run in runs[name]])
        for name in runs
    ]
    covariance = auc.image_covariance(rows)
    pairs = {(a, b): covariance[i][j] for i, a in enumerate(runs) for j, b in enumerate(runs)}
    return pairs, records[0]["groups"]


def line_records(results, task, lines):
    """What the bootstrap found for each line: a list of dicts; None where scores are missing.

    It is kept in results-draws.jsonl beside results.csv. So a second table takes no time, and the
    tables of a study can be made again without its scores, which are too large to publish.
    """
    path = Path(results).with_name(f"{Path(results).stem}-draws.jsonl")
    known = {record["line"]: record for record in read_records(path)}
    digests = [line_digest(line) for line in lines]
    missing = [line for line, digest in zip(lines, digests) if digest not in known]
    if missing and not scores_folder(results).is_dir():
        return None
    for line in tqdm(missing, f"bootstrap: {task}", unit="line", disable=None):
        known[line_digest(line)] = make_record(results, line)
    if missing:
        with locked(path), atomic_write(path, text=True) as file:
            file.writelines(json.dumps(record) + "\n" for record in known.values())
    return [known[digest] for digest in digests]


def read_records(path):
    try:
        return [json.loads(text) for text in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except ValueError:
        fail(f"{path}: damaged: delete it, it is made again from the scores")


def line_digest(line):
    """Changes with the line and with the code of the bootstrap."""
    made_from = json.dumps([line, bootstrap_digest(), auc.DRAWS], sort_keys=True)
    return hashlib.sha256(made_from.encode()).hexdigest()[:16]


@cache
def bootstrap_digest():
    return syntax_digest("".join(inspect.getsource(function) for function in BOOTSTRAP))


def make_record(results, line):
    """AUC under each bootstrap sample, in units of PRECISION; what was tested, and its groups."""
    *tested, probabilities = read_scores(results, line)
    images, labels, groups = tested
    draws = auc.bootstrap(labels, probabilities, auc.sample_weights(labels, groups))
    return {
        "line": line_digest(line),
        "tested": hashlib.sha256(b"".join(array.tobytes() for array in tested)).hexdigest()[:8],
        "groups": len(np.unique(groups)),
        "draws": np.rint(draws / PRECISION).astype(int).tolist(),
    }


def estimate(found, *names):
    """auc.estimate of a row, or of the difference of one row to another, from task_statistics."""
    rows = [found["aucs"][name] for name in names]
    covariance = np.array([[found["covariance"][a, b] for b in names] for a in names])
    return auc.estimate(rows, covariance, found["between_runs"], found["groups"])


def cost(rows, name):
    """Means over a row's encoders: {"slices", "steps", "dose", "pretrain_seconds"} if known."""
    runs = {row["encoder"]: row for row in rows if row["name"] == name and row["slices"]}.values()
    columns = ["slices", "steps", "dose", "pretrain_seconds"] if runs else []
    return {
        column: np.mean([float(run[column]) for run in runs])
        for column in columns
        if all(run[column] for run in runs)
    }


def auc_table(rows, names, base, found):
    """Lines of the table of cost and AUC, its head first."""
    heads = [task_head(task, found[task]) for task in found]
    costs = {name: cost(rows, name) for name in names}
    lines = [["row", "slices", "steps", "equal to", "dose", "pre-training", "speed-up", *heads]]
    for name in names:
        cells = cost_cells(costs, name, base)
        cells += [auc_cell(found[task], name) for task in found]
        lines.append([name, *cells])
    return lines


def task_head(task, found):
    """Such as: covid-ct (n=203, 120 groups)."""
    text = f"n={found['images']}"
    if found["groups"] and str(found["groups"]) != found["images"]:
        text += f", {found['groups']} groups"
    if task in DEPENDENT:
        text += f"; {DEPENDENT[task]}"
    return f"{task} ({text})"


def cost_cells(costs, name, base):
    """Slices, steps, what equals whom, dose, time and speed-up over the baseline, as text."""
    row = costs[name]
    if not row:
        return ["-"] * 6
    equal = []
    if is_equal(row, costs.get(BUDGET), "slices"):
        equal.append(f"{BUDGET}'s slices")
    if is_equal(row, costs.get(base), "steps"):
        equal.append(f"{base}'s steps")
    dose = f"{row['dose']:.2f}" if "dose" in row else "-"
    seconds = row["pretrain_seconds"]
    speed_up = f"{costs[base]['pretrain_seconds'] / seconds:.1f} x" if costs.get(base) else "-"
    cells = [f"{row['slices']:.0f}", f"{row['steps']:.0f}", ", ".join(equal) or "-", dose]
    return [*cells, f"{seconds:.0f} s", speed_up]


def is_equal(row, other, column):
    """Whether two rows agree in a column within 1 %; False where one does not know it."""
    if not row or not other:
        return False
    return abs(row[column] - other[column]) <= EQUAL * other[column]


def auc_cell(found, name):
    """0.957 ± 0.002 [0.952, 0.962]: mean and SD over runs, and the interval."""
    if name not in found["aucs"]:
        return "-"
    aucs = found["aucs"][name]
    text = f"{np.mean(aucs):.3f}"
    if len(aucs) > 1:
        text += f" ± {np.std(aucs, ddof=1):.3f}"
    return text + interval_text(estimate(found, name), ".3f", found["groups"])


def interval_text(estimated, style, groups):
    """[low, high] with a leading space; empty where neither runs nor images are known."""
    if estimated["runs"] == 1 and not groups:
        return ""
    low, high = estimated["interval"]
    text = f" [{low:{style}}, {high:{style}}]"
    return text + (" images only" if estimated["runs"] == 1 else "")


def difference_tables(names, tasks, base, found):
    """A sentence on the correction, and the table of differences to the baseline."""
    estimates = {
        (name, task): estimate(found[task], name, base)
        for name in names
        for task in tasks
        if name != base and {name, base} <= set(found[task]["aucs"])
    }
    tested = [key for key in estimates if estimates[key]["p"] is not None]
    corrected = dict(zip(tested, auc.holm([estimates[key]["p"] for key in tested])))
    lines = [["row", *(task_head(task, found[task]) for task in tasks)]]
    for name in names:
        if name != base:
            cells = [
                difference_cell(
                    estimates.get((name, task)), corrected.get((name, task)), found[task]
                )
                for task in tasks
            ]
            lines.append([name, *cells])
    return [f"Differences with a p, for which Holm corrects: {len(tested)}.", markdown(lines)]


def difference_cell(difference, corrected, found):
    if difference is None:
        return "-"
    text = f"{difference['value']:+.3f}" + interval_text(difference, "+.3f", found["groups"])
    if difference["p"] is None:
        return f"{text}, p needs 2 runs of both rows"
    text += f" {p_text(difference['p'])}, Holm {p_text(corrected)}"
    return text + (" (may be chance)" if corrected >= 0.05 else "")


def p_text(p):
    return "p<0.001" if p < 0.001 else f"p={p:.3f}"


def power(task, base, found):
    """What the runs and images at hand can tell, in words."""
    others = [name for name in found["aucs"] if name != base]
    if base not in found["aucs"] or not others:
        return f"{task}: nothing to compare to {base}."
    differences = [estimate(found, name, base) for name in others]
    detectable = [
        difference["detectable"] for difference in differences if difference["p"] is not None
    ]
    if not detectable:
        return f"{task}: no p, since a difference needs 2 pre-training runs or more of both rows."
    by_row = f" ({min(detectable):.3f} to {max(detectable):.3f}, by row)"
    return (
        f"{task}: a row and {base} cannot be told apart below a true difference of "
        f"{np.median(detectable):.3f}{by_row if len(detectable) > 1 else ''}: it takes that to "
        "find p < 0.05, uncorrected, with 80 % power from these runs and images."
    )


def paper_tables():
    """The paper's own numbers as Markdown, section by section."""
    heads = ["row", "COVID-CT, PET-CT", "COVID-CT, LIDC", "brain, PET-CT", "brain, LIDC"]
    drafts = [[name, *(f"{value / 100:.3f}" for value in DRAFTS[name])] for name in DRAFTS]
    return [
        "## The paper's numbers",
        "AUC, from the abstract (pre-training up to nine times faster):",
        markdown([["task", "ALL", "reduced"], *ABSTRACT]),
        "AUC, unconfirmed: drafts of the authors' charts, published before the paper (three cells "
        "agree with the abstract); task, pre-training data:",
        markdown([heads, *drafts]),
    ]


def markdown(lines):
    """A Markdown table; the first line is its head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def find_name(names, name):
    """The row of that name, in any case of letters; None if there is none."""
    return next((found for found in names if found.lower() == name.lower()), None)


def row_of(name):
    """Hash-6 for Hash-6-steps-x3: the row of which a row is another length."""
    return name.split("-steps")[0]


def unique(rows, column):
    """The different values of a column, in the order of the rows."""
    return list(dict.fromkeys(row[column] for row in rows))
