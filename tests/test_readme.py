"""The README: its commands are run, tiny; its numbers and defaults are those of the scripts."""

import re
import shlex
import sys

import torch
import torchvision
from conftest import ROOT, write_covid_ct

import evaluate
import pretrain
import reduce
from common import toy
from common.reduction import STRATEGIES

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
    """Our column of the table of settings, word by word, from the defaults of the flags."""

    def defaults(module, words):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words.split()])
        return module.parse_args()

    r = defaults(reduce, "data out --strategy hash")
    p = defaults(pretrain, "selection.csv run")
    e = defaults(evaluate, "covid-ct data --encoder scratch --results r.csv")
    thresholds = [STRATEGIES[name].default for name in ("ssim", "mi", "embedding")]
    after = f"{e.lr:.0e} for {e.freeze_epochs + 1}, then {e.lr_after:.0e}"
    for setting, expected in {
        "greedy rule": [f"within {r.threshold} bits", f"per {r.scope}", "in z order"],
        "SSIM, MI, Embedding": ["T {:g}, {:g}, {:g}".format(*thresholds)],
        "pre-training": ["ResNet-50", f"temperature {p.temperature:g}"],
        "views": [f"2 of {p.size} px", f"of {r.size} px slices"],
        "optimiser": [p.optimizer.upper(), f"decay {p.weight_decay:.0e}", f"batch {p.batch_size}"],
        "rate": [f"peak {p.lr:g}", f"warm-up 1/{1 / p.warmup:g} of the steps"],
        "length": [f"{p.epochs} epochs"],
        "fine-tuning": [f"{e.epochs} epochs", f"alone for {e.freeze_epochs}", f"Adam {after}"],
        "its batches": [f"at most {e.batch_size}"],
        "its images": [f"{e.size} px"],
    }.items():
        [line] = [line for line in README.splitlines() if line.startswith(f"| {setting} |")]
        for words in expected:
            assert words.replace("e-0", "e-") in cells(line)[1], (setting, words)
    assert p.arch == e.arch == "resnet50" and f"decay {e.weight_decay:.0e}" == "decay 5e-04"


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 170 and max(map(len, lines)) <= 120
