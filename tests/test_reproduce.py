"""reproduce.sh, tiny: rows, going on, a path with spaces, flags that are refused."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import ROOT

from common import toy

PRETRAIN = "--arch resnet18 --size 32 --batch-size 16 --steps 2 --optimizer adamw"
EVALUATE = "--protocol linear --arch resnet18 --size 32 --seeds 2"
ROWS = "Random-matched"
EVALUATED = [f"--- evaluate-Random-matched-{task}.npz" for task in ("toy-lesion", "toy-organ")]


@pytest.fixture(scope="module")
def made(tmp_path_factory, run, tasks):
    """(its folder, its command, what it printed) of a copy of the project, in odd paths, by a link.

    A smaller toy set lies there already, which common.toy leaves as it is.
    """
    folder = tmp_path_factory.mktemp("a space & a |")
    code, out = folder / "the code", folder / "out & about"
    shutil.copytree(tasks, out / "toy")
    toy.write_cohort(out / "toy" / "ct", patients=3, slices=12)
    (out / "toy" / "toy.json").write_text(json.dumps({"settings": {}, "code": {}}))
    ignored = shutil.ignore_patterns(".*", "results", "tests", "__pycache__")
    shutil.copytree(ROOT, code, ignore=ignored)
    link = folder / "a link.sh"
    link.symlink_to(code / "reproduce.sh")
    command = [link, "--out", out, "--seeds", 2, "--rows", ROWS]
    command += ["--reduce", "--size 32", "--pretrain", PRETRAIN, "--evaluate", EVALUATE]
    return out, command, run(*command, program="bash").stdout


def test_every_row_is_in_the_tables_with_its_runs(made):
    out, _, printed = made
    text = (out / "tables.md").read_text()
    assert text in printed and (out / "figure.svg").exists()
    for row in ROWS.split():
        lines = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
        assert len(lines) == 2 and all("±" in line for line in lines)  # a table a task
    # every run has a seed of its own, and a random row draws anew for it
    for seed in (0, 1):
        first, *_ = (out / "runs" / f"Random-matched-{seed}" / "log.jsonl").read_text().splitlines()
        assert json.loads(first)["settings"]["seed"] == seed
    selections = [(out / "slices" / f"Random-matched-{seed}.csv").read_text() for seed in (0, 1)]
    assert selections[0] != selections[1]


def steps_of(printed):
    return [line for line in printed.splitlines() if line.startswith("--- ")]


def test_what_is_deleted_is_made_again_to_the_same_bytes_and_nothing_else(made, run):
    out, command, _ = made
    encoder = out / "runs" / "Random-matched-1" / "encoder.pt"
    before = encoder.read_bytes(), (out / "tables.md").read_text()
    shutil.rmtree(encoder.parent)
    again = run(*command, program="bash").stdout
    assert steps_of(again) == ["--- pretrain-Random-matched-1", *EVALUATED]
    after = encoder.read_bytes(), (out / "tables.md").read_text()
    assert after[0] == before[0] and after[1] in again
    columns = [[line.split("|")[-3:] for line in text.splitlines()] for _, text in (before, after)]
    assert columns[0] == columns[1]  # without seconds


def test_of_changed_ct_or_edited_code_the_old_tables_are_not_printed(made, run):
    out, command, _ = made
    file, code = next((out / "toy").rglob("*.dcm")), command[0].resolve().parent / "common"
    times, text = file.stat(), (code / "hashing.py").read_text()
    os.utime(file)
    refused = run(*command, program="bash", ok=False)
    assert "(fingerprint " in refused.stderr and "| Random-matched |" not in refused.stdout
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    (code / "hashing.py").write_text(text.replace("SAME_IMAGE = 4", "SAME_IMAGE = 3"))
    refused = run(*command, program="bash", ok=False)
    assert "(common/hashing.py " in refused.stderr and "| Random-matched |" not in refused.stdout
    (code / "hashing.py").write_text(text)


def test_after_runs_of_other_flags_or_another_task_the_old_tables_are_not_printed(made, run):
    """Also where runs were deleted, as their refusal says, but not the results."""
    out, command, _ = made
    for folder in (out / "runs").glob("Random-matched-*"):
        shutil.rmtree(folder)
    other = [*command, "--pretrain", f"{PRETRAIN} --temperature 0.5"]
    refused = run(*other, program="bash", ok=False)
    assert "of another encoder: give another --name" in refused.stderr
    expected = [f"--- pretrain-Random-matched-{seed}" for seed in (0, 1)]
    assert steps_of(refused.stdout) == [*expected, EVALUATED[0]]
    assert "| Random-matched |" not in refused.stdout
    path = out / "toy" / "toy-lesion.npz"
    arrays = dict(np.load(path))
    np.savez_compressed(path, **arrays | {"test_labels": arrays["test_labels"][::-1]})
    refused = run(*other, program="bash", ok=False)
    assert (
        "was made otherwise (data " in refused.stderr and "| Random-matched |" not in refused.stdout
    )


def test_wrong_flags_are_refused(tmp_path, run):
    for flag, value, message in (
        ("--rows", "ALL Hash-x", "--rows: Hash-x is not a row"),
        ("--data", "nowhere", "nowhere: No such file or directory"),
        ("--nothing", "", "--nothing is not an option"),
    ):
        command = ["reproduce.sh", "--out", tmp_path / "out", flag, value]
        assert message in run(*command, program="bash", ok=False).stderr
        assert not (tmp_path / "out").exists()
