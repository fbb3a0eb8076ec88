"""runs.jsonl of a study: a record of each run that is evaluated whole, kept where its encoder is not.

python -m common.runs OUT                    keeps in results.csv and runs.jsonl the whole runs only
python -m common.runs OUT ROW SEED MADE_BY   adds the record of a run
"""

import json
import sys
from collections import Counter
from pathlib import Path

from common.files import atomic_write, fail, locked
from common.results import read_results, write_results

EVALUATION = ["task", "protocol", "label_share", "folds"]  # columns that tell one from another


def keep_whole_runs(out):
    """Drop what a killed run or a copy of a study at work left behind, and say so.

    A run is whole if runs.jsonl holds it and results.csv all evaluations that most runs have. Stops
    at records of other slices than those of the store in out/slices.
    """
    results, path = out / "results.csv", out / "runs.jsonl"
    with locked(results):
        lines = read_results(results)
        records = read_records(path)
        if records and not lines:
            fail(f"{results}: holds nothing, but {path} tells of runs: restore it, or delete both")
        evaluations = {run: set() for run in [*records, *map(run_of, lines)]}
        for line in lines:
            evaluations[run_of(line)].add(tuple(line[key] for key in EVALUATION))
        runs_with = Counter(one for run in evaluations for one in evaluations[run])
        needed = {one for one in runs_with if 2 * runs_with[one] > len(evaluations)}
        whole = {run for run in records if evaluations[run] >= needed}
        for row, seed in sorted(set(evaluations) - whole):
            print(f"{row} seed {seed}: not evaluated whole: its lines and record are dropped")
        store = store_of(out)
        for run in sorted(whole):
            if records[run]["store"] != store:
                fail(f"{path}: {run[0]} seed {run[1]} was trained on other CT: give another --out")
        if whole < set(evaluations):
            write_results(results, [line for line in lines if run_of(line) in whole])
        with atomic_write(path, text=True) as file:  # also without what was cut short
            file.writelines(json.dumps(records[run]) + "\n" for run in records if run in whole)


def run_of(line):
    return line["name"], line["seed"]


def read_records(path):
    """{(row, seed as text): record}, without lines that are cut short."""
    records = {}
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record["row"], str(record["seed"])] = record
    return records


def store_of(out):
    """The checksum of the slices, the same wherever they lie."""
    return json.loads((out / "slices" / "store.json").read_text())["crc32"]["slices.npy"]


def add_record(out, row, seed, made_by):
    """Add a run, with the settings and the last line of its pre-training's log."""
    record = {
        "row": row,
        "seed": int(seed),
        "made_by": made_by,
        "store": store_of(out),
        "log": None,
    }
    if row != "scratch":
        log = (out / "runs" / f"{row}-seed-{seed}" / "log.jsonl").read_text().splitlines()
        record["log"] = json.loads(log[0]) | {"last": json.loads(log[-1])}
        del record["log"]["command"]  # full of paths
    with locked(out / "runs.jsonl"), open(out / "runs.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    folder, *run = sys.argv[1:]
    add_record(Path(folder), *run) if run else keep_whole_runs(Path(folder))
