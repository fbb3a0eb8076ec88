"""results.csv and its bootstrap, the tables made of them in Markdown, and the paper's numbers."""

import csv
import io
import json
from typing import NamedTuple

import numpy as np

from common import auc
from common.files import append_lines, atomic_write, fail, read_json, whole_lines

COLUMNS = (  # settings, code: "name=value name=value ..."
    # encoder: its hash. seed: of head and order of images (finetune), or of the pre-training
    "task name encoder protocol seed "
    # label_share: 1, or such as 0.01. folds: such as 5x10, folds x repeats; empty: the task's split
    "label_share folds train val test "
    # auc_sd: over draws of labels, or over repeats
    "auc auc_sd f1 accuracy seconds "
    # from the log beside the encoder
    "slices steps dose pretrain_seconds "
    "settings code"
).split()
KEY = ["task", "name", "protocol", "seed", "label_share", "folds"]  # a later line replaces its like
ONE_TABLE = ["task", "protocol", "label_share", "folds"]
IDENTITY = [*KEY, "encoder", "auc"]  # of a record in results-draws.jsonl
COST = {"slices": ".0f", "steps": ".0f", "dose": ".2f", "pretrain_seconds": ".0f"}  # as printed
CAUTION = {"organ": "no scan numbers, so intervals are too narrow"}  # by task
HOW_TO_READ = """\
A run is one pre-training (for scratch: one set of random weights). AUC: mean over runs ± their SD.
[95 % interval]: a t interval over runs with the test images added: the variance between runs, taken
as equal for all rows of a table, and that of a bootstrap of whole groups of test images, by class;
too narrow with fewer than 20 groups. A row with one run says nothing about other runs: its interval
covers images only, and it has no p. Where few labels were drawn, all hold for these draws. Repeats
of cross-validation average out the luck of the split, and are no new data. Holm: p corrected for
all differences of its table alone."""
PAPER = {  # task: its name there, AUC of ALL and of reduced data in the abstract
    "covid-ct": ("COVID-CT", 0.78, 0.83),
    "organ": ("OrganSMNIST", 0.97, 0.98),
    "head-ct": ("brain CT (here head-ct)", 0.73, 0.83),
}
DRAFTS = {  # of charts that the authors published before the paper; three cells agree with it
    ("covid-ct", "PET-CT"): [0.737, 0.775, 0.802, 0.820, 0.838, 0.819, 0.830, 0.812, 0.817],
    ("covid-ct", "LIDC"): [0.737, 0.807, 0.815, 0.806, 0.816, 0.813, 0.823, 0.811, 0.826],
    ("head-ct", "PET-CT"): [0.678, 0.727, 0.795, 0.799, 0.760, 0.799, 0.832, 0.768, 0.787],
    ("head-ct", "LIDC"): [0.678, 0.734, 0.827, 0.859, 0.802, 0.790, 0.841, 0.798, 0.868],
}
DRAFT_ROWS = "scratch ALL EveryN SSIM MI Hash-3 Hash-6 Hash-12 HashAll".split()


# --- results.csv; beside it the test scores and the bootstrap of each line.


def read_results(path):
    """results.csv as dicts of text, of each KEY the last line; [] where there is no file."""
    head, *lines = list(csv.reader(whole_lines(path))) or [COLUMNS]
    if head != COLUMNS or any(len(cells) != len(COLUMNS) for cells in lines):
        fail(f"{path}: damaged, or of another version of evaluate.py: give another --results")
    lines = [dict(zip(COLUMNS, cells, strict=True)) for cells in lines]
    return list({tuple(line[column] for column in KEY): line for line in lines}.values())


def add_line(results, line, tested, labels, groups, probabilities):
    """Add a line to results.csv, after its test scores and their bootstrap; a later one counts.

    tested: int [n], images of the task. labels, groups: int [n], theirs. probabilities: as in
    auc.bootstrap.
    """
    probabilities = probabilities.astype(np.float32)
    with atomic_write(scores_file(results, line)) as file:
        np.savez_compressed(
            file, images=tested, labels=labels, groups=groups, probabilities=probabilities
        )
    record = dict(zip(IDENTITY, identity(line), strict=True))
    record |= auc.bootstrap_of(tested, labels, groups, probabilities)
    append_lines(draws_file(results), json.dumps(record) + "\n")
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerow(line)
    append_lines(results, text.getvalue(), head=",".join(COLUMNS) + "\n")


def scores_file(results, line):
    """results-scores/TASK-NAME-PROTOCOL[-share-0.01][-folds-5x10]-SEED.npz of a line."""
    share = f"-share-{line['label_share']}" if line["label_share"] != "1" else ""
    folds = f"-folds-{line['folds']}" if line["folds"] else ""
    name = f"{line['task']}-{line['name']}-{line['protocol']}{share}{folds}-{line['seed']}"
    return results.with_name(f"{results.stem}-scores") / f"{name}.npz"


def draws_file(results):
    """results-draws.jsonl beside results.csv: small enough to publish, where scores are not."""
    return results.with_name(f"{results.stem}-draws.jsonl")


def made_by(line):
    """{"settings": {name: value}, "code": {file: digest}} of a line, all as text."""
    return {
        column: dict(word.partition("=")[::2] for word in line[column].split())
        for column in ("settings", "code")
    }


def identity(line):
    return tuple(str(line[column]) for column in IDENTITY)


def read_draws(results):
    """{identity of a line: its record}; its "draws" and "parts" are AUCs, NaN for none."""
    records = {}
    for record in read_json(draws_file(results), lines=True):
        for key in ("draws", "parts"):
            record[key] = auc.PRECISION * np.array(record.get(key, []), float)
        records[identity(record)] = record
    return records


# --- A table: all rows of one task and protocol.


class Table(NamedTuple):
    lines: list  # of results.csv
    aucs: dict  # row: AUC of each run, float [runs]
    covariance: np.ndarray  # auc.image_covariance in the order of aucs, [rows, rows]
    groups: int  # independent groups of test images; 0 where draws are missing
    between_runs: tuple  # auc.variance_between_runs

    def estimate(self, weights):
        """auc.Estimate of a weighted sum of rows: {"Hash-6": 1, "ALL": -1} is their difference."""
        places = [list(self.aucs).index(name) for name in weights]
        return auc.estimate(
            [self.aucs[name] for name in weights],
            list(weights.values()),
            self.covariance[np.ix_(places, places)],
            self.between_runs,
            self.groups,
        )

    def cost(self, name):
        """Means over a row's encoders: {"slices", "steps", "dose", "pretrain_seconds"}; or {}."""
        runs = {line["encoder"]: line for line in self.lines if line["name"] == name}
        logged = [line for line in runs.values() if line["slices"]]
        if not logged:
            return {}  # scratch, or encoders without a log
        return {column: np.mean([float(line[column]) for line in logged]) for column in COST}

    def images(self):
        """Such as: n=203, 120 groups."""
        task, images = self.lines[0]["task"], self.lines[0]["test"]
        groups = f", {self.groups} groups" if str(self.groups) not in ("0", images) else ""
        return f"n={images}{groups}" + (f"; {CAUTION[task]}" if task in CAUTION else "")


def read_tables(results):
    """{(task, protocol, label_share, folds): Table}."""
    of_tables = {}
    for line in read_results(results):
        of_tables.setdefault(tuple(line[column] for column in ONE_TABLE), []).append(line)
    if not of_tables:
        fail(f"{results}: holds no results: evaluate.py TASK ... --results CSV makes some")
    for key, lines in of_tables.items():
        settings = sorted({line["settings"] for line in lines})
        if len(settings) > 1:
            fail(f"{results}: {title(key)}: cannot compare lines of {' and of '.join(settings)}")
    records = read_draws(results)
    return {key: table_of(lines, records) for key, lines in of_tables.items()}


def table_of(lines, records):
    rows = {}  # name: {run: the identities of its lines}; every seed of scratch is a run
    for line in lines:
        run = line["encoder"], line["encoder"] == "scratch" and line["seed"]
        rows.setdefault(line["name"], {}).setdefault(run, []).append(identity(line))

    def by_run(values, runs):
        return np.array([np.mean([values[line] for line in run], axis=0) for run in runs.values()])

    values = {identity(line): float(line["auc"]) for line in lines}
    aucs = {name: by_run(values, runs) for name, runs in rows.items()}
    covariance, groups = np.zeros((len(rows), len(rows))), 0
    if all(line in records for line in values):
        values = {line: records[line]["draws"] for line in values}
        covariance = auc.image_covariance([by_run(values, runs) for runs in rows.values()])
        groups = records[identity(lines[0])]["groups"]
    return Table(lines, aucs, covariance, groups, auc.variance_between_runs(aucs.values()))


# --- Markdown.


def tables(results, baseline="ALL"):
    """All tables of a results.csv as one Markdown text; rows are compared to the row baseline."""
    text = [HOW_TO_READ]
    by_key = read_tables(results)
    for key, table in by_key.items():
        text += [f"## {title(key)}", *rows_and_power(table, baseline)]
        if not table.groups:
            text.append("Intervals cover runs only: results-draws.jsonl lacks some lines.")
        text.append(f"Settings: {table.lines[0]['settings']}.")
    for task in dict.fromkeys(key[0] for key in by_key):
        if task in PAPER:
            text += paper_numbers(task)
    return "\n\n".join(text)


def title(key):
    """Such as: organ, linear, 1 % of the training labels, 5 folds x 10 repeats."""
    task, protocol, label_share, folds = key
    text = f"{task}, {protocol}"
    if label_share != "1":
        text += f", {100 * float(label_share):.3g} % of the training labels"
    if folds:
        text += ", {} folds x {} repeats".format(*folds.split("x"))
    return text


def rows_and_power(table, baseline):
    """The table, and what its differences could have shown: paragraphs."""
    head = ["row", *COST, "runs", f"AUC ({table.images()})"]
    lines = {}
    for name, aucs in table.aucs.items():
        cost = table.cost(name)
        costs = [f"{cost[column]:{COST[column]}}" if cost else "-" for column in COST]
        lines[name] = [name, *costs, len(aucs), auc_cell(table, name)]
    others = [name for name in table.aucs if name != baseline]
    if baseline not in table.aucs or not others:
        why = f"No difference: it takes a row {baseline} (or `--baseline ROW`) and another one."
        return [markdown([head, *lines.values()]), why]
    differences = {name: table.estimate({name: 1, baseline: -1}) for name in others}
    tested = {name: one for name, one in differences.items() if one.p is not None}
    corrected = dict(zip(tested, auc.holm([one.p for one in tested.values()]), strict=True))
    for name, difference in differences.items():
        value = f"{difference.value:+.3f}{interval_text(table, difference, '+.3f')}"
        lines[name] += [value, p_text(difference.p), p_text(corrected.get(name))]
    lines[baseline] += ["-"] * 3
    head += [f"difference to {baseline}", "p", "Holm"]
    power = "No p: a difference needs 2 pre-training runs or more of both rows."
    if tested:
        detectable = np.median([one.detectable for one in tested.values()])
        power = (
            f"A row and {baseline} cannot be told apart (p < 0.05, uncorrected, with 80 % power) "
            f"below a true difference of {detectable:.3f}, the median over rows."
        )
    return [markdown([head, *lines.values()]), power]


def auc_cell(table, name):
    """0.957 ± 0.002 [0.952, 0.962]: mean and SD over runs, and the interval."""
    aucs = table.aucs[name]
    spread = f" ± {np.std(aucs, ddof=1):.3f}" if len(aucs) > 1 else ""
    return f"{np.mean(aucs):.3f}{spread}{interval_text(table, table.estimate({name: 1}), '.3f')}"


def interval_text(table, estimate, style):
    """[low, high] with a leading space; empty where neither runs nor images are known."""
    if estimate.runs == 1 and not table.groups:
        return ""
    low, high = estimate.interval
    text = f" [{low:{style}}, {high:{style}}]"
    return text + (" images only" if estimate.runs == 1 else "")


def p_text(p):
    if p is None:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def paper_numbers(task):
    """The paper's numbers of one of its own tasks, as paragraphs."""
    name, everything, reduced = PAPER[task]
    text = f"AUC on {name}, from the abstract: ALL {everything}, reduced {reduced}."
    drafts = {data: aucs for (of_task, data), aucs in DRAFTS.items() if of_task == task}
    if not drafts:
        return [f"## {task}: the paper's numbers", text]
    text += " Below: drafts of the authors' charts, unconfirmed, by pre-training data."
    lines = [["row", *drafts]]
    for row, *aucs in zip(DRAFT_ROWS, *drafts.values(), strict=True):
        lines.append([row, *(f"{value:.3f}" for value in aucs)])
    return [f"## {task}: the paper's numbers", text, markdown(lines)]


def markdown(lines):
    """A Markdown table; the first line is its head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
