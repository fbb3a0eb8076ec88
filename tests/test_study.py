"""The study: its plan against its evidence, its analysis against plain arithmetic."""

import importlib
import re
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from common import auc, files, toy
from common.tables import ONE_TABLE, Table, p_text, read_results, tables
from results.study import analysis as study
from results.study import make
from results.study.analysis import EQUIVALENCE, OUTCOMES, RUNS

STUDY = ROOT / "results" / "study"
MEANS = {"scratch": 0.86, "ALL-c32": 0.88, "ALL-c32-masked": 0.885, "Random-matched": 0.9}
DECISIVE = "arch size batch_size optimizer lr warmup steps sample neighbours loss_groups".split()
DECISIVE += ["mask_negatives", "mask_random"]
HYPOTHESES = ["Hash-6 - ALL", "Hash-6 - Random-matched", "ALL-c32-masked - ALL-c32"]


def test_the_published_numbers_come_out_unchanged(tmp_path, here):
    """README.md, tables.md and the figure as published, from results.csv and its draws alone."""
    results, figure = STUDY / "results.csv", tmp_path / "figure.svg"
    printed = here("results.study.analysis", results, "--figure", figure)
    assert printed == (STUDY / "README.md").read_text()
    assert figure.read_text() == (STUDY / "figure.svg").read_text()
    assert tables(results) + "\n" == (STUDY / "tables.md").read_text()
    for numbers in (  # as first printed, on 2026-11-26
        "+0.0034 [-0.0004, +0.0071] | 0.076 | 0.229 | 0.030 | 0.0053 | 0.0007",
        "+0.0024 [-0.0017, +0.0064] | 0.248 | 0.495 | 0.130 | 0.0058 | 0.0005",
        "+0.0007 [-0.0040, +0.0054] | 0.765 | 0.765 | 0.818 | 0.0067 | 0.0007",
        "[+0.0002, +0.0065]; it would have to lie within ±0.0155",
        "0.909 ± 0.004 [0.905, 0.913] | 0.963 ± 0.002 [0.961, 0.966] | 0.980 ± 0.002",
    ):
        assert numbers in printed


def test_every_line_of_the_study_has_its_draws():
    for name, lines in {"results": 906, "finetune": 32, "cpu": 90, "pilot": 6}.items():
        assert len(read_results(STUDY / f"{name}.csv")) == lines
        assert "runs only" not in tables(STUDY / f"{name}.csv"), name


def read_by(monkeypatch, command):
    """The flags of a command as its script reads them."""
    monkeypatch.setattr(sys, "argv", command.split())
    return vars(importlib.import_module(sys.argv[0].removesuffix(".py")).parse_args())


def test_the_plan_is_what_the_published_runs_were_made_by(monkeypatch, tmp_path):
    """runs.jsonl: the logs' settings are those that pretrain.py reads from the plan's flags."""
    records = files.read_json(STUDY / "runs.jsonl", lines=True)
    planned = [(row, seed) for row in RUNS for seed in range(RUNS[row])]
    assert sorted((made["row"], made["seed"]) for made in records) == sorted(planned)
    assert make.runs_to_make(tmp_path) == sorted(planned, key=lambda run: run[1])  # seed by seed
    selections = {}
    for row in set(RUNS) - {"scratch"}:
        words = re.sub(r"{out}\S+", str(STUDY / "c1.csv"), make.settings(row)["reduce"])
        assert read_by(monkeypatch, f"reduce.py ct out {words.format(seed=0)}")["size"] == 128
        flags = read_by(monkeypatch, f"pretrain.py s.csv run {make.settings(row)['pretrain']}")
        for made in (made for made in records if made["row"] == row):
            logged = made["log"]["settings"]
            same = set(flags) & set(logged) - {"seed", "precision", "selection"}
            assert same >= set(DECISIVE)
            assert {name: logged[name] for name in same} == {name: flags[name] for name in same}
            # the same flags of reduce.py, the same slices, and no other's
            key = make.PLAN[row][0].format(out="out", seed=made["seed"])
            selections.setdefault(key, set()).add(logged["selection"])
    assert all(len(digests) == 1 for digests in selections.values())
    assert len(set.union(*selections.values())) == len(selections)


def test_rows_of_reproduce_sh_have_the_flags_of_the_studys():
    text = (ROOT / "reproduce.sh").read_text().replace("$hash_6", make.HASH_6)
    rows = re.findall(r'^  row (\S+) +"([^"]*)"(?: +"([^"]*)")?$', text, re.MULTILINE)
    planned = {}
    for row, (reduce, pretrain, _) in make.PLAN.items():
        words = reduce.format(out="out", seed="SEED").replace("out/", "").replace("-seed-0", "-0")
        planned[row] = words, pretrain
    shared = {row: tuple(flags) for row, *flags in rows if row in planned}
    assert shared == {row: planned[row] for row in shared} and len(shared) == 12


def test_the_evaluations_are_those_of_the_published_lines(monkeypatch):
    outcomes = set()
    for evaluation in make.EVALUATIONS:
        task, *flags = evaluation.split()
        command = f"evaluate.py {task} folder {' '.join(flags)} {make.EVALUATE}"
        read = read_by(monkeypatch, f"{command} --results r.csv --encoder scratch --name ALL")
        folds = f"{read['folds']}x{read['repeats']}" if read["folds"] else ""
        outcomes |= {(task, read["protocol"], f"{s:g}", folds) for s in read["label_share"]}
    lines = read_results(STUDY / "results.csv")
    assert outcomes == set(OUTCOMES.values())
    assert outcomes == {tuple(line[column] for column in ONE_TABLE) for line in lines}
    assert {line["settings"].split(" c=")[0] for line in lines} == {"arch=resnet18 size=64"}


def test_no_p_before_all_planned_runs_are_made(tmp_path):
    head, *lines = (STUDY / "results.csv").read_text().splitlines(keepends=True)
    results = tmp_path / "results.csv"
    for held, refused in (
        (lines[:-1], "head-ct: ALL has 11 of 12 planned runs"),
        ([*lines, lines[0].replace("scratch", "Another")], "Another has 1 of 0 planned runs"),
        (lines[-1:], "holds no results of organ, linear, 1 % of the training labels"),
    ):
        results.write_text("".join([head, *held]))
        with pytest.raises(SystemExit, match=refused):
            study.planned_tables(results)
    # the sensitivity to C holds one outcome, without draws
    text = study.analysis(study.planned_tables(STUDY / "c1.csv"), {})
    assert text.startswith("151 of 151 planned runs, with organ 1 %; where draws are missing, inte")


def made_up(spread=0.004, **means):
    """{row: AUC of each planned run of organ with 1 % of the labels}."""
    rng = np.random.default_rng(0)
    means = MEANS | {name.replace("_", "-"): mean for name, mean in means.items()}
    return {row: means.get(row, 0.91) + spread * rng.standard_normal(RUNS[row]) for row in RUNS}


def table_of(aucs):
    """A Table of {row: AUCs} without draws; its minutes are a hundredth of its steps."""
    lines = []
    for name in aucs:
        slices = 857 if name.startswith(("Hash", "Random")) else 6075
        steps = round(700 * float(name.partition("-steps-x")[2] or 1))
        line = {"task": "organ", "test": "80", "name": name, "encoder": name, "dose": 0.4}
        lines.append(line | {"slices": slices, "steps": steps, "pretrain_seconds": steps * 0.6})
    between_runs = auc.variance_between_runs(aucs.values())
    return Table(lines, aucs, np.zeros((len(aucs), len(aucs))), 0, between_runs)


def cells_of(table):
    """The cells of a Markdown table below its head."""
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def estimated(aucs, weights):
    """The t distribution of a difference, or of {row: weight}, by the variance of all rows."""
    if isinstance(weights, str):
        weights = dict(zip(weights.split(" - "), (1, -1), strict=True))
    freedom = sum(len(runs) - 1 for runs in aucs.values())
    variance = sum(((runs - runs.mean()) ** 2).sum() for runs in aucs.values()) / freedom
    error = (variance * sum(w**2 / len(aucs[row]) for row, w in weights.items())) ** 0.5
    return stats.t(freedom, sum(w * aucs[row].mean() for row, w in weights.items()), error)


def interval(aucs, difference, confidence):
    return "[{:+.4f}, {:+.4f}]".format(*estimated(aucs, difference).interval(confidence))


def shown(aucs, difference):
    return f"{estimated(aucs, difference).mean():+.4f} {interval(aucs, difference, 0.95)}"


def test_primary_differences_and_holm_are_plain_arithmetic():
    aucs = made_up(spread=0.006)
    *found, predicted = cells_of(study.hypotheses_table(table_of(aucs), {}))
    of_null = [estimated(aucs, difference) for difference in HYPOTHESES]
    p = [2 * min(t.cdf(0), t.sf(0)) for t in of_null]
    corrected = auc.holm(p)
    assert len(set(corrected)) == 3
    for i, difference in enumerate(HYPOTHESES):
        name, other = (aucs[row] for row in difference.split(" - "))
        p_values = p[i], corrected[i], stats.ttest_ind(name, other, equal_var=False).pvalue
        detectable = of_null[i].ppf(0.975) + of_null[i].ppf(0.8) - 2 * of_null[i].mean()
        runs = f"{len(name)}, {len(other)}"
        expected = [f"H{i + 1}", difference, runs, shown(aucs, difference)]
        assert found[i] == [*expected, *map(p_text, p_values), f"{detectable:.4f}", "-"]
    assert predicted[1:4] == ["ALL - ALL-c32", "12, 6", shown(aucs, "ALL - ALL-c32")]


def test_two_rows_that_vary_more_need_welch():
    """True nulls: H3's rows vary twice as much as the other rows, whose variance they are given."""
    rng = np.random.default_rng(0)
    sd = dict.fromkeys(RUNS, 1) | {"ALL-c32": 2, "ALL-c32-masked": 2}
    p_values = []
    for _ in range(1000):
        table = table_of({row: sd[row] * rng.standard_normal(RUNS[row]) for row in RUNS})
        p_values.append([study.estimate(table, HYPOTHESES[2]).p, study.welch(table, HYPOTHESES[2])])
    pooled, own = np.mean(np.array(p_values) < 0.05, axis=0)
    assert 0.22 <= pooled <= 0.30 and 0.03 <= own <= 0.07


def plain_equivalence(aucs, row):
    """Whether by the rule with the third taken as known; whether its error may count as well."""
    third = estimated(aucs, "ALL - scratch").mean() / 3
    low, high = estimated(aucs, f"{row} - ALL").interval(0.9)
    # sign * (row - ALL) + third
    tests = [{row: sign, "ALL": 1 / 3 - sign, "scratch": -1 / 3} for sign in (1, -1)]
    surely = all(estimated(aucs, weights).ppf(0.05) > 0 for weights in tests)
    return -third < low and high < third, surely


@pytest.mark.parametrize(
    "hash_6, known, surely",
    [
        (0.91, True, True),
        (0.918, True, True),  # different, and equivalent all the same
        (0.935, False, False),  # better by more than the margin is not equivalent
        (0.8964, False, True),  # as far below the margin as only its error allows
        (0.9233, True, False),  # within the margin, but not with the margin's error
    ],
)
def test_equivalence_is_claimed_within_a_third_of_the_gain(hash_6, known, surely):
    aucs = made_up(Hash_6=hash_6)
    text, _, of_rows = study.equivalence(table_of(aucs))
    assert plain_equivalence(aucs, "Hash-6") == (known, surely)
    assert ("**claimed**" in text) == (known and surely) != ("**not claimed**" in text)
    gain = estimated(aucs, "ALL - scratch").mean()
    assert interval(aucs, "Hash-6 - ALL", 0.9) in text
    assert f"±{gain / 3:.4f}, a third of ALL - scratch = {shown(aucs, 'ALL - scratch')}" in text
    expected = []
    for row in EQUIVALENCE:
        share = max(np.abs(estimated(aucs, f"{row} - ALL").interval(0.9))) / gain
        verdict = "yes" if all(plain_equivalence(aucs, row)) else "no"
        ends = interval(aucs, f"{row} - ALL", 0.9)
        expected.append([row, str(RUNS[row]), ends, f"up to {share:.0%}", verdict])
    assert cells_of(of_rows) == expected and expected[4][::4] == ["ALL-c32", "no"]


@pytest.mark.parametrize("scratch", [0.96, 0.908])  # no gain, or an interval that reaches 0
def test_without_a_gain_nothing_is_equivalent(scratch):
    aucs = made_up(scratch=scratch)
    gain = estimated(aucs, "ALL - scratch")
    assert gain.ppf(0.025) < 0 and (gain.mean() > 0) == (scratch < 0.96)
    [text] = study.equivalence(table_of(aucs))
    assert "**not claimed**: pre-training may gain nothing here" in text


def test_the_length_that_reaches_all_counts_the_slices_that_steps_have_seen():
    """AUCs of all runs of a row alike, so that the crossing is known."""
    means = {"ALL-steps-x0.5": 0.89, "ALL": 0.9, "ALL-steps-x3": 0.91}
    means |= {"Hash-6-steps-x0.146": 0.88, "Hash-6-steps-x0.5": 0.89, "Hash-6": 0.91}
    means |= {"Hash-6-steps-x3": 0.92, "Random-matched": 0.89, "Random-matched-steps-x3": 0.895}
    table = table_of({name: np.full(RUNS[name], mean) for name, mean in means.items()})
    _, to_reach = study.length_tables(table)
    steps = 350 * 2**0.5  # halfway between 350 and 700 steps, on a logarithmic scale
    assert cells_of(to_reach) == [  # an epoch is 48 batches of all slices, or 7
        ["ALL", "700", f"{700 * 6075 / 48 / 1000:.1f}", "7.00"],
        ["Hash-6", f"{steps:.0f}", f"{steps * 857 / 7 / 1000:.1f}", f"{steps / 100:.2f}"],
        ["Random-matched", "-", "-", "-"],  # none of its lengths does
    ]


def make_runs(monkeypatch, tmp_path, rows):
    """make.py of these rows and one toy task."""
    monkeypatch.setattr(make, "PLAN", rows | {"Hash-6": (make.HASH_6, "", 0)})
    monkeypatch.setattr(make, "EVALUATIONS", ["toy-lesion"])
    monkeypatch.setattr(sys, "argv", ["make.py", f"{tmp_path}/my data", f"{tmp_path}/out"])
    make.main()


def test_the_runs_are_made_by_the_scripts_once(tmp_path, tasks, here, monkeypatch, capsys):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    shutil.copytree(tasks, tmp_path / "my data" / "toy-lesion")
    toy.write_cohort(tmp_path / "my data" / "ct", patients=2, slices=12)
    with pytest.raises(SystemExit, match="reduce.py failed: see the end of .*log.txt"):
        make.call(SimpleNamespace(ends_at=None), log, "reduce.py", tmp_path / "nothing", out)
    assert "error: " in log.read_text()
    monkeypatch.setattr(make, "call", lambda args, log, *command: here(*command))
    tiny = "--size 32 --batch-size 8 --steps 2"
    make_runs(monkeypatch, tmp_path, {"ALL": (make.ALL, tiny, 1)})
    assert capsys.readouterr().out == "ALL seed 0: done\n"
    [record] = files.read_json(out / "runs.jsonl", lines=True)
    [line] = read_results(out / "results.csv")
    assert [record[key] for key in ("row", "seed", "encoder")] == ["ALL", 0, line["encoder"]]
    first, *_, last = files.read_json(out / "runs" / "ALL-seed-0" / "log.jsonl", lines=True)
    assert record["log"]["settings"] == first["settings"] and record["log"]["last"] == last
    assert "command" not in record["log"]
    assert {"evaluate.py", "pretrain.py"} <= set(record["code"])

    calls = []
    monkeypatch.setattr(make, "call", lambda args, log, script, *_: calls.append(script))
    make_runs(monkeypatch, tmp_path, {"ALL": (make.ALL, tiny, 1)})
    assert calls == ["reduce.py"] * 2  # which notices when the CT has changed
    with pytest.raises(SystemExit, match="ALL seed 0: was made otherwise .pretrain .*another OUT"):
        make_runs(monkeypatch, tmp_path, {"ALL": (make.ALL, "--lr 0.01", 1)})


def test_the_runs_go_seed_by_seed_and_stop_at_the_first_that_fails(tmp_path, monkeypatch):
    commands = {}  # by their log, in order

    def call(args, log, *command):
        words = " ".join(map(str, command)).replace(str(tmp_path), "IN")
        commands.setdefault(log.name.removesuffix(".txt"), []).append(words)
        time.sleep(0.02)
        if log.name == "Random-matched-seed-1.txt":
            files.fail("it failed")

    monkeypatch.setattr(make, "call", call)
    monkeypatch.setattr(make, "record_of", lambda row, seed, *_: {"row": row, "seed": seed})
    rows = ["Random-matched", "ALL", "Embedding-budget", "ALL-steps-x0.5", "scratch"]
    with pytest.raises(SystemExit, match="it failed"):
        make_runs(monkeypatch, tmp_path, {row: make.PLAN[row] for row in rows})
    # two selections that others need, then the run whose encoder selects
    assert list(commands)[:3] == ["select-ALL", "select-Hash-6", "ALL-seed-0"]
    runs = [name for name in commands if not name.startswith("select-")]
    assert runs[:5] == ["ALL-seed-0", *(f"{row}-seed-0" for row in rows if row != "ALL")]
    assert runs[5] == "Random-matched-seed-1" and len(runs) <= 7  # the next may have begun
    encoder, hash_6 = "IN/out/runs/ALL-seed-0/encoder.pt", "IN/out/slices/Hash-6.csv"
    for name, ending in {
        "select-Random-matched-seed-1": f"--strategy random --like {hash_6} --seed 1",
        "select-Embedding-budget": f"--strategy embedding --encoder {encoder} --keep {hash_6}",
        "ALL-seed-0": f"--encoder {encoder}",
        "scratch-seed-0": "--encoder scratch --seeds 1",
    }.items():
        assert commands[name][-1].endswith(ending)
    pretrained, _ = commands["ALL-steps-x0.5-seed-0"]
    assert "select-ALL-steps-x0.5" not in commands  # ALL's selection is its own
    assert pretrained.startswith("pretrain.py IN/out/slices/ALL.csv IN/out/runs/ALL-steps-x0.5")
    assert pretrained.endswith("--steps 375")
