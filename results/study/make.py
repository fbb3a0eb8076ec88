"""Make the runs of plan.md or of length.md, in an order in which a study cut short still answers.

    python results/study/make.py DATA OUT --jobs 2
    python results/study/make.py DATA OUT --plan length --jobs 8 --seconds 1700

DATA holds ct/, covid-ct/, organ/ and head-ct/ (see the README). OUT/runs.jsonl gets a record of
each run that is evaluated whole; stopped and started again, it goes on with the others. Exit
status: 0, all is made; 3, the time is over: call it again; 1, something failed.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import files
from common.ct import is_image
from common.store import read_lines
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
PLAN = {  # of plan.md. row: flags of reduce.py, flags of pretrain.py, pre-training runs
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

# Of length.md. LARS has the script's own rate.
LARS, ADAMW = "--optimizer lars", "--optimizer adamw --lr 0.001"
RECIPE = f"{NETWORK} --batch-size 128 --warmup 0.1"
RANDOM_128 = "--strategy random --keep 128 --scope dataset --seed {seed}"
SELECTED = {"ALL": ALL, "Hash-6": HASH_6, "Random-matched": MATCHED, "Random-128": RANDOM_128}
ENDINGS = {"": "", "-wd": " --weight-decay 0.05", "-held": " --hold-out 0.1"}
LENGTH = {  # row: flags of reduce.py, flags of pretrain.py; more rows than ORDER asks for
    f"{prefix}{name}-{steps}{ending}": (flags, f"{optimizer} --steps {steps}{more}")
    for prefix, optimizer in {"LARS-": LARS, "": ADAMW}.items()
    for name, flags in SELECTED.items()
    for steps in (750, 2250, 5600, 12000, 38400)
    for ending, more in ENDINGS.items()
}
LENGTH |= {  # Half-: of a random half of the patients
    "Check-750": (ALL, f"{ADAMW} --steps 750"),
    "Half-ALL": (ALL, f"{ADAMW} --epochs 800"),
    "Half-Hash-6": (HASH_6, f"{ADAMW} --epochs 800"),
    "Half-ALL-short": (ALL, f"{ADAMW} --steps-of {{out}}/runs/Half-Hash-6-seed-{{seed}}"),
}
ORDER = [  # seeds and rows of length.md; within a line seed by seed
    (range(3), "Check-750"),
    (range(100, 104), "LARS-ALL-38400"),
    (range(100, 106), "LARS-ALL-5600 LARS-Hash-6-5600 LARS-Random-matched-5600"),
    (range(100, 104), "ALL-38400"),
    (range(100, 106), "ALL-5600 Hash-6-5600 Random-matched-5600"),
    (range(100, 103), "Random-128-38400"),
    (range(100, 106), "Random-128-5600 LARS-Random-128-5600"),
    (range(100, 108), "Half-ALL Half-Hash-6"),
    (range(100, 103), "LARS-Hash-6-38400 Hash-6-38400"),
    (range(100, 108), "Half-ALL-short"),  # long after the runs whose steps it takes
    (range(100, 103), "LARS-ALL-12000 ALL-12000 LARS-ALL-2250 ALL-2250"),
    (range(106, 108), "LARS-Hash-6-5600 LARS-Random-matched-5600"),
    (range(106, 108), "Hash-6-5600 Random-matched-5600"),
    (range(8), "scratch"),
    (range(100, 103), "LARS-Random-matched-38400 Random-matched-38400 LARS-ALL-750 ALL-750"),
    (range(100, 103), "ALL-38400-wd ALL-5600-wd Hash-6-5600-wd"),
    (range(100, 102), "ALL-38400-held ALL-12000-held ALL-5600-held ALL-2250-held"),
    (range(100, 102), "LARS-ALL-38400-held"),
    *((range(100, 103), f"LARS-Hash-6-{steps} Hash-6-{steps}") for steps in (12000, 2250, 750)),
    (range(100, 103), "LARS-Random-matched-12000 Random-matched-12000 LARS-Random-128-38400"),
    (range(100, 103), "LARS-Random-matched-2250 Random-matched-2250"),
    (range(100, 103), "LARS-Random-matched-750 Random-matched-750"),
]
FINETUNE = "--protocol finetune --arch resnet18"  # else the paper's: 224 px
FINETUNED = ["scratch", "ALL-38400", "ALL-5600", "Hash-6-5600"]  # on covid-ct, at the end
FINETUNED += [f"LARS-{row}" for row in FINETUNED[1:]]

TIME_IS_OVER = 3  # exit status
LOGGED = ["step", "loss", "top1", "positive", "held_out_loss", "held_out_positive"]
LINES = 60  # of a run's log that go into its record, at even ratios
one_at_a_time = threading.Lock()  # reduce.py works alone in a store


def main():
    parser = files.Flags(description=__doc__)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--jobs", type=files.number(int, least=1), default=1, help="runs at a time")
    parser.add_argument("--plan", choices=["750", "length"], default="750", help="plan.md (750)")
    seconds = "after which nothing is begun, and what runs is stopped"
    parser.add_argument("--seconds", type=files.number(least=0), help=seconds)
    args = parser.parse_args()
    args.selected = set()  # selections that are made or were found in this call
    args.ends_at = None if args.seconds is None else time.monotonic() + args.seconds
    os.environ["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // args.jobs, 1))
    try:
        with files.exclusive(args.out):
            make_all(args)
    except subprocess.TimeoutExpired:  # what ran was killed, and goes on at the next call
        left = len(runs_to_make(args.out, args.plan))
        print(f"time is over, {left} runs left, then fine-tuning: the same command goes on")
        sys.exit(TIME_IS_OVER)


def make_all(args):
    runs = runs_to_make(args.out, args.plan)
    # other selections need these two and the encoder of the first; and the CT may have changed
    select(args, "ALL", 0)
    select(args, "Hash-6", 0)
    if ("ALL", 0) in runs:
        runs.remove(("ALL", 0))
        make_run(args, "ALL", 0)
    with ThreadPoolExecutor(args.jobs) as pool:
        # where one fails, map starts no other
        list(pool.map(lambda run: make_run(args, *run), runs))
        if args.plan == "length":
            list(pool.map(lambda row: finetune(args, row), FINETUNED))


def planned(plan):
    """[(row, seed)] in the order in which they are made."""
    if plan == "length":
        return [(row, seed) for seeds, rows in ORDER for seed in seeds for row in rows.split()]
    most = max(number for *_, number in PLAN.values())
    return [(row, seed) for seed in range(most) for row in PLAN if seed < PLAN[row][2]]


def runs_to_make(out, plan="750"):
    """[(row, seed)] of the plan less those of OUT/runs.jsonl."""
    path = out / "runs.jsonl"
    records = {(made["row"], made["seed"]): made for made in files.read_json(path, lines=True)}
    runs = planned(plan)
    for row, seed in set(runs) & set(records):
        made = f"{path}: {row} seed {seed}"
        files.refuse_other(made, records[row, seed], settings(row), "give another OUT")
    return [run for run in runs if run not in records]


def settings(row):
    """The flags of the three scripts, as text; of a flag that stands twice the last counts."""
    reduce_flags, pretrain_flags, *_ = (PLAN | LENGTH)[row]
    return {
        "reduce": f"{REDUCE} {reduce_flags}",
        "pretrain": f"{PRETRAIN if row in PLAN else RECIPE} {pretrain_flags}",
        "evaluate": f"{EVALUATE}: {', '.join(EVALUATIONS)}",
    }


def flags_of(args, row, seed, script):
    return [word.format(out=args.out, seed=seed) for word in settings(row)[script].split()]


def select(args, row, seed):
    """The file of a row's selection, named after the first row that has it; made if need be."""
    rows = PLAN | LENGTH
    name = next(other for other in rows if rows[other][0] == rows[row][0])
    if "{seed}" in rows[row][0]:
        name += f"-seed-{seed}"
    half = row.startswith("Half-")
    store = args.out / "slices" / (f"half-{seed}" if half else "")
    selection = store / f"{name}.csv"
    with one_at_a_time:
        if selection not in args.selected:
            ct = draw_half(args, seed) if half else args.data / "ct"
            flags = ["--name", name, *flags_of(args, row, seed, "reduce")]
            call(args, args.out / "runs" / f"select-{name}.txt", "reduce.py", ct, store, *flags)
            args.selected.add(selection)
    return selection


def draw_half(args, seed):
    """OUT/halves/SEED: links to the slices of a random half of the patients of DATA/ct."""
    ct, half = args.data / "ct", args.out / "halves" / str(seed)
    lines = list(read_lines(args.out / "slices" / "slices.csv"))
    first = {line["volume"]: ct / line["file"] for line in reversed(lines)}
    patients = {volume: patient_of(path, volume) for volume, path in first.items()}
    names = sorted(set(patients.values()))
    drawn = set(np.random.default_rng(seed).permutation(names)[: len(names) // 2])
    for line in lines:
        if patients[line["volume"]] in drawn:
            link = half / line["file"]
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to((ct / line["file"]).resolve())
    return half


def patient_of(path, volume):
    """PatientID of a DICOM file; of an image, or where there is none, the volume."""
    if is_image(path.name):
        return volume
    header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
    return str(header.get("PatientID") or volume)


def make_run(args, row, seed):
    """Pre-train, evaluate, add the record; the scripts know what is done."""
    run = args.out / "runs" / f"{row}-seed-{seed}"
    log = run.with_name(f"{run.name}.txt")  # a name holds dots
    encoder = ["scratch", "--seeds", seed + 1]
    if row != "scratch":
        selection = select(args, row, seed)
        flags = ["--seed", seed, *flags_of(args, row, seed, "pretrain")]
        call(args, log, "pretrain.py", selection, run, *flags)
        encoder = [run / "encoder.pt"]
    results = args.out / "results.csv"
    for evaluation in EVALUATIONS:
        task, *flags = evaluation.split()
        flags += [*EVALUATE.split(), "--name", row, "--results", results, "--encoder", *encoder]
        call(args, log, "evaluate.py", task, args.data / task, *flags)
    record = json.dumps(record_of(row, seed, results, run))
    files.append_lines(args.out / "runs.jsonl", record + "\n")
    print(f"{row} seed {seed}: done", flush=True)


def record_of(row, seed, results, run):
    """A line of runs.jsonl: the encoder, what made it, the first and last line of its log."""
    lines = {(line["name"], line["seed"]): line for line in read_results(results)}
    line = lines[row, str(seed)]
    record = {"row": row, "seed": seed, "encoder": line["encoder"]}
    record["machine"] = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    record |= {"settings": settings(row), "code": made_by(line)["code"], "log": None}
    if row != "scratch":
        first, *lines = files.read_json(run / "log.jsonl", lines=True)
        record["code"] |= first["code"]
        del first["command"]  # full of paths
        some = np.unique(np.geomspace(1, len(lines), LINES).round().astype(int)) - 1
        course = [{key: lines[i][key] for key in LOGGED if key in lines[i]} for i in some]
        record["log"] = first | {"last": lines[-1], "course": course}
    return record


def finetune(args, row):
    """Fine-tune all runs of a row on covid-ct, in one call: evaluate.py numbers them."""
    seeds = [seed for of_row, seed in planned(args.plan) if of_row == row]
    encoders = [args.out / "runs" / f"{row}-seed-{seed}" / "encoder.pt" for seed in seeds]
    flags = [*FINETUNE.split(), "--name", row, "--results", args.out / "results.csv"]
    flags += ["--seeds", len(seeds), "--encoder", *(encoders if row != "scratch" else [row])]
    log = args.out / "runs" / f"finetune-{row}.txt"
    call(args, log, "evaluate.py", "covid-ct", args.data / "covid-ct", *flags)
    print(f"{row}: fine-tuned", flush=True)


def call(args, log, script, *arguments):
    """Run a script; its output is added to the log. Stop with one line if it fails."""
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, files.ROOT / script, *map(str, arguments)]
    left = args.ends_at and args.ends_at - time.monotonic()
    if left is not None and left <= 0:
        raise subprocess.TimeoutExpired(command, 0)
    with open(log, "a") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        done = subprocess.run(command, **streams, timeout=left)
    if done.returncode:
        files.fail(f"{script} failed: see the end of {log}")


if __name__ == "__main__":
    files.run_script(main)
