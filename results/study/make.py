"""Make the runs of plan.md: seed by seed over all rows, so that a study cut short is balanced.

    python results/study/make.py DATA OUT --jobs 2

DATA holds ct/, covid-ct/, organ/ and head-ct/ (see the README). OUT/runs.jsonl gets a record of
each run that is evaluated whole; stopped and started again, it goes on with the others.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import files
from common.tables import made_by, read_results

# {out} is OUT, {seed} that of the run; selections may use Hash-6.csv and ALL's first encoder.
ALL = "--strategy all"
HASH_6 = "--strategy hash --threshold 6"
KEEP = "--keep {out}/slices/Hash-6.csv"
MATCHED = "--strategy random --like {out}/slices/Hash-6.csv --seed {seed}"
EMBEDDING = "--strategy embedding --encoder {out}/runs/ALL-seed-0/encoder.pt"
C8, C32 = "--neighbours 8", "--neighbours 32"
MASKED = "--mask-negatives 6"  # near-duplicates of a slice's volume
DOUBLE = "--batch-size 256 --loss-groups 2"
PLAN = {  # row: flags of reduce.py, flags of pretrain.py, pre-training runs
    "scratch": ("", "", 12),
    "ALL": (ALL, "", 12),
    "Hash-6": (HASH_6, "", 8),
    "Random-matched": (MATCHED, "", 8),
    "ALL-masked": (ALL, MASKED, 8),
    "Clusters-6": (HASH_6, "--sample clusters", 8),
    "ALL-c8": (ALL, C8, 6),
    "ALL-c8-masked": (ALL, f"{C8} {MASKED}", 6),
    "ALL-c32": (ALL, C32, 6),
    "ALL-c32-masked": (ALL, f"{C32} {MASKED}", 6),
    "ALL-c32-masked-volume": (ALL, f"{C32} --mask-negatives 64", 6),  # all: 64 bits
    "ALL-c32-random": (ALL, f"{C32} {MASKED} --mask-random", 6),
    "ALL-double": (ALL, DOUBLE, 6),
    "ALL-c32-double": (ALL, f"{C32} {DOUBLE}", 6),
    "EveryN": (f"--strategy every-n {KEEP}", "", 3),
    "SSIM-budget": (f"--strategy ssim {KEEP}", "", 3),
    "MI-budget": (f"--strategy mi {KEEP}", "", 3),
    "Embedding-budget": (f"{EMBEDDING} {KEEP}", "", 3),
    "Redundant": ("--strategy redundant --like {out}/slices/Hash-6.csv", "", 3),
    "ALL-steps-x0.5": (ALL, "--steps 375", 4),
    "Hash-6-steps-x0.5": (HASH_6, "--steps 375", 4),
    "Random-matched-steps-x0.5": (MATCHED, "--steps 375", 4),
    "ALL-steps-x3": (ALL, "--steps 2250", 4),
    "Hash-6-steps-x3": (HASH_6, "--steps 2250", 4),
    "Random-matched-steps-x3": (MATCHED, "--steps 2250", 4),
    "Hash-6-steps-x0.146": (HASH_6, "--steps 110", 4),
    "Random-matched-steps-x0.146": (MATCHED, "--steps 110", 4),
}
EVALUATIONS = [  # task and flags of evaluate.py
    "organ --label-share 0.01 0.1 1",
    "covid-ct --folds 5 --repeats 10",
    "covid-ct",
    "head-ct --folds 5 --repeats 10",
]
REDUCE = "--size 128"
NETWORK = "--arch resnet18 --size 64"
PRETRAIN = f"{NETWORK} --batch-size 128 --optimizer adamw --lr 0.001 --warmup 0.1 --steps 750"
EVALUATE = f"--protocol linear {NETWORK}"


def main():
    parser = files.Flags(description=__doc__)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--jobs", type=files.number(int, least=1), default=1, help="runs at a time")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // args.jobs, 1))
    with files.exclusive(args.out):
        runs = runs_to_make(args.out)
        # other selections need these two and the encoder of the first; and the CT may have changed
        select(args, "ALL", 0)
        select(args, "Hash-6", 0)
        if ("ALL", 0) in runs:
            runs.remove(("ALL", 0))
            make_run(args, "ALL", 0)
        needed = {selection_of(args, *run): run for run in runs if run[0] != "scratch"}
        for run in needed.values():
            select(args, *run)
        with ThreadPoolExecutor(args.jobs) as pool:
            # where one fails, map starts no other
            list(pool.map(lambda run: make_run(args, *run), runs))


def runs_to_make(out):
    """[(row, seed)] of the plan, seed by seed, less those of OUT/runs.jsonl."""
    path = out / "runs.jsonl"
    records = {(made["row"], made["seed"]): made for made in files.read_json(path, lines=True)}
    most = max(number for *_, number in PLAN.values())
    runs = [(row, seed) for seed in range(most) for row in PLAN if seed < PLAN[row][2]]
    for row, seed in set(runs) & set(records):
        made = f"{path}: {row} seed {seed}"
        files.refuse_other(made, records[row, seed], settings(row), "give another OUT")
    return [run for run in runs if run not in records]


def settings(row):
    """The flags of the three scripts, as text; of a flag that stands twice the last counts."""
    reduce_flags, pretrain_flags, _ = PLAN[row]
    return {
        "reduce": f"{REDUCE} {reduce_flags}",
        "pretrain": f"{PRETRAIN} {pretrain_flags}",
        "evaluate": f"{EVALUATE}: {', '.join(EVALUATIONS)}",
    }


def selection_of(args, row, seed):
    """Its file, named after the first row that has it."""
    name = next(other for other in PLAN if PLAN[other][0] == PLAN[row][0])
    if "{seed}" in PLAN[row][0]:
        name += f"-seed-{seed}"
    return args.out / "slices" / f"{name}.csv"


def select(args, row, seed):
    selection = selection_of(args, row, seed)
    flags = [word.format(out=args.out, seed=seed) for word in settings(row)["reduce"].split()]
    log = args.out / "runs" / f"select-{selection.stem}.txt"
    call(log, "reduce.py", args.data / "ct", selection.parent, "--name", selection.stem, *flags)


def make_run(args, row, seed):
    """Pre-train, evaluate, add the record; the scripts know what is done."""
    run = args.out / "runs" / f"{row}-seed-{seed}"
    log = run.with_name(f"{run.name}.txt")  # a name holds dots
    encoder = ["scratch", "--seeds", seed + 1]
    if row != "scratch":
        flags = ["--seed", seed, *settings(row)["pretrain"].split()]
        call(log, "pretrain.py", selection_of(args, row, seed), run, *flags)
        encoder = [run / "encoder.pt"]
    results = args.out / "results.csv"
    for evaluation in EVALUATIONS:
        task, *flags = evaluation.split()
        flags += [*EVALUATE.split(), "--name", row, "--results", results, "--encoder", *encoder]
        call(log, "evaluate.py", task, args.data / task, *flags)
    record = json.dumps(record_of(row, seed, results, run))
    files.append_lines(args.out / "runs.jsonl", record + "\n")
    print(f"{row} seed {seed}: done", flush=True)


def record_of(row, seed, results, run):
    """A line of runs.jsonl: the encoder, what made it, the first and last line of its log."""
    lines = {(line["name"], line["seed"]): line for line in read_results(results)}
    line = lines[row, str(seed)]
    record = {"row": row, "seed": seed, "encoder": line["encoder"]}
    record |= {"settings": settings(row), "code": made_by(line)["code"], "log": None}
    if row != "scratch":
        first, *_, last = files.read_json(run / "log.jsonl", lines=True)
        record["code"] |= first["code"]
        del first["command"]  # full of paths
        record["log"] = first | {"last": last}
    return record


def call(log, script, *arguments):
    """Run a script; its output is added to the log. Stop with one line if it fails."""
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, files.ROOT / script, *map(str, arguments)]
    with open(log, "a") as file:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    if done.returncode:
        files.fail(f"{script} failed: see the end of {log}")


if __name__ == "__main__":
    files.run_script(main)
