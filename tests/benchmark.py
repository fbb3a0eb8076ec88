"""How fast the package is, beside the plain way to do the same. Every comparison alternates (A B A B ...) in one run.

    python tests/benchmark.py reduce --dicom DIR --volumes DIR
    python tests/benchmark.py pretrain --volumes DIR
    python tests/benchmark.py evaluate --tasks DIR

Packages that only the plain way needs go into .venv-benchmark, made on the first call; ours are shared with it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import venv
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PACKAGES = ["scikit-image==0.26.0", "opencv-python-headless==5.0.0.93", "lightly==1.6.0"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    add = parts.add_parser("reduce", help="decoding, similarities, selection").add_argument
    add(
        "--dicom",
        type=Path,
        required=True,
        help="full-size DICOM slices, repeated to some 2,000 for the timing",
    )
    add(
        "--volumes",
        type=Path,
        required=True,
        help="tree of DICOM series, for the similarities and selections",
    )
    add("--rounds", type=int, default=3, help="times that each side of a comparison runs")
    add = parts.add_parser(
        "pretrain", help="the training step, lightly's, ALL against Hash-6"
    ).add_argument
    add("--volumes", type=Path, required=True, help="tree of DICOM series to train on")
    add("--rounds", type=int, default=3, help="times that each side of a comparison runs")
    add("--arch", default="resnet18")
    add("--size", type=int, default=96)
    add("--batch-size", type=int, default=128)
    add("--steps", type=int, default=4, help="training steps a round")
    add("--workers", type=int, default=2, help="loader processes of lightly")
    add = parts.add_parser("evaluate", help="the fine-tuning step, the linear probe").add_argument
    add(
        "--tasks",
        type=Path,
        help="folder that holds covid-ct/, organ/ and head-ct/, for the linear probe",
    )
    add("--rounds", type=int, default=5, help="times that each side of a comparison runs")
    add("--arch", default="resnet18")
    add("--size", type=int, default=64, help="of fine-tuning")
    add("--probe-size", type=int, default=96, help="of the linear probe")
    args = parser.parse_args()
    print(
        f"{processor()}, {os.cpu_count()} cores, {args.rounds} rounds, medians (smallest to largest)\n"
    )
    import_module(f"tests.benchmark_{args.part}").run(args)


def processor():
    names = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0].split(":")[1].strip()


def plain_python():
    """The Python of .venv-benchmark, which also sees the packages of the one that runs this."""
    folder = ROOT / ".venv-benchmark"
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True)
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        [theirs] = folder.glob("lib/*/site-packages")
        (theirs / "ours.pth").write_text(ours + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (folder / "done").touch()
    return python


def alternate(rounds, **sides):
    """Call the functions in turns; {name: [seconds of each round]}."""
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values, digits=2):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratio(of, to):
    """Median of the ratios, round by round."""
    return spread([a / b for a, b in zip(of, to)])


def peak(command):
    """(seconds, MiB of the largest process) of a command, output discarded."""
    started = time.perf_counter()
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=-3, stderr=-3); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - started, float(done.stdout)


if __name__ == "__main__":
    main()
