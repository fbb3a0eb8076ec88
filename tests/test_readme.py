"""The README: its commands are run, tiny; its numbers and defaults are those of the scripts."""

import re
import shlex
import sys

import torch
import torchvision
from conftest import ROOT, write_covid_ct

import evaluate
from common import toy

README = (ROOT / "README.md").read_text()
TINY = {  # appended to a command, where the last of two flags counts
    "reduce.py": ["--size", "32"],
    "pretrain.py": "--epochs 1 --arch resnet18 --size 32 --batch-size 8".split(),
    "evaluate.py": "--arch resnet18 --size 32 --epochs 1 --seeds 1".split(),
}


def test_the_commands_of_the_readme(tmp_path, here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.write_cohort(tmp_path / "CT", patients=2, slices=12)
    write_covid_ct(tmp_path / "COVID_CT")
    section = README.split("## Your own CT\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("    ")]
    for _, script, *arguments in (shlex.split(line, comments=True) for line in lines):
        tiny = [] if arguments[0] in ("tables", "figure") else TINY[script]
        here(script, *arguments, *tiny)
    assert (tmp_path / "figure.svg").exists()

    # how to load an encoder, word for word but for the tiny network
    loading = re.search(r"`(network = torchvision.*?)`", README, re.DOTALL)[1]
    code = " ".join(loading.split()).replace("resnet50", "resnet18")
    names = {"torch": torch, "torchvision": torchvision}
    exec(code, names)
    assert names["network"](torch.zeros(2, 3, 32, 32)).shape == (2, 512)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_table_of_the_study_is_an_excerpt_of_what_its_command_prints(run):
    command = re.search(r"`\.venv/bin/python (\S+analysis\.py \S+)`", README)[1]
    head, _, *shown = README[README.index("| row |") :].splitlines()[:9]
    printed = [cells(line) for line in run(*command.split()).stdout.splitlines() if "|" in line]
    [full_head] = [line for line in printed if line[:2] == ["row", "slices"]]
    full = {line[0]: line for line in reversed(printed) if len(line) == len(full_head)}
    for line in map(cells, shown):
        row = dict(zip(full_head, full[line[0]], strict=True))
        for column, cell in zip(cells(head), line, strict=True):
            assert cell and row[column].startswith(cell), (line[0], column)


def test_the_settings_are_those_of_the_scripts(monkeypatch):
    for setting, expected in {
        "optimiser": ["LARS", "decay 1e-6", "batch 128"],
        "length": ["800 epochs"],
        "rate": ["peak 0.15", "warm-up 1/80"],
        "views": ["2 of 96 px"],
        "fine-tuning": ["70 epochs", "for 10;", "Adam", "decay 5e-4"],
    }.items():
        [line] = [line for line in README.splitlines() if line.startswith(f"| {setting} |")]
        assert all(words in cells(line)[1] for words in expected), line
    flags = ["evaluate.py", "covid-ct", "data", "--encoder", "scratch", "--results", "r.csv"]
    monkeypatch.setattr(sys, "argv", flags)
    args = evaluate.parse_args()  # those of pretrain.py are in test_pretrain.py
    assert (args.epochs, args.freeze_epochs, args.weight_decay) == (70, 10, 5e-4)
    assert (args.size, args.batch_size, args.arch) == (224, 64, "resnet50")
