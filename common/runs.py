"""runs.jsonl of a study: a record of each run that is evaluated whole, kept where its encoder is not.

python -m common.runs OUT MACHINE            keeps in results.csv and runs.jsonl the whole runs only
python -m common.runs OUT ROW SEED MADE_BY   adds the record of a run
"""

import json
import sys
from pathlib import Path

from common.files import atomic_write, fail, locked
from common.results import read_results, write_results

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
    on this kind of machine (such as "cpu torch.bfloat16"). Lines of other evaluations than OUTCOMES
    stay.
    """
    results, path = out / "results.csv", out / "runs.jsonl"
    with locked(results):
        lines = read_results(results)
        records = read_runs(path)
        if records and not lines:
            fail(f"{results}: holds nothing, but {path} tells of runs: restore it, or delete both")
        if lines and not path.exists():
            fail(f"{path}: missing, but {results} has lines: restore it, or give another --out")
        if any(None in line.values() for line in lines):
            fail(f"{results}: holds lines that are cut short, or of a merge: mend it by hand")
        planned = [line for line in lines if evaluation_of(line) in OUTCOMES.values()]
        whole = {run for run in records if is_whole(planned, *run)}
        found = {*records, *map(run_of, planned)}
        for row, seed in sorted(found - whole):
            print(f"{row} seed {seed}: not evaluated whole: its lines and record are dropped")
        store = store_of(out)
        for row, seed in sorted(whole):
            if records[row, seed]["store"] != store:
                fail(f"{path}: {row} seed {seed} was trained on other CT: give another --out")
        kept = [record for run, record in records.items() if run in whole]
        check_machine(path, kept, machine)
        if whole < found:
            others = [line for line in lines if line not in planned]
            write_results(results, [line for line in planned if run_of(line) in whole] + others)
        with atomic_write(path, text=True) as file:  # also without what was cut short
            file.writelines(map(text_of, kept))


def run_of(line):
    return line["name"], line["seed"]


def evaluation_of(line):
    return line["task"], (line["protocol"], line["label_share"], line["folds"])


def is_whole(lines, row, seed):
    """Whether each of OUTCOMES was evaluated once, and all with one encoder."""
    planned = sorted(OUTCOMES.values())
    found = [line for line in lines if run_of(line) == (row, seed)]
    found = [line for line in found if evaluation_of(line) in planned]
    once = sorted(map(evaluation_of, found)) == planned
    return once and len({line["encoder"] for line in found}) == 1


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


def text_of(record):
    """A line of runs.jsonl: row and seed first, as reproduce.sh looks for them."""
    return json.dumps({"row": record["row"], "seed": record["seed"]} | record) + "\n"


def store_of(out):
    """The checksum of the slices, the same wherever they lie."""
    return json.loads((out / "slices" / "store.json").read_text())["crc32"]["slices.npy"]


def add_record(out, row, seed, made_by):
    """Add a run, with the settings and the last line of its pre-training's log."""
    results, path = out / "results.csv", out / "runs.jsonl"
    record = {"row": row, "seed": int(seed), "made_by": made_by, "store": store_of(out)}
    record["log"] = None
    if row != "scratch":
        log = (out / "runs" / f"{row}-seed-{seed}" / "log.jsonl").read_text().splitlines()
        record["log"] = json.loads(log[0]) | {"last": json.loads(log[-1])}
        del record["log"]["command"]  # full of paths
    if not is_whole(read_results(results), row, seed):
        fail(f"{results}: has not each evaluation of {row} seed {seed} once, of one encoder")
    with locked(path), open(path, "a") as file:
        file.write(text_of(record))


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    keep_whole_runs(Path(folder), *rest) if len(rest) == 1 else add_record(Path(folder), *rest)
