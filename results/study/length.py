"""The analysis that length.md fixes in advance, as Markdown, and its figure.

python results/study/length.py OUT/results.csv --figure length.svg    # OUT of make.py --plan length
"""

import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import auc
from common.files import Flags, fail, read_json, run_script
from common.tables import markdown, p_text, read_tables, title
from results.study import analysis as study
from results.study.analysis import INTERVAL, OUTCOMES, PRIMARY, cells, estimate
from results.study.figure import draw_lengths
from results.study.make import planned

LEAST = {"ALL-38400": 4, "ALL-5600": 6, "Hash-6-5600": 6, "Random-matched-5600": 6}  # primary rows
TESTS = {
    "L1": "Hash-6-5600 - ALL-38400",
    "L2": "ALL-5600 - ALL-38400",
    "L3": "Hash-6-5600 - Random-matched-5600",
}
REST = "Hash-6-5600 - ALL-5600"  # L1 - L2
SHOWN = [
    REST,
    *("Hash-6-38400 - Hash-6-5600", "Random-matched-38400 - Random-matched-5600"),
    *("Hash-6-38400 - ALL-38400", "Random-matched-38400 - ALL-38400"),
    *("Random-128-38400 - ALL-38400", "ALL-5600 - ALL-2250", "ALL-12000 - ALL-5600"),
    *("ALL-38400-wd - ALL-38400", "ALL-5600-wd - ALL-38400-wd", "Hash-6-5600-wd - ALL-38400-wd"),
]
ASSAY, TO_FIND = "ALL-5600 - Random-128-5600", 0.008  # by L3
TO_TELL = 0.005  # by held-out volumes
COHORTS = ["Half-Hash-6 - Half-ALL", "Half-ALL-short - Half-ALL", "Half-Hash-6 - Half-ALL-short"]
FINETUNED = ("covid-ct", "finetune", "1", "")
PREFIXES = {"LARS": "LARS-", "AdamW": ""}


def main():
    parser = Flags(description=__doc__)
    parser.add_argument("results", type=Path, help="CSV of make.py, its runs.jsonl beside it")
    parser.add_argument("--ended", action="store_true", help="the time is over: test what there is")
    parser.add_argument("--pilot", action="store_true", help="other runs, as an example: no p")
    parser.add_argument("--figure", type=Path, help="SVG file to write")
    args = parser.parse_args()
    held = read_tables(args.results)
    if OUTCOMES[PRIMARY] not in held:
        fail(f"{args.results}: holds no results of {title(OUTCOMES[PRIMARY])}")
    records = read_json(args.results.with_name("runs.jsonl"), lines=True)
    print("\n\n".join(analysis(held, records, args.ended, args.pilot)))
    if args.figure:
        draw_lengths(held[OUTCOMES[PRIMARY]], "AUC: organ, 1 % of the labels", args.figure)


def analysis(held, records=(), ended=False, pilot=False):
    """Paragraphs. held: read_tables of the results. records: of runs.jsonl."""
    table = held[OUTCOMES[PRIMARY]]
    missing = [] if pilot else missing_runs(table)
    made = len(planned("length")) - len(missing)
    listed = ", ".join(f"{row} {seed}" for row, seed in missing) or "none"
    text = [f"{made} of {len(planned('length'))} planned runs. Missing (row, seed): {listed}."]
    if pilot:
        text = ["**Pilot, exploratory, not the study: none of its runs, and no p.**"]
    tables = {name: held[key] for name, key in OUTCOMES.items() if key in held}
    rows = [study.row_cells(tables, row, len(aucs)) for row, aucs in table.aucs.items()]
    text.append(markdown([["row", "slices", "dose", "runs", *tables], *rows]))
    tested = [name for name in PREFIXES if may_be_tested(table, name, missing, ended)]
    if not pilot and len(tested) < (1 if ended else 2):
        why = "No difference, interval or p of L1 to L3 before all runs of their rows are made"
        return [*text, f"{why}, or the time is over (`--ended`)."]
    text += ["## Primary", *primary_text(table, [] if pilot else tested), "## Assay control"]
    text += [assay(table, name) for name in PREFIXES]
    text += ["## Also shown", differences(table, SHOWN)]
    for key in [*OUTCOMES.values(), FINETUNED][1:]:
        if key in held:
            text += [f"{title(key)}:", differences(held[key], [*TESTS.values(), REST])]
    return [*text, *cohorts(table), *held_out(table, records), "## Check", check(table)]


def missing_runs(table):
    """[(row, seed)] of the plan that are not there; stops at a run that is not planned."""
    runs = {(line["name"], int(line["seed"])) for line in table.lines}
    for row, seed in sorted(runs - set(planned("length"))):
        fail(f"{row} seed {seed} is no run of the length study (for an example: --pilot)")
    return [run for run in planned("length") if run not in runs]


def may_be_tested(table, name, missing, ended):
    """Whether the primary rows have all planned runs; when the time is over, the least."""
    rows = {PREFIXES[name] + row: least for row, least in LEAST.items()}
    if ended:
        return all(len(table.aucs.get(row, [])) >= least for row, least in rows.items())
    return not any(row in rows for row, _ in missing)


def of(name, difference):
    """A difference of an optimiser's rows: of("LARS", "a - b") is "LARS-a - LARS-b"."""
    return " - ".join(PREFIXES[name] + row for row in difference.split(" - "))


def pooled(table, name):
    """The Table with the variance between the runs of an optimiser's primary rows."""
    rows = [table.aucs.get(PREFIXES[name] + row, []) for row in LEAST]
    return table._replace(between_runs=auc.variance_between_runs(rows))


def differences(table, shown):
    """A table of the differences, for both optimisers, whose rows have two runs or more."""
    enough = {row for row, aucs in table.aucs.items() if len(aucs) > 1}
    found = [(name, of(name, difference)) for name in PREFIXES for difference in shown]
    found = [run for run in found if enough.issuperset(run[1].split(" - "))]
    lines = [cells(pooled(table, name), difference) for name, difference in found]
    return markdown([["rows", "runs", "difference"], *lines])


def primary(table, tested):
    """Of the six tests: (optimiser, test, rows), [p, Welch's p], [Holm of either]."""
    six = [(name, test, of(name, TESTS[test])) for name in PREFIXES for test in TESTS]
    p_values = np.ones((6, 2))  # of what is not tested
    for i, (name, _, difference) in enumerate(six):
        if name in tested:
            pooled_p = estimate(pooled(table, name), difference).p
            p_values[i] = pooled_p, study.welch(table, difference)
    holm = np.transpose([auc.holm(p) for p in p_values.T])
    return six, p_values, holm


def primary_text(table, tested):
    """The six tests, and what follows for each optimiser: paragraphs."""
    if not tested:
        return [differences(table, TESTS.values())]
    lines = [["", "rows", "runs", "difference", "p", "Welch", "Holm", "Holm of Welch"]]
    counts = {}  # +1 or -1 for a difference that counts, else 0
    for (name, test, difference), p, holm in zip(*primary(table, tested), strict=True):
        if name in tested:
            value = estimate(table, difference).value
            counts[name, test] = np.sign(value) * (max(holm) < 0.05)
            shown = cells(pooled(table, name), difference)
            lines.append([test, *shown, *map(p_text, [*p, *holm])])
    return [markdown(lines), *(conclusion(table, name, counts) for name in tested)]


def conclusion(table, name, counts):
    """What length.md concludes of L1 to L3."""
    table = pooled(table, name)
    rest, whole = of(name, REST), of(name, TESTS["L1"])
    l1, l2, l3 = (counts[name, test] for test in TESTS)
    found = "less is more at 800 epochs each, "
    if l1 <= 0:
        found = "less is less at 800 epochs each" if l1 else "no gain seen at 800 epochs each"
    elif l2 <= 0:
        found += "that it is length is not borne out"
    elif not study.within_margin(table, rest, whole):
        found += "at least in part by length"
    elif not hash_6_falls_too(table, name):
        found += "by ALL's length; that Hash-6 falls as ALL does is not shown"
    else:
        found += "and the gain is length, all but less than a third"
    interval = INTERVAL.format(*estimate(table, rest).interval_90)
    size = f"L1 - L2: 90 % {interval}, a third of L1: {estimate(table, whole).value / 3:+.4f}"
    return f"{name}: **{found}** ({size}). L3 {'counts' if l3 else 'does not count'}."


def hash_6_falls_too(table, name):
    """Whether Hash-6 surely (one-sided, 5 %) falls by more than half of what ALL falls by."""
    falls = {"Hash-6-38400": 1, "Hash-6-5600": -1, "ALL-38400": -1 / 2, "ALL-5600": 1 / 2}
    falls = {PREFIXES[name] + row: weight for row, weight in falls.items()}
    enough = all(len(table.aucs.get(row, [])) > 1 for row in falls)
    return enough and table.estimate(falls).interval_90[1] < 0


def assay(table, name):
    """Whether the outcome would notice a bad choice of slices, by the rule of length.md."""
    difference = of(name, ASSAY)
    if min(len(table.aucs.get(row, [])) for row in difference.split(" - ")) < 2:
        return f"{name}: not made, so no difference in L3 says nothing of the choice of slices."
    found = estimate(study.by_own_variance(table, difference), difference)
    low, high = found.interval_90
    verdict = "**undecided**, taken as if it could not"
    if low > 0 and found.value >= TO_FIND:
        verdict = "**the outcome can judge** selections"
    elif high < TO_FIND:
        verdict = "**the outcome cannot judge**: L3 and L1 - L2 say nothing of any selection"
    return f"{difference} = {found.value:+.4f}, 90 % {INTERVAL.format(low, high)}: {verdict}."


def by_seed(table, row):
    return {int(line["seed"]): float(line["auc"]) for line in table.lines if line["name"] == row}


def cohorts(table):
    """Paired differences over random halves of the patients: paragraphs."""
    lines = [["rows", "halves", "difference", "these halves", "other cohorts"]]
    for difference in COHORTS:
        one, other = (by_seed(table, row) for row in difference.split(" - "))
        found = np.array([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])
        if len(found) > 1:
            wide = stats.t.ppf(0.975, len(found) - 1) * np.std(found, ddof=1)
            halves = [wide / len(found) ** 0.5, wide]
            ends = [INTERVAL.format(found.mean() - half, found.mean() + half) for half in halves]
            lines.append([difference, len(found), f"{found.mean():+.4f}", *ends])
    return ["## Cohorts", markdown(lines)] if lines[1:] else []


def held_out(table, records):
    """What held-out volumes tell at the end of each run, and where within it they turn."""
    lines = [["row", "seed", "AUC", "loss", "cosine", "loss turns at", "cosine turns at"]]
    ends = {}  # of ALL with AdamW, by steps: AUC, -loss and cosine at the end of each run
    for made in records:
        row, seed = made["row"], made["seed"]
        if row.endswith("-held") and seed in by_seed(table, row):
            course = made["log"]["course"]
            # embeddings of untrained weights are all alike, so that their cosine is high
            course = [at for at in course if at["step"] > course[-1]["step"] / 10]
            found = [(-at["held_out_loss"], at["held_out_positive"], at["step"]) for at in course]
            end = by_seed(table, row)[seed], *found[-1][:2]
            turns = max(found)[2], max(found, key=lambda at: at[1])[2]
            lines.append([row, seed, *(f"{abs(value):.4f}" for value in end), *turns])
            if not row.startswith("LARS-"):
                ends.setdefault(int(row.split("-")[1]), []).append(end)
    if len(ends) < 2:
        return []
    lengths = sorted(ends)
    means = np.array([np.mean(ends[steps], axis=0) for steps in lengths])
    best = means.argmax(axis=0)
    away = means[best[0], 0] - means[:, 0]
    text = f"AUC is highest after {lengths[best[0]]} steps, {away[-1]:.4f} above the longest."
    for what, i in (("loss is lowest", best[1]), ("cosine is highest", best[2])):
        verdict = "tells" if away[i] < TO_TELL <= away[-1] else "does not tell"
        text += f" The held-out {what} after {lengths[i]}, AUC -{away[i]:.4f}: it {verdict} when."
    return ["## Held-out volumes", markdown(lines), text]


def check(table):
    """Whether this machine gives the numbers of the 750-step study."""
    before = read_tables(Path(__file__).with_name("results.csv"))
    old, found = by_seed(before[OUTCOMES[PRIMARY]], "ALL"), by_seed(table, "Check-750")
    away = [found[seed] - old[seed] for seed in sorted(found)]
    same = "the same" if away and max(map(abs, away)) <= 0.002 else "not shown to be the same"
    listed = ", ".join(f"{value:+.5f}" for value in away) or "not made"
    return f"ALL, 750 steps, less the 750-step study's run of that seed: {listed}: {same}."


if __name__ == "__main__":
    run_script(main)
