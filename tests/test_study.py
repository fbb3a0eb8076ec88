"""The study: its plan against its evidence, its analysis against plain arithmetic."""

import csv
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
from sklearn.metrics import roc_auc_score

from common import auc, files, toy
from common.tables import COLUMNS, ONE_TABLE, Table, add_line, p_text, read_results, tables
from results.study import analysis as study
from results.study import make
from results.study.analysis import EQUIVALENCE, OUTCOMES, PRIMARY, SECONDARY, SPLIT, analysis
from results.study.make import PLAN

STUDY = ROOT / "results" / "study"
MEANS = {"scratch": 0.86, "ALL-c32": 0.88, "ALL-c32-masked": 0.885, "Random-matched": 0.9}
DECISIVE = "arch size batch_size optimizer lr warmup steps sample neighbours loss_groups".split()
DECISIVE += ["mask_negatives", "mask_random"]
HYPOTHESES = ["Hash-6 - ALL", "Hash-6 - Random-matched", "ALL-c32-masked - ALL-c32"]
FOUR = "ALL-double - ALL-c32-double - ALL + ALL-c32"

# --- The published study.


def test_the_published_numbers_come_out_unchanged():
    """README.md and tables.md as published, from results.csv and its draws alone."""
    assert tables(STUDY / "results.csv") + "\n" == (STUDY / "tables.md").read_text()
    published = (STUDY / "README.md").read_text()  # as first printed, on 2026-11-26
    for numbers in (
        "+0.0034 [-0.0004, +0.0071] | 0.076 | 0.229 | 0.030 | 0.0053 | 0.0007",
        "+0.0024 [-0.0017, +0.0064] | 0.248 | 0.495 | 0.130 | 0.0058 | 0.0005",
        "+0.0007 [-0.0040, +0.0054] | 0.765 | 0.765 | 0.818 | 0.0067 | 0.0007",
        "[+0.0002, +0.0065]; it would have to lie within ±0.0155",
        "0.909 ± 0.004 [0.905, 0.913] | 0.963 ± 0.002 [0.961, 0.966] | 0.980 ± 0.002",
    ):
        assert numbers in published


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
    planned = [(row, seed) for row in PLAN for seed in range(PLAN[row][2])]
    assert sorted((made["row"], made["seed"]) for made in records) == sorted(planned)
    args = SimpleNamespace(out=tmp_path, seeds=12, rows=list(PLAN))
    assert make.runs_to_make(args) == sorted(planned, key=lambda run: run[1])  # seed by seed
    selections = {}
    (tmp_path / "h.csv").touch()
    for row in set(PLAN) - {"scratch"}:
        words = make.settings(row)["reduce"].replace("SEED", "0")
        for name in ("HASH_6", "ALL_0"):
            words = words.replace(name, f"{tmp_path}/h.csv")
        assert read_by(monkeypatch, f"reduce.py ct out {words}")["size"] == 128
        flags = read_by(monkeypatch, f"pretrain.py s.csv run {make.settings(row)['pretrain']}")
        for made in (made for made in records if made["row"] == row):
            logged = made["log"]["settings"]
            same = set(flags) & set(logged) - {"seed", "precision", "selection"}
            assert same >= set(DECISIVE)
            assert {name: logged[name] for name in same} == {name: flags[name] for name in same}
            # the same flags of reduce.py, the same slices, and no other's
            key = PLAN[row][0], made["seed"] if "SEED" in PLAN[row][0] else None
            selections.setdefault(key, set()).add(logged["selection"])
    assert all(len(digests) == 1 for digests in selections.values())
    assert len(set.union(*selections.values())) == len(selections)


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


# --- The analysis of made-up AUCs, without draws: runs only.


def made_up(spread=0.004, **means):
    """{row: AUC of each planned run of organ with 1 % of the labels}."""
    rng = np.random.default_rng(0)
    means = MEANS | {name.replace("_", "-"): mean for name, mean in means.items()}
    return {
        name: np.round(means.get(name, 0.91) + spread * rng.standard_normal(PLAN[name][2]), 5)
        for name in PLAN
    }


def cost_of(name):
    if name == "scratch":
        return {}
    slices = 857 if name.startswith(("Hash", "Random")) else 6075
    steps = round(700 * float(name.partition("-steps-x")[2] or 1))
    return {"slices": slices, "steps": steps, "dose": 0.4, "pretrain_seconds": steps * 0.6}


@pytest.fixture
def analysed(tmp_path):
    """analysed({row: AUCs}): the analysis of these; a column's AUCs are 0.01 below the last's."""

    def call(aucs, outcomes=OUTCOMES):
        with open(tmp_path / "results.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for i, column in enumerate(outcomes):
                of_table = dict(zip(ONE_TABLE, OUTCOMES[column], strict=True)) | {"test": 80}
                for name, values in aucs.items():
                    for seed, value in enumerate(values):
                        encoder = name if name == "scratch" else f"{name}-{seed}"
                        line = {"name": name, "seed": seed, "encoder": encoder}
                        line["auc"] = f"{value - i / 100:.5f}"
                        writer.writerow(of_table | line | cost_of(name))
        return analysis(tmp_path / "results.csv")

    return call


def part(text, title):
    """What stands under a heading."""
    return text.split(f"\n## {title}")[1].split("\n## ")[0]


def lines_of(text, title):
    """The cells of each line of the tables under a heading."""
    lines = part(text, title).splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]


def cells_of(text, title):
    return {line[0]: line[1:] for line in lines_of(text, title)}


def estimated(aucs, difference):
    """The t distribution of a difference, or of {row: weight}, by the variance of all rows."""
    if isinstance(difference, str):
        name, other = difference.split(" - ")
        difference = {name: 1, other: -1}
    freedom = sum(len(runs) - 1 for runs in aucs.values())
    variance = sum(((runs - runs.mean()) ** 2).sum() for runs in aucs.values()) / freedom
    error = (variance * sum(w**2 / len(aucs[row]) for row, w in difference.items())) ** 0.5
    return stats.t(freedom, sum(w * aucs[row].mean() for row, w in difference.items()), error)


def p_of(aucs, difference):
    found = estimated(aucs, difference)
    return 2 * min(found.cdf(0), found.sf(0))


def interval(aucs, difference, confidence):
    return "[{:+.4f}, {:+.4f}]".format(*estimated(aucs, difference).interval(confidence))


def shown(aucs, difference):
    return f"{estimated(aucs, difference).mean():+.4f} {interval(aucs, difference, 0.95)}"


def test_primary_differences_and_holm_are_plain_arithmetic(analysed):
    aucs = made_up(spread=0.006)
    text = analysed(aucs)
    assert text.startswith("151 of 151 planned runs, with all evaluations.\n")
    assert all(f"\n{column}: intervals cover runs only" in text for column in OUTCOMES)
    found = cells_of(text, "Primary")
    p = [p_of(aucs, difference) for difference in HYPOTHESES]
    corrected = auc.holm(p)
    assert len(set(corrected)) == 3
    for i, difference in enumerate(HYPOTHESES):
        name, other = (aucs[row] for row in difference.split(" - "))
        p_values = p[i], corrected[i], stats.ttest_ind(name, other, equal_var=False).pvalue
        assert found[f"H{i + 1}"][:3] == [
            difference,
            f"{len(name)}, {len(other)}",
            shown(aucs, difference),
        ]
        of_null = estimated(aucs, difference)
        detectable = of_null.ppf(0.975) + of_null.ppf(0.8) - 2 * of_null.mean()
        assert found[f"H{i + 1}"][3:] == [*map(p_text, p_values), f"{detectable:.4f}", "-"]
    predicted = found["H3's gain at most, as the paper explains it"]
    assert predicted == ["ALL - ALL-c32", "12, 6", shown(aucs, "ALL - ALL-c32"), *["-"] * 5]


def test_two_rows_that_vary_more_need_welch():
    """True nulls: H3's rows vary twice as much as the other rows, whose variance they are given."""
    rng = np.random.default_rng(0)
    sd = dict.fromkeys(PLAN, 1) | {"ALL-c32": 2, "ALL-c32-masked": 2}
    p_values = []
    for _ in range(1000):
        aucs = {name: sd[name] * rng.standard_normal(PLAN[name][2]) for name in PLAN}
        between = auc.variance_between_runs(aucs.values())
        table = Table([], aucs, np.zeros((len(aucs), len(aucs))), 0, between)
        p_values.append([f(table, HYPOTHESES[2]).p for f in (study.estimate, study.welch)])
    pooled, own = np.mean(np.array(p_values) < 0.05, axis=0)
    assert 0.22 <= pooled <= 0.30 and 0.03 <= own <= 0.07


def plain_equivalence(aucs, row):
    """Whether by the rule with the third taken as known; whether its error may count as well."""
    third = estimated(aucs, "ALL - scratch").mean() / 3
    low, high = estimated(aucs, f"{row} - ALL").interval(0.9)
    tests = [
        {row: sign, "ALL": 1 / 3 - sign, "scratch": -1 / 3}  # sign * (row - ALL) + third
        for sign in (1, -1)
    ]
    surely = all(estimated(aucs, weights).ppf(0.05) > 0 for weights in tests)
    return -third < low and high < third, surely


@pytest.mark.parametrize(
    "hash_6, known, surely",
    [
        (0.91, True, True),
        (0.918, True, True),  # different, and equivalent all the same
        (0.935, False, False),  # better by more than the margin is not equivalent
        (0.885, False, False),
        (0.9233, True, False),  # within the margin, but not with the margin's error
    ],
)
def test_equivalence_is_claimed_within_a_third_of_the_gain(analysed, hash_6, known, surely):
    aucs = made_up(Hash_6=hash_6)
    whole = analysed(aucs)
    text = part(whole, "Equivalence")
    assert plain_equivalence(aucs, "Hash-6") == (known, surely)
    assert ("**claimed**" in text, "**not claimed**" in text) == (surely, not surely)
    gain = estimated(aucs, "ALL - scratch").mean()
    assert interval(aucs, "Hash-6 - ALL", 0.9) in text
    assert f"±{gain / 3:.4f}, a third of ALL - scratch = {shown(aucs, 'ALL - scratch')}" in text
    found = cells_of(whole, "Equivalence")
    assert list(found)[2:] == EQUIVALENCE and found["ALL-c32"][3] == "no"
    for row in EQUIVALENCE:
        share = max(np.abs(estimated(aucs, f"{row} - ALL").interval(0.9))) / gain
        verdict = "yes" if all(plain_equivalence(aucs, row)) else "no"
        of_row = [interval(aucs, f"{row} - ALL", 0.9), f"up to {share:.0%}", verdict]
        assert found[row][1:] == of_row


@pytest.mark.parametrize("scratch", [0.96, 0.908])
def test_without_a_gain_nothing_is_equivalent(analysed, scratch):
    """Also where the mean gains, but its interval reaches 0."""
    aucs = made_up(scratch=scratch)
    gain = estimated(aucs, "ALL - scratch")
    assert gain.ppf(0.025) < 0 and (gain.mean() > 0) == (scratch < 0.96)
    text = analysed(aucs)
    assert "**not claimed**: pre-training may gain nothing here" in text
    assert not cells_of(text, "Equivalence")


def test_split_and_secondary_differences(analysed):
    aucs = made_up(ALL_masked=0.93, Clusters_6=0.9)
    text = analysed(aucs)
    split = lines_of(text, "Hash-6 - ALL, split")[2:]
    expected = []
    for label, difference in SPLIT + SECONDARY:
        weights = dict(zip(difference.split(" - "), (1, -1), strict=False))
        if difference == FOUR:
            weights = {"ALL-double": 1, "ALL-c32-double": -1, "ALL": -1, "ALL-c32": 1}
        runs = ", ".join(str(len(aucs[name])) for name in weights)
        expected.append([label, difference, runs, shown(aucs, weights)])
    assert split + lines_of(text, "Secondary")[2:] == expected
    *parts, together = [float(line[-1].split()[0]) for line in split]
    assert sum(parts) == pytest.approx(together, abs=2e-4)  # as printed
    assert study.weights_of("A - B - A") == {"A": 0, "B": -1}  # no weight is lost
    with pytest.raises(ValueError):
        study.weights_of("ALL Hash-6")


def test_the_error_of_the_label_draws_is_that_of_differences_by_draw(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = np.arange(60), np.arange(60) % 2
    by_draw = {"ALL": [], "Hash-6": []}
    for name, seed in ((name, seed) for name in by_draw for seed in range(2)):
        line = dict.fromkeys(COLUMNS, "1") | {"task": "organ", "name": name, "seed": seed}
        line |= {"encoder": f"{name}-{seed}", "label_share": "0.01", "folds": ""}
        line |= {"protocol": "linear", "auc": "0.5"}
        p = rng.random((10, 60, 2)).astype(np.float32)
        add_line(tmp_path / "results.csv", line, images, labels, images, p)
        by_draw[name].append([roc_auc_score(labels, part[:, 1]) for part in p])
    differences = np.mean(by_draw["Hash-6"], axis=0) - np.mean(by_draw["ALL"], axis=0)
    found = cells_of(analysis(tmp_path / "results.csv"), "Primary")
    assert float(found["H1"][-1]) == pytest.approx(stats.sem(differences), abs=1e-4)
    assert found["H2"][-1] == "-"


def test_length_counts_the_slices_that_steps_have_seen(analysed):
    """AUCs of all runs of a row alike, so that the crossing is known."""
    means = {"ALL-steps-x0.5": 0.89, "ALL": 0.9, "ALL-steps-x3": 0.91, "EveryN": 0.9}
    means |= {"Hash-6-steps-x0.146": 0.88, "Hash-6-steps-x0.5": 0.89, "Hash-6": 0.91}
    means |= {"Hash-6-steps-x3": 0.92, "Random-matched": 0.89, "Random-matched-steps-x3": 0.895}
    means |= {"ALL-double": 0.95, "ALL-double-steps-x2": 0.96}
    lines = lines_of(analysed({name: np.full(2, means[name]) for name in means}), "Length")
    names = [line[0] for line in lines[2 : len(means) + 1]]
    assert names == [name for name in means if name != "EveryN"]  # which has one length
    batches = {"Hash-6": 7, "ALL-steps-x3": 48, "ALL-double": 24}  # an epoch; of 128, double 256
    for row, number in batches.items():
        slices, steps = cost_of(row)["slices"], cost_of(row)["steps"]
        seen = f"{steps * slices / number / 1000:.1f}"
        found = next(line for line in lines if line[0] == row)
        assert found[1:5] == [str(steps), seen, f"{steps / 100:.2f}", "2"]
        assert found[5].startswith(f"{means[row]:.3f} ")
    steps = 350 * 2**0.5  # halfway between 350 and 700 steps, on a logarithmic scale
    hash_6 = [f"{steps:.0f}", f"{steps * 857 / 7 / 1000:.1f}", f"{steps * 0.6 / 60:.2f}"]
    assert lines[-4:] == [
        ["ALL", "700", f"{700 * 6075 / 48 / 1000:.1f}", "7.00"],
        ["Hash-6", *hash_6],
        ["Random-matched", "more than 2100", "-", "-"],
        ["ALL-double", "at most 700", f"at most {700 * 6075 / 24 / 1000:.1f}", "at most 7.00"],
    ]


def test_a_study_cut_short(analysed):
    """Holm counts three, also where a row is missing or has one run; more runs do not count."""
    aucs = made_up(spread=0.006)
    more = aucs | {"Another": np.array([0.9, 0.92]), "EveryN": np.linspace(0.9, 0.92, 5)}
    text = analysed(more)
    found = cells_of(text, "All rows")
    assert text.startswith("151 of 151") and list(found) == ["row", "---", *PLAN, "Another"]
    assert found["Another"][2] == "2, not planned" and found["EveryN"][2] == "5 of 3"
    short = aucs | {"ALL-c32": aucs["ALL-c32"][:1]}
    del short["Random-matched"]
    text = analysed(short)
    assert text.startswith("138 of 151 planned runs, with all evaluations. **No p counts")
    assert cells_of(text, "All rows")["Random-matched"] == ["-", "-", "0 of 8", *["-"] * 7]
    found = cells_of(text, "Primary")
    assert found["H2"][1:] == ["8, 0", *["-"] * 6] and found["H3"][1:] == ["6, 1", *["-"] * 6]
    p = p_of(short, "Hash-6 - ALL")
    assert found["H1"][3:5] == [p_text(p), p_text(min(1, 3 * p))]
    text = analysed({name: aucs[name][:1] for name in aucs}, outcomes=[PRIMARY])
    assert text.startswith("0 of 151") and part(text, "Equivalence").endswith("H1\n\n-\n")
    with pytest.raises(SystemExit, match="holds no results of organ, linear, 1 % of the"):
        analysed(aucs, outcomes=["covid-ct"])


# --- Making the runs.


@pytest.fixture
def make_tiny(tmp_path, monkeypatch):
    """make_tiny(arguments): make.py on DATA and OUT, with tiny networks and one toy task."""
    monkeypatch.setattr(make, "REDUCE", "--size 32 --workers 1")
    monkeypatch.setattr(make, "PRETRAIN", "--arch resnet18 --size 32 --batch-size 8 --steps 2")
    monkeypatch.setattr(make, "EVALUATE", "--protocol linear --arch resnet18 --size 32")
    monkeypatch.setattr(make, "EVALUATIONS", ["toy-lesion"])
    command = ["make.py", str(tmp_path / "my data"), str(tmp_path / "out")]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        make.main()

    return call


def test_the_runs_are_made_by_the_scripts_once(tmp_path, make_tiny, here, monkeypatch, capsys):
    toy.write_cohort(tmp_path / "my data" / "ct", patients=2, slices=12)
    toy.write_tasks(tmp_path / "my data", size=32)
    shutil.copytree(tmp_path / "my data", tmp_path / "my data" / "toy-lesion")
    start = make.call

    def call(log, script, *arguments):
        if script == "reduce.py":
            start(log, script, *arguments)
        else:  # in this process, which has imported torch
            here(script, *arguments)

    monkeypatch.setattr(make, "call", call)
    command = ["--rows", "ALL", "--seeds", "1"]
    make_tiny(*command)
    assert capsys.readouterr().out == "ALL seed 0: done\n"
    out = tmp_path / "out"
    [record] = files.read_json(out / "runs.jsonl", lines=True)
    [line] = read_results(out / "results.csv")
    assert [record[key] for key in ("row", "seed", "encoder")] == ["ALL", 0, line["encoder"]]
    first, *_, last = files.read_json(out / "runs" / "ALL-seed-0" / "log.jsonl", lines=True)
    assert record["log"]["settings"] == first["settings"] and record["log"]["last"] == last
    assert "command" not in record["log"]
    assert {"evaluate.py", "pretrain.py"} <= set(record["code"])

    calls = []
    monkeypatch.setattr(make, "call", lambda log, script, *_: calls.append(script))
    make_tiny(*command)
    assert calls == ["reduce.py"] * 2  # which notices when the CT has changed
    monkeypatch.setitem(make.PLAN, "ALL", (make.ALL, "--lr 0.01", 12))
    with pytest.raises(SystemExit, match="ALL seed 0: was made otherwise .pretrain .*another OUT"):
        make_tiny(*command)


def test_the_runs_go_seed_by_seed_and_stop_at_the_first_that_fails(
    tmp_path, make_tiny, monkeypatch
):
    calls = []

    def call(log, script, *arguments):
        calls.append(" ".join(map(str, [script, *arguments])).replace(str(tmp_path / "out"), "OUT"))
        time.sleep(0.02)
        if log.name == "Random-matched-seed-1.txt":
            files.fail(f"{script} failed")

    monkeypatch.setattr(make, "call", call)
    monkeypatch.setattr(make, "record_of", lambda row, seed, *_: {"row": row, "seed": seed})
    rows = ["Random-matched", "ALL", "EveryN", "Embedding-budget", "ALL-steps-x0.5", "scratch"]
    with pytest.raises(SystemExit, match="pretrain.py failed"):
        make_tiny("--rows", *rows)
    # two selections that others need, then the run whose encoder selects
    scripts = [call.split()[0] for call in calls]
    assert scripts[:4] == ["reduce.py"] * 2 + ["pretrain.py", "evaluate.py"]
    runs = re.findall(r"pretrain.py \S+ OUT/runs/(\S+) --seed (\d)", "\n".join(calls))
    made = [("ALL-seed-0", "0"), ("Random-matched-seed-0", "0")]
    made += [(f"{row}-seed-0", "0") for row in rows[2:-1]] + [("Random-matched-seed-1", "1")]
    assert runs[: len(made)] == made and len(runs) <= len(made) + 1  # the next may have begun
    found = re.findall(r"reduce.py .* --name (\S+) (.*)", "\n".join(calls))
    assert [name for name, _ in found][:2] == ["ALL", "Hash-6"]
    flags = dict(found)
    assert "ALL-steps-x0.5" not in flags  # ALL's selection is its own
    of_random = "--strategy random --like OUT/slices/Hash-6.csv --seed 1"
    assert flags["Random-matched-seed-1"].endswith(of_random)
    assert flags["EveryN"].endswith("--strategy every-n --keep OUT/slices/Hash-6.csv")
    assert "--encoder OUT/runs/ALL-seed-0/encoder.pt " in flags["Embedding-budget"]
    of_half = next(call for call in calls if "ALL-steps-x0.5-seed-0" in call)
    assert of_half.startswith("pretrain.py OUT/slices/ALL.csv ")
    assert of_half.endswith("--steps 375")
    first, *_, of_scratch = [call for call in calls if call.startswith("evaluate.py")][:6]
    assert of_scratch.endswith("--encoder scratch --seeds 1")
    assert first.startswith(f"evaluate.py toy-lesion {tmp_path / 'my data' / 'toy-lesion'} ")
    assert first.endswith("--encoder OUT/runs/ALL-seed-0/encoder.pt")


def test_the_command_prints_the_analysis_and_draws_the_figure(tmp_path, monkeypatch, capsys):
    command = ["analysis.py", str(STUDY / "results.csv"), "--figure", str(tmp_path / "figure.svg")]
    monkeypatch.setattr(sys, "argv", command)
    study.main()
    assert capsys.readouterr().out == (STUDY / "README.md").read_text()
    assert (tmp_path / "figure.svg").read_text() == (STUDY / "figure.svg").read_text()
