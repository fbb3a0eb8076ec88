"""The Markdown tables made from a results.csv, and the paper's numbers."""

import hashlib
import inspect
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import auc
from common.files import atomic_write, fail, locked, syntax_digest
from common.results import read_results, read_scores, scores_folder

BUDGET = "Hash-6"  # rows that keep as many slices as this one are marked
EQUAL = 0.01  # as many means within 1 %
PRECISION = 1e-5  # of the bootstrap's AUCs, as they are kept
BOOTSTRAP = [
    auc.sample_weights,
    auc.bootstrap,
    auc.bootstrap_part,
    auc.weighted_auc,
    auc.binary_auc,
    auc.mean_of_defined,
]
BOOTSTRAP_CODE = syntax_digest("".join(map(inspect.getsource, BOOTSTRAP)))
DEPENDENT = {  # tasks whose images depend on each other in a way that their file does not tell
    "organ": "no scan numbers, so intervals are too narrow"
}
HOW_TO_READ = """\
A run is one pre-training (for scratch: one set of random weights). AUC: mean over runs ± their SD.
[95 % interval]: a t interval over runs with the test images added: the variance between runs, taken
as equal for all rows of a task, and that of a bootstrap of whole groups of test images, by class.
A row with one run says nothing about other runs: its interval covers images only, and it has no p.
Where few labels were drawn, all hold for these draws. With fewer than 20 groups of test images,
intervals are too narrow.
Holm: p corrected for all differences of a table; "may be chance" marks those of 0.05 or more."""
PAPER = """\
## The paper's numbers

AUC, from the abstract (pre-training up to nine times faster):

| task | ALL | reduced |
| --- | --- | --- |
| COVID-CT | 0.78 | 0.83 |
| OrganSMNIST | 0.97 | 0.98 |
| brain haemorrhage | 0.73 | 0.83 |

AUC, unconfirmed: drafts of the authors' charts, published before the paper (three cells agree \
with the abstract); task, pre-training data:

| row | COVID-CT, PET-CT | COVID-CT, LIDC | brain, PET-CT | brain, LIDC |
| --- | --- | --- | --- | --- |
| scratch | 0.737 | 0.737 | 0.678 | 0.678 |
| ALL | 0.775 | 0.807 | 0.727 | 0.734 |
| EveryN | 0.802 | 0.815 | 0.795 | 0.827 |
| SSIM | 0.820 | 0.806 | 0.799 | 0.859 |
| MI | 0.838 | 0.816 | 0.760 | 0.802 |
| Hash-3 | 0.819 | 0.813 | 0.799 | 0.790 |
| Hash-6 | 0.830 | 0.823 | 0.832 | 0.841 |
| Hash-12 | 0.812 | 0.811 | 0.768 | 0.798 |
| HashAll | 0.817 | 0.826 | 0.787 | 0.868 |"""


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
    return "\n\n".join([*text, PAPER])


def variants(rows):
    """{(protocol, label_share, folds): its lines}; each variant has tables of its own."""
    found = {}
    for row in rows:
        variant = row["protocol"], row["label_share"], row["folds"]
        found.setdefault(variant, []).append(row)
    return found


def variant_title(variant):
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
    names = unique(rows, "name")
    base = find_name(names, baseline)
    found = {task: task_statistics(results, rows, task) for task in unique(rows, "task")}
    text = [f"## {variant_title(variant)}", *caveats(variant, found)]
    text.append(markdown(auc_table(rows, names, base, found)))
    if base and len(names) > 1:
        text.append(f"### {variant_title(variant)}: difference to {base}")
        text += difference_tables(names, base, found)
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


def task_statistics(results, rows, task):
    """All that estimate_row() needs of one task, from the lines of one variant.

    {"aucs": {name: AUC of each run, [runs]}, "covariance": auc.image_covariance in their order,
    "groups": independent groups of test images, 0 without scores, "images": their number as text,
    "between_runs": auc.variance_between_runs}
    """
    lines = [row for row in rows if row["task"] == task]
    first = lines[0]
    for line in lines:
        if line["settings"] != first["settings"]:
            fail(
                f"{results}: {task}: {first['name']} and {line['name']} cannot be compared: "
                f"{first['settings']} is not {line['settings']}: evaluate them alike"
            )
    runs = runs_of(lines)
    aucs = {
        name: np.array([np.mean([float(line["auc"]) for line in run]) for run in runs[name]])
        for name in runs
    }
    covariance, groups = image_part(results, task, lines, runs.values())
    return {
        "aucs": aucs,
        "covariance": covariance,
        "groups": groups,
        "images": "/".join(unique(lines, "test")),
        "between_runs": auc.variance_between_runs(aucs.values()),
    }


def runs_of(lines):
    """{name: [the lines of each pre-training run]}; every seed of scratch is a run."""
    runs = {}
    for line in lines:
        run = line["encoder"], line["seed"] if line["encoder"] == "scratch" else ""
        runs.setdefault(line["name"], {}).setdefault(run, []).append(line)
    return {name: list(runs[name].values()) for name in runs}


def image_part(results, task, lines, rows):
    """(auc.image_covariance of the rows, groups of test images); without scores both are 0."""
    known = bootstraps(results, task, lines)
    if known is None:
        return np.zeros((len(rows), len(rows))), 0
    first = known[line_digest(lines[0])]
    for line in lines:
        if known[line_digest(line)]["tested"] != first["tested"]:
            fail(
                f"{results}: {task}: {line['name']} seed {line['seed']} was not tested on the "
                f"images of {lines[0]['name']}: delete one of these lines and evaluate again"
            )

    def draws_of(run):
        draws = np.array([known[line_digest(line)]["draws"] for line in run], float)
        return PRECISION * draws.mean(axis=0)

    draws = [np.array([draws_of(run) for run in row]) for row in rows]
    return auc.image_covariance(draws), first["groups"]


def bootstraps(results, task, lines):
    """{line_digest: what make_record found}, for each line; None where scores are missing.

    Kept in results-draws.jsonl beside results.csv, so that a second table takes no time, and none
    needs the scores, which are too large to publish.
    """
    path = Path(results).with_name(f"{Path(results).stem}-draws.jsonl")
    known = {record["line"]: record for record in read_draws(path)}
    missing = [line for line in lines if line_digest(line) not in known]
    if not missing:
        return known
    if not scores_folder(results).is_dir():
        return None
    for line in tqdm(missing, f"bootstrap: {task}", unit="line", disable=None):
        known[line_digest(line)] = make_record(results, line)
    with locked(path):  # another table may have added to it meanwhile
        known = {record["line"]: record for record in read_draws(path)} | known
        with atomic_write(path, text=True) as file:
            file.writelines(json.dumps(record) + "\n" for record in known.values())
    return known


def read_draws(path):
    try:
        return [json.loads(text) for text in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except ValueError:
        fail(f"{path}: damaged: delete it, it is made again from the scores")


def line_digest(line):
    """Changes with the line and with the code of the bootstrap."""
    made_from = json.dumps([line, BOOTSTRAP_CODE, auc.DRAWS], sort_keys=True)
    return hashlib.sha256(made_from.encode()).hexdigest()[:16]


def make_record(results, line):
    """What was tested, its groups, AUC under each bootstrap sample and of each part (a draw of
    labels, a fold); in units of PRECISION, None where a class is missing."""
    *tested, probabilities = read_scores(results, line)
    images, labels, groups = tested
    draws = auc.bootstrap(labels, probabilities, auc.sample_weights(labels, groups))
    parts = probabilities if probabilities.ndim == 3 else probabilities[None]
    once = np.ones((len(labels), 1))
    of_parts = [auc.bootstrap_part(labels, part, once)[0] for part in parts]

    def kept(values):
        return [None if np.isnan(value) else round(value / PRECISION) for value in values]

    return {
        "line": line_digest(line),
        "tested": hashlib.sha256(b"".join(array.tobytes() for array in tested)).hexdigest()[:8],
        "groups": len(np.unique(groups)),
        "draws": kept(draws),
        "parts": kept(of_parts),
    }


def estimate_row(found, name, other=None):
    """auc.estimate of a row, or of its difference to another row, from task_statistics."""
    return estimate_sum(found, {name: 1} if other is None else {name: 1, other: -1})


def estimate_sum(found, weights):
    """auc.estimate of a weighted sum of rows, {name: weight}, from task_statistics."""
    rows = [found["aucs"][name] for name in weights]
    places = [list(found["aucs"]).index(name) for name in weights]
    covariance = found["covariance"][np.ix_(places, places)]
    between_runs = found["between_runs"]
    return auc.estimate(rows, list(weights.values()), covariance, between_runs, found["groups"])


def cost(rows, name):
    """Means over a row's encoders: {"slices", "steps", "dose", "pretrain_seconds"}; or {}."""
    runs = {row["encoder"]: row for row in rows if row["name"] == name and row["slices"]}
    if not runs:
        return {}  # scratch, or encoders without a log
    columns = ["slices", "steps", "dose", "pretrain_seconds"]
    return {column: np.mean([float(run[column]) for run in runs.values()]) for column in columns}


def auc_table(rows, names, base, found):
    """Lines of the table of cost and AUC, its head first."""
    costs = {name: cost(rows, name) for name in names}
    heads = [task_head(task, found[task]) for task in found]
    lines = [["row", "slices", "steps", "equal to", "dose", "pre-training", "speed-up", *heads]]
    for name in names:
        aucs = [auc_cell(found[task], name) for task in found]
        lines.append([name, *cost_cells(costs, name, base), *aucs])
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
    known = costs[name]
    if not known:
        return ["-"] * 6
    equal = []
    for other, column in ((BUDGET, "slices"), (base, "steps")):
        theirs = costs.get(other)
        if theirs and abs(known[column] - theirs[column]) <= EQUAL * theirs[column]:
            equal.append(f"{other}'s {column}")
    seconds = known["pretrain_seconds"]
    speed_up = f"{costs[base]['pretrain_seconds'] / seconds:.1f} x" if costs.get(base) else "-"
    cells = [f"{known['slices']:.0f}", f"{known['steps']:.0f}", ", ".join(equal) or "-"]
    return [*cells, f"{known['dose']:.2f}", f"{seconds:.0f} s", speed_up]


def auc_cell(found, name):
    """0.957 ± 0.002 [0.952, 0.962]: mean and SD over runs, and the interval."""
    if name not in found["aucs"]:
        return "-"
    aucs = found["aucs"][name]
    text = f"{np.mean(aucs):.3f}"
    if len(aucs) > 1:
        text += f" ± {np.std(aucs, ddof=1):.3f}"
    return text + interval_text(estimate_row(found, name), ".3f", found["groups"])


def interval_text(estimated, style, groups):
    """[low, high] with a leading space; empty where neither runs nor images are known."""
    if estimated["runs"] == 1 and not groups:
        return ""
    low, high = estimated["interval"]
    text = f" [{low:{style}}, {high:{style}}]"
    return text + (" images only" if estimated["runs"] == 1 else "")


def difference_tables(names, base, found):
    """How many p are corrected, the table of differences to the baseline, and their power."""
    estimates = {
        (name, task): estimate_row(found[task], name, base)
        for name in names
        for task in found
        if name != base and {name, base} <= set(found[task]["aucs"])
    }
    tested = [one for one in estimates.values() if one["p"] is not None]
    for one, corrected in zip(tested, auc.holm([one["p"] for one in tested])):
        one["holm"] = corrected
    lines = [["row", *(task_head(task, found[task]) for task in found)]]
    for name in names:
        if name != base:
            cells = [difference_cell(estimates.get((name, task)), found[task]) for task in found]
            lines.append([name, *cells])
    text = [f"Differences with a p, for which Holm corrects: {len(tested)}.", markdown(lines)]
    for task in found:
        of_task = [estimates[key] for key in estimates if key[1] == task]
        text.append(power(task, base, of_task))
    return text


def difference_cell(estimated, found):
    if estimated is None:
        return "-"
    text = f"{estimated['value']:+.3f}" + interval_text(estimated, "+.3f", found["groups"])
    if estimated["p"] is None:
        return f"{text}, p needs 2 runs of both rows"
    text += f" {p_text(estimated['p'])}, Holm {p_text(estimated['holm'])}"
    return text + (" (may be chance)" if estimated["holm"] >= 0.05 else "")


def p_text(p):
    return "p<0.001" if p < 0.001 else f"p={p:.3f}"


def power(task, base, estimates):
    """What the runs and images at hand can tell, in words."""
    if not estimates:
        return f"{task}: nothing to compare to {base}."
    detectable = [one["detectable"] for one in estimates if one["p"] is not None]
    if not detectable:
        return f"{task}: no p, since a difference needs 2 pre-training runs or more of both rows."
    by_row = f" ({min(detectable):.3f} to {max(detectable):.3f}, by row)"
    return (
        f"{task}: a row and {base} cannot be told apart below a true difference of "
        f"{np.median(detectable):.3f}{by_row if len(detectable) > 1 else ''}: it takes that to "
        "find p < 0.05, uncorrected, with 80 % power from these runs and images."
    )


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
