"""Every command of the README's section on your own CT, run in its order, tiny."""

import shlex
from pathlib import Path

from conftest import write_covid_ct

from common import toy
from common.study import study

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


def test_the_commands_of_the_readme(tmp_path, here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.write_cohort(tmp_path / "CT", patients=2, slices=12)
    write_covid_ct(tmp_path / "COVID_CT")
    found = commands("Your own CT")
    assert len(found) >= 7
    for python, script, *arguments in found:
        assert python == ".venv/bin/python"
        subcommand = arguments[0] in ("compare", "tables", "figure")
        tiny = [] if subcommand else TINY[script]
        here(script, *arguments, *tiny)
    assert (tmp_path / "figure.svg").exists()


def rows_below(text, heading):
    """{row: {column: cell}} of the first Markdown table below a heading."""
    lines = text.split(heading)[1].split("\n## ")[0].splitlines()
    first, _, *rest = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    head = [cell.strip() for cell in first]
    return {cells[0].strip(): dict(zip(head, map(str.strip, cells))) for cells in rest}


def test_the_table_of_the_study_is_what_its_command_prints():
    shown = rows_below((ROOT / "README.md").read_text(), "Printed by `.venv/bin/python evaluate.py")
    printed = rows_below(study(ROOT / "results" / "study" / "results.csv"), "## All rows")
    columns = {"organ, 1 % of labels": "organ 1 %", "organ, 100 %": "organ 100 %"}
    columns["organ 1 %: difference to ALL"] = "difference to ALL"
    assert len(shown) == 14
    for row, cells in shown.items():
        for column, cell in cells.items():
            full = printed[row][columns.get(column, column)]
            assert cell and full.startswith(cell), (row, column)


def test_the_commands_of_run_it_are_those_of_reproduce(run):
    usage = run("reproduce.sh", "--help", program="bash").stdout.splitlines()
    for command in commands("Run it"):
        assert any(line.startswith(" ".join(command) + "  ") for line in usage)
