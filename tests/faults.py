"""Kills the scripts at random moments, starts them again, compares with a run left undisturbed.

python tests/faults.py --kills 20    # of each script; prints a line a kill
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import toy  # noqa: E402

# what differs between equal runs
TIMES = {"seconds", "mtime_ns", "images_per_second", "waiting", "command", "pretrain_seconds"}
SAVE_AFTER_EVERY_STEP = (
    "import pretrain; from common.files import run_script; "
    "pretrain.SAVE_EVERY = 0; run_script(pretrain.main)"
)


def commands(folder):
    """{script: function of the output folder that gives its command}; writes toy data in folder."""
    toy.write_cohort(folder / "ct", patients=3, slices=30)
    toy.write_tasks(folder, size=32)
    finish(["reduce.py", folder / "ct", folder / "store", "--strategy", "hash"])
    selection = folder / "store" / "hash-6.csv"
    small = ["--arch", "resnet18", "--size", 32]

    def reduce(out):
        return ["reduce.py", folder / "ct", out, "--strategy", "ssim", "--keep", 0.2]

    def pretrain(out):
        flags = ["--optimizer", "adamw", "--batch-size", 8, "--epochs", 6]
        return ["-c", SAVE_AFTER_EVERY_STEP, selection, out, *small, *flags]

    def evaluate(out):
        flags = ["--encoder", "scratch", "--epochs", 2, "--seeds", 3]
        results = ["--results", out / "results.csv"]
        return ["evaluate.py", "toy-organ", folder, *results, *small, *flags]

    return {"reduce.py": reduce, "pretrain.py": pretrain, "evaluate.py": evaluate}


def start(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(command):
    """Run to the end; its seconds."""
    started = time.perf_counter()
    process = start(command)
    printed = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{command}\n{printed}")
    return time.perf_counter() - started


def content(folder):
    """{file: what it holds, without times} of everything below folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): without_times(path) for path in files}


def without_times(path):
    if path.suffix == ".json":
        lines = [json.loads(path.read_text())]
    elif path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    elif path.name == "results.csv":
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
    else:
        return path.read_bytes()
    return [{key: line[key] for key in line if key not in TIMES} for line in lines]


def kill(command, after):
    """Kill the command `after` seconds from its start, and wait until its workers have ended too.

    Returns whether it still ran.
    """
    process = start(command)
    time.sleep(after)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()  # ends with the last process that holds its output
    return running


def same_after_kills(command, folder, kills, seed):
    """Kill at `kills` random moments, each in a new folder, start again, compare with a reference.

    command: function of the output folder. Yields (seconds until the kill, names of the files that
    differ from those of a run left undisturbed).
    """
    reference = folder / "undisturbed"
    seconds = finish(command(reference))
    expected = content(reference)
    rng = np.random.default_rng(seed)
    done = 0
    while done < kills:
        out = folder / "killed"
        after = rng.uniform(0.2, 1) * seconds
        shutil.rmtree(out, ignore_errors=True)
        if not kill(command(out), after):  # it had ended already: faster than the first
            seconds = min(seconds, after)
            continue
        finish(command(out))
        done += 1
        found = content(out)
        names = sorted(expected | found)
        yield after, [name for name in names if found.get(name) != expected.get(name)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--script", help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        for script, command in commands(Path(work)).items():
            if args.script not in (None, script):
                continue
            same = 0
            for after, different in same_after_kills(
                command, Path(work, script), args.kills, args.seed
            ):
                same += not different
                result = f"OTHER FILES: {', '.join(different)}" if different else "the same files"
                print(f"{script}: killed after {after:.1f} s: {result}", flush=True)
            print(f"{script}: {same} of {args.kills} the same")


if __name__ == "__main__":
    main()
