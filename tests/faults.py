"""Kills the scripts at random moments, starts them again, and compares with a run that nobody disturbed.

python tests/faults.py --kills 20        # of each script; prints a line a kill
"""

import argparse
import csv
import io
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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common import toy  # noqa: E402

TIMES = {
    "seconds",
    "mtime_ns",
    "images_per_second",
    "waiting",
    "command",
    "pretrain_seconds",
}  # what differs between equal runs


def commands(folder):
    """{script: the command, without its output} on toy data written below folder; pretrain.py saves after every step."""
    toy.write_cohort(folder / "ct", patients=3, slices=30)
    toy.write_tasks(folder, size=32)
    subprocess.run(
        [sys.executable, "reduce.py", folder / "ct", folder / "store", "--strategy", "hash"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    often = [
        "-c",
        "import pretrain; from common.files import run_script; pretrain.SAVE_EVERY = 0; run_script(pretrain.main)",
    ]
    return {
        "reduce.py": lambda out: [
            "reduce.py",
            folder / "ct",
            out,
            "--strategy",
            "ssim",
            "--keep",
            0.2,
        ],
        "pretrain.py": lambda out: [
            *often,
            folder / "store" / "hash-6.csv",
            out,
            "--arch",
            "resnet18",
            "--optimizer",
            "adamw",
            "--size",
            32,
            "--batch-size",
            8,
            "--epochs",
            6,
        ],
        "evaluate.py": lambda out: [
            "evaluate.py",
            "toy-organ",
            folder,
            "--encoder",
            "scratch",
            "--results",
            out / "results.csv",
            "--arch",
            "resnet18",
            "--size",
            32,
            "--epochs",
            2,
            "--seeds",
            3,
        ],
    }


def start(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(command):
    """Run to the end; its seconds."""
    started, process = time.perf_counter(), start(command)
    printed = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{command}\n{printed}")
    return time.perf_counter() - started


def content(folder):
    """{file: what it holds, but for times} of everything below folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = timeless(path)
    return found


def timeless(path):
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [
            {key: value for key, value in json.loads(line).items() if key not in TIMES}
            for line in lines
        ]
    if path.name == "results.csv":
        rows = csv.DictReader(io.StringIO(path.read_text()))
        return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return path.read_bytes()


def killed(command, after):
    """SIGKILL the command `after` seconds from its start; waits until its workers are gone too. Whether it still ran."""
    process = start(command)
    time.sleep(after)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()  # ends when the last process that holds its output has gone
    return running


def same_after_kills(command, folder, kills, seed):
    """Kill at `kills` random moments, each in a new folder, start again, compare; yields (seconds, equal)."""
    reference, rng = folder / "undisturbed", np.random.default_rng(seed)
    seconds = finish(command(reference))
    expected, done = content(reference), 0
    while done < kills:
        out, after = folder / "killed", rng.uniform(0.2, 1) * seconds
        shutil.rmtree(out, ignore_errors=True)
        if not killed(command(out), after):  # it was over already: faster than the first
            seconds = min(seconds, after)
            continue
        finish(command(out))
        done += 1
        yield after, content(out) == expected


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
            results = []
            for after, equal in same_after_kills(
                command, Path(work, script), args.kills, args.seed
            ):
                results.append(equal)
                print(
                    f"{script}: killed after {after:.1f} s: {'the same files' if equal else 'OTHER FILES'}",
                    flush=True,
                )
            print(f"{script}: {sum(results)} of {len(results)} the same")


if __name__ == "__main__":
    main()
