"""Scripts that are edited between runs: what an edit decides is refused, all else stays.

The scripts are run, tiny, in a copy of the project, whose files the tests edit.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

from common import toy

NETWORK = "--arch resnet18 --size 32"
COMMANDS = {
    "reduce": "reduce.py {1}/ct {1}/store --strategy hash --size 32",
    "pretrain": "pretrain.py {1}/store/hash-6.csv {0}/run --batch-size 4 --steps 1 "
    f"--optimizer adamw {NETWORK}",
    "evaluate": "evaluate.py toy-organ {2} --encoder scratch --seeds 1 --protocol linear "
    f"--results {{0}}/results.csv {NETWORK}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cohort):
    """With a task, a run and results, and the copy of the project in code/."""
    folder = tmp_path_factory.mktemp("edited")
    toy.write_tasks(folder, size=32)
    ignored = shutil.ignore_patterns(".*", "results", "tests", "__pycache__")
    shutil.copytree(ROOT, folder / "code", ignore=ignored)
    assert "REFUSED" not in "".join(run(folder, cohort, "pretrain", "evaluate"))
    return folder


def run(folder, cohort, *names):
    """Run these commands, two at a time; what each prints, after "REFUSED " if it failed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run_one(name):
        command = [sys.executable, *COMMANDS[name].format(folder, cohort).split()]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, cwd=folder / "code", env=environment, **output)
        return f"REFUSED {done.stderr}" if done.returncode else done.stdout

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run_one, names))


def edit(folder, name, old, new):
    path = folder / "code" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def content(*folders):
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def test_an_edit_is_refused_by_what_it_has_a_part_in(folder, cohort):
    """After comments nothing is made again; then the augmentation, the probe, a strategy change."""
    before = content(folder / "run", cohort / "store")
    for name in ("reduce.py", "pretrain.py", "evaluate.py", "common/simclr.py", "common/ct.py"):
        edit(folder, name, "\n\n\n", "\n# a comment\n\n\n")
    for printed in run(folder, cohort, "reduce", "pretrain", "evaluate"):
        assert "done before" in printed or "finished before" in printed

    edit(folder, "common/simclr.py", "rng.random(n) < 0.8", "rng.random(n) < 0.7")
    edit(folder, "evaluate.py", "FIXED_C = 1e-2", "FIXED_C = 1e-1")
    reduced, pretrained, evaluated = run(folder, cohort, "reduce", "pretrain", "evaluate")
    assert "done before" in reduced
    for refused, file in ((pretrained, "common/simclr.py"), (evaluated, "evaluate.py")):
        assert refused.startswith("REFUSED") and re.findall(r"[\w/]+\.py", refused) == [file]

    edit(folder, "common/reduction.py", "remaining = remaining[~", "remaining = 1 * remaining[~")
    [refused] = run(folder, cohort, "reduce")
    assert refused.startswith("REFUSED") and "common/reduction.py" in refused
    assert before == content(folder / "run", cohort / "store")

    # a file that an edited script imports counts as the others do
    edit(folder, "evaluate.py", "from common import auc", "from common import auc, noise")
    (folder / "code/common/noise.py").write_text("LEVEL = 1\n")
    (folder / "results.csv").unlink()
    assert "AUC" in run(folder, cohort, "evaluate")[0]
    edit(folder, "common/noise.py", "1", "2")
    [refused] = run(folder, cohort, "evaluate")
    assert refused.startswith("REFUSED") and re.findall(r"[\w/]+\.py", refused) == [
        "common/noise.py"
    ]
