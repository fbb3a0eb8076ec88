"""Scripts that are edited between runs: what an edit decides is refused, all else stays.

The scripts are run, tiny, in a copy of the project, whose files the test edits.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from conftest import ROOT

NETWORK = "--arch resnet18 --size 32"
COMMANDS = {
    "reduce": "reduce.py {cohort}/ct {cohort}/store --strategy hash --size 32",
    "pretrain": "pretrain.py {cohort}/store/hash-6.csv {folder}/run --batch-size 4 --steps 1 "
    f"--optimizer adamw {NETWORK}",
    "evaluate": "evaluate.py toy-organ {tasks} --encoder scratch --seeds 1 --protocol linear "
    f"--results {{folder}}/results.csv {NETWORK}",
}


def content(*folders):
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def test_an_edit_is_refused_by_what_it_has_a_part_in(tmp_path, cohort, tasks):
    """After comments nothing is made again; then the augmentation, the probe, a strategy change."""
    code = tmp_path / "code"
    ignored = shutil.ignore_patterns(".*", "results", "tests", "__pycache__")
    shutil.copytree(ROOT, code, ignore=ignored)

    def run_one(name):
        words = COMMANDS[name].format(cohort=cohort, folder=tmp_path, tasks=tasks).split()
        done = subprocess.run(
            [sys.executable, *words],
            cwd=code,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        return f"REFUSED {done.stderr}" if done.returncode else done.stdout

    def run(*names):
        """What each of these commands prints, two at a time, after "REFUSED " if it failed."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run_one, names))

    def edit(name, old, new):
        text = (code / name).read_text()
        assert old in text
        (code / name).write_text(text.replace(old, new, 1))

    def assert_refused(printed, file):
        assert printed.startswith("REFUSED") and re.findall(r"[\w/]+\.py", printed) == [file]

    assert "REFUSED" not in "".join(run("pretrain", "evaluate"))
    before = content(tmp_path / "run", cohort / "store")
    for name in ("reduce.py", "pretrain.py", "evaluate.py", "common/simclr.py", "common/ct.py"):
        edit(name, "\n\n\n", "\n# a comment\n\n\n")
    for printed in run("pretrain", "evaluate", "reduce"):
        assert "done before" in printed or "finished before" in printed

    edit("common/simclr.py", "rng.random(n) < 0.8", "rng.random(n) < 0.7")
    edit("evaluate.py", "FIXED_C = 1e-2", "FIXED_C = 1e-1")
    pretrained, evaluated = run("pretrain", "evaluate")
    assert_refused(pretrained, "common/simclr.py")
    assert_refused(evaluated, "evaluate.py")

    # a strategy; and a file that an edited script imports counts as the others do
    edit("common/reduction.py", "remaining = remaining[~", "remaining = 1 * remaining[~")
    edit("evaluate.py", "from common import auc", "from common import auc, noise")
    (code / "common/noise.py").write_text("LEVEL = 1\n")
    (tmp_path / "results.csv").unlink()
    evaluated, reduced = run("evaluate", "reduce")
    assert "AUC" in evaluated
    assert_refused(reduced, "common/reduction.py")
    edit("common/noise.py", "1", "2")
    assert_refused(*run("evaluate"), "common/noise.py")
    assert before == content(tmp_path / "run", cohort / "store")
