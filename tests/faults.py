"""Kills the scripts at random moments, starts them again, compares with a run left undisturbed.

python tests/faults.py --kills 20    # of each script; prints a line a kill
"""

import argparse
import csv
import json
import os
import shutil
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
    small = ["--arch", "resnet18", "--size", 32, "--epochs"]
    pretrain = ["-c", SAVE_AFTER_EVERY_STEP, folder / "store" / "hash-6.csv"]
    training = [*small, 6, "--optimizer", "adamw", "--batch-size", 8]
    evaluate = ["evaluate.py", "toy-organ", folder, "--encoder", "scratch", "--seeds", 3]
    ssim = ["--strategy", "ssim", "--keep", 0.2]
    return {
        "reduce.py": lambda out: ["reduce.py", folder / "ct", out, *ssim],
        "pretrain.py": lambda out: [*pretrain, out, *training],
        "evaluate.py": lambda out: [*evaluate, *small, 2, "--results", out / "results.csv"],
    }


def start(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **output)


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
    if path.suffix not in (".json", ".jsonl", ".csv"):
        return path.read_bytes()
    text = path.read_text()
    if path.suffix == ".csv":
        lines = list(csv.DictReader(text.splitlines()))
    else:  # a kill may leave the bootstrap of a line that never came
        one_a_line = path.suffix == ".jsonl"
        lines = [
            json.loads(t) for t in (dict.fromkeys(text.splitlines()) if one_a_line else [text])
        ]
    return [{key: line[key] for key in line if key not in TIMES} for line in lines]


def kill(command, after):
    """Kill the command after so many seconds; whether it still ran."""
    process = start(command)
    time.sleep(after)
    running = process.poll() is None
    process.kill()
    process.communicate()  # ends with the last process that holds its output, a worker maybe
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as work:
        for script, command in commands(Path(work)).items():
            for after, different in same_after_kills(command, Path(work, script), kills, seed=0):
                result = f"OTHER FILES: {', '.join(different)}" if different else "the same files"
                print(f"{script}: killed after {after:.1f} s: {result}", flush=True)


if __name__ == "__main__":
    main()
