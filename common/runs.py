"""runs.jsonl of a study: a record of each run that is evaluated whole, kept where its encoder is not.

python -m common.runs OUT MACHINE            keeps in results.csv and runs.jsonl the whole runs only
python -m common.runs OUT ROW SEED MADE_BY   adds the record of a run
"""

import json
import sys
from pathlib import Path

from common.files import atomic_write, fail, locked
from common.results import read_results, write_results

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
    "ALL-c32-masked-volume": 6,
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
OUTCOMES = {  # evaluations of a whole run: column of the study's tables, task, tables.variants
    PRIMARY: ("organ", ("linear", "0.01", "")),
    "organ 10 %": ("organ", ("linear", "0.1", "")),
    "organ 100 %": ("organ", ("linear", "1", "")),
    "covid-ct": ("covid-ct", ("linear", "1", "5x10")),
    "covid-ct, official split": ("covid-ct", ("linear", "1", "")),
    "head-ct": ("head-ct", ("linear", "1", "5x10")),
}


def keep_whole_runs(out, machine):
    """Drop what a killed run or a copy of a study at work left behind, and say so.

    Stops at runs that were trained on other slices than those of the store in out/slices, or not
    on this kind of machine (such as "cpu torch.bfloat16"). Dropped lines go to results-dropped.csv.
    Lines of other rows than PLANNED, or of other evaluations than OUTCOMES, stay.
    """
    results, path = out / "results.csv", out / "runs.jsonl"
    with locked(results):
        lines = read_results(results)
        records, unreadable = read_runs(path)
        check_lines(results, path, lines, records)
        whole = {
            run: record
            for run, record in records.items()
            if record["encoder"] == encoder_of(lines, *run)
        }
        check_store(path, whole.values(), store_of(out))
        check_machine(path, whole.values(), machine)

        if unreadable:
            print(f"{path}: {unreadable} unreadable lines are dropped")
        dropped = [line for line in lines if is_planned(line) and run_of(line) not in whole]
        for row, seed in sorted({*records, *map(run_of, dropped)} - set(whole)):
            print(f"{row} seed {seed}: not evaluated whole: its lines and record are dropped")
        if dropped:
            apart = out / "results-dropped.csv"
            print(f"the lines dropped are kept in {apart}")
            write_results(apart, read_results(apart) + dropped)
            write_results(results, [line for line in lines if line not in dropped])
        with atomic_write(path, text=True) as file:
            file.writelines(map(text_of, whole.values()))


def check_lines(results, path, lines, records):
    """Stop where results.csv or runs.jsonl is missing beside the other, or results.csv damaged."""
    if records and not lines:
        fail(f"{results}: holds nothing, but {path} tells of runs: restore it, or delete both")
    if lines and not path.exists():
        fail(f"{path}: missing, but {results} has lines: restore it, or give another --out")
    if any(None in line or None in line.values() for line in lines):
        fail(f"{results}: holds lines that are cut short, or of a merge: mend it by hand")


def run_of(line):
    return line["name"], line["seed"]


def evaluation_of(line):
    return line["task"], (line["protocol"], line["label_share"], line["folds"])


def is_planned(line):
    return line["name"] in PLANNED and evaluation_of(line) in OUTCOMES.values()


def encoder_of(lines, row, seed):
    """The encoder with which each of OUTCOMES was evaluated once; None where it is not so."""
    found = [line for line in lines if run_of(line) == (row, seed) and is_planned(line)]
    once = sorted(map(evaluation_of, found)) == sorted(OUTCOMES.values())
    encoders = {line["encoder"] for line in found}
    return encoders.pop() if once and len(encoders) == 1 else None


def check_store(path, records, store):
    """Stop at a run that was trained on other slices."""
    for record in records:
        if record["store"] != store:
            run = f"{record['row']} seed {record['seed']}"
            fail(f"{path}: {run} was trained on other CT: give another --out")


def check_machine(path, records, machine):
    """Stop at a run that was trained on another kind of device, or in another precision."""
    for record in records:
        if not record["log"]:  # scratch
            continue
        device = "cpu" if record["log"]["device"] == "cpu" else "cuda"
        trained_on = f"{device} torch.{record['log']['settings']['precision']}"
        if trained_on != machine:
            fail(
                f"{path}: {record['row']} seed {record['seed']} was trained on {trained_on}, this "
                f"machine is {machine}: go on with one like that, or give another --out"
            )


def read_runs(path):
    """({(row, seed as text): record}, number of lines that are cut short or damaged)."""
    records = {}
    unreadable = 0
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            row, seed, _ = record["row"], record["seed"], record["encoder"]
            records[row, str(seed)] = record
        except (ValueError, KeyError, TypeError):
            unreadable += 1
    return records, unreadable


def text_of(record):
    """A line of runs.jsonl: row and seed first, as reproduce.sh looks for them."""
    return json.dumps({"row": record["row"], "seed": record["seed"]} | record) + "\n"


def store_of(out):
    """The checksum of the slices, the same wherever they lie."""
    return json.loads((out / "slices" / "store.json").read_text())["crc32"]["slices.npy"]


def add_record(out, row, seed, made_by):
    """Add a run, with the settings and the last line of its pre-training's log."""
    results, path = out / "results.csv", out / "runs.jsonl"
    encoder = encoder_of(read_results(results), row, seed)
    if encoder is None:
        fail(f"{results}: has not each evaluation of {row} seed {seed} once, of one encoder")
    record = {"row": row, "seed": int(seed), "encoder": encoder}
    record |= {"made_by": made_by, "store": store_of(out), "log": None}
    if row != "scratch":
        log = (out / "runs" / f"{row}-seed-{seed}" / "log.jsonl").read_text().splitlines()
        record["log"] = json.loads(log[0]) | {"last": json.loads(log[-1])}
        del record["log"]["command"]  # full of paths
    with locked(path), open(path, "a") as file:
        file.write(text_of(record))


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    keep_whole_runs(Path(folder), *rest) if len(rest) == 1 else add_record(Path(folder), *rest)
