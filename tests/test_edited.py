"""Scripts that are edited between runs: what an edit decides is refused, all else stays.

The scripts are run, tiny, in a copy of the project, whose files the tests edit.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT

from common import toy

NETWORK = "--arch resnet18 --size 32"
COMMANDS = {
    "reduce": "reduce.py {0}/ct {0}/out --strategy hash --size 32",
    "pretrain": "pretrain.py {0}/out/hash-6.csv {0}/run --batch-size 4 --steps 1 "
    f"--optimizer adamw {NETWORK}",
    "evaluate": "evaluate.py toy-organ {0} --encoder scratch --seeds 1 --protocol linear "
    f"--results {{0}}/results.csv {NETWORK}",
}
COMMANDS["pretrain another"] = COMMANDS["pretrain"].replace("/run ", "/another ")
COMMANDS["evaluate another"] = COMMANDS["evaluate"].replace("results.csv", "another.csv")


class Project:
    def __init__(self, folder):
        self.folder, self.code = folder, folder / "code"
        toy.write_cohort(folder / "ct", patients=2, slices=12)
        toy.write_tasks(folder, size=32)

    def copy(self):
        shutil.rmtree(self.code, ignore_errors=True)
        ignored = shutil.ignore_patterns(".*", "results", "tests", "__pycache__")
        shutil.copytree(ROOT, self.code, ignore=ignored)

    def run(self, *names):
        """Run the commands, two at a time; what each prints, after "REFUSED " if it failed."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(self.run_one, names))

    def run_one(self, name):
        command = [sys.executable, *COMMANDS[name].format(self.folder).split()]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=self.code, env=environment, capture_output=True, text=True
        )
        return f"REFUSED {done.stderr}" if done.returncode else done.stdout

    def edit(self, name, old, new):
        text = (self.code / name).read_text()
        assert old in text
        (self.code / name).write_text(text.replace(old, new, 1))

    def content(self):
        paths = [path for name in ("out", "run") for path in (self.folder / name).rglob("*")]
        return {path: path.read_bytes() for path in paths if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("edited"))
    project.copy()
    printed = project.run("reduce") + project.run("pretrain", "evaluate")
    assert "REFUSED" not in str(printed)
    return project


@pytest.fixture
def project(made):
    made.copy()
    return made


def test_after_a_comment_nothing_is_made_again(project):
    for name in ("reduce.py", "pretrain.py", "evaluate.py", "common/simclr.py", "common/ct.py"):
        project.edit(name, "\n\n\n", "\n# a comment\n\n\n")
    before = project.content()
    reduced, pretrained, evaluated = project.run("reduce", "pretrain", "evaluate")
    assert "done before" in reduced and "done before" in evaluated
    assert "finished before" in pretrained
    assert before == project.content()


def test_after_an_edit_of_the_probe_runs_stay_and_results_are_refused(project):
    project.edit("evaluate.py", "FIXED_C = 1e-2", "FIXED_C = 1e-1")
    pretrained, refused, evaluated = project.run("pretrain", "evaluate", "evaluate another")
    assert "finished before" in pretrained and "AUC" in evaluated
    assert refused.startswith("REFUSED") and "results.csv: " in refused and "evaluate.py" in refused


def test_after_an_edit_of_the_augmentation_the_store_and_results_stay_and_runs_are_refused(project):
    project.edit("common/simclr.py", "rng.random(n) < 0.8", "rng.random(n) < 0.7")
    reduced, refused, evaluated = project.run("reduce", "pretrain", "evaluate")
    assert "done before" in reduced and "done before" in evaluated
    assert refused.startswith("REFUSED") and "common/simclr.py" in refused


def test_after_an_edit_of_a_strategy_the_store_stays_and_selections_are_refused(project):
    before = project.content()
    project.edit("common/reduction.py", "remaining = remaining[~", "remaining = 1 * remaining[~")
    for refused in project.run("reduce", "pretrain"):
        assert refused.startswith("REFUSED") and "common/reduction.py" in refused
    assert before == project.content()


def test_a_new_file_that_an_edited_script_imports_counts_too(project):
    project.edit("common/simclr.py", "import math\n", "import math\nfrom common import noise\n")
    (project.code / "common" / "noise.py").write_text("SIGMA = 1\n")
    made, refused = project.run("pretrain another", "pretrain")
    assert "REFUSED" not in made and refused.startswith("REFUSED") and "simclr.py" in refused
    (project.code / "common" / "noise.py").write_text("SIGMA = 2\n")
    [refused] = project.run("pretrain another")
    assert refused.startswith("REFUSED") and "common/noise.py" in refused


def test_other_images_are_refused(project):
    """As where organ.npz was replaced after the tables were printed."""
    path = project.folder / "toy-organ.npz"
    arrays = dict(np.load(path))
    np.savez_compressed(path, **arrays | {"test_labels": arrays["test_labels"][::-1]})
    [refused] = project.run("evaluate")
    assert refused.startswith("REFUSED") and "data" in refused
