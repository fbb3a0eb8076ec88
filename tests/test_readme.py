"""Every command of the README's section on your own CT, run in its order, tiny."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from conftest import write_covid_ct

from common import toy

ROOT = Path(__file__).parent.parent
TINY = {  # appended to a command, where the last of two flags counts
    "reduce.py": ["--size", "32"],
    "pretrain.py": "--epochs 1 --arch resnet18 --size 32 --batch-size 8".split(),
    "evaluate.py": "--arch resnet18 --size 32 --epochs 1 --seeds 1".split(),
}


def commands(heading):
    """The indented commands below a heading of the README."""
    section = (ROOT / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines]


def test_the_commands_of_the_readme(tmp_path):
    toy.write_cohort(tmp_path / "CT", patients=2, slices=12)
    write_covid_ct(tmp_path / "COVID_CT")
    found = commands("Your own CT")
    assert len(found) >= 7
    for python, script, *arguments in found:
        assert python == ".venv/bin/python"
        subcommand = arguments[0] in ("compare", "tables", "figure")
        tiny = [] if subcommand else TINY[script]
        done = subprocess.run(
            [sys.executable, ROOT / script, *arguments, *tiny],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{script} {arguments}\n{done.stderr}"
    assert (tmp_path / "figure.svg").exists()


def test_the_commands_of_run_it_are_those_of_reproduce():
    found = commands("Run it")
    assert ["bash", "reproduce.sh", "--test"] in found and ["bash", "reproduce.sh"] in found
