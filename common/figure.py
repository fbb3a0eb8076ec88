"""The figures of a results.csv, as plain SVG files that a README shows at 800 pixels."""

import re
import sys
from html import escape
from operator import itemgetter

import numpy as np

from common.files import atomic_write, fail
from common.results import read_results
from common.tables import (
    DEPENDENT,
    cost,
    estimate_row,
    find_name,
    row_of,
    task_statistics,
    unique,
    variant_title,
    variants,
)

WIDTH = 800
LETTER = 7.2  # width of a letter of 12 pixels, about
ROW = 21  # height of a row
GAP = 16  # between panels
STEPS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]  # between the numbers of an axis
BLACK, GREY, PALE = "#222222", "#777777", "#e4e4e4"
BLUE, ORANGE, GREEN = "#0062a3", "#c24a00", "#3a8a2e"
CURVES = ["ALL", "Hash-6", "Random-matched"]  # rows of the study that have other lengths


def figure(results, path, baseline="ALL"):
    """AUC of every row with its 95 % interval, one panel a task, one block of panels a variant.

    Vertical lines stand for the baseline and for scratch; a row's label tells the share of the
    baseline's slices that it keeps.
    """
    rows = read_results(results)
    if not rows:
        fail(f"{results}: holds no results")
    drawing = []
    top = 0
    for variant, lines in variants(rows).items():
        top = draw_variant(drawing, top, results, variant, lines, baseline)
    sentences = [
        "Dot: mean AUC over runs; bar: 95 % interval. Hollow: one run, bar covers images only.",
        f"Lines: {baseline}; scratch dashed. In brackets: slices kept, as a share of {baseline}'s.",
    ]
    tasks = unique(rows, "task")
    sentences += [f"{task}: {DEPENDENT[task]}." for task in tasks if task in DEPENDENT]
    for sentence in sentences:
        drawing.append(text(12, top, sentence, colour=GREY))
        top += 17
    write_svg(path, drawing, top)


def draw_variant(drawing, top, results, variant, rows, baseline):
    """Draw the panels of one variant below `top`; where the next may start."""
    names, tasks = unique(rows, "name"), unique(rows, "task")
    base, scratch = find_name(names, baseline), find_name(names, "scratch")
    heights = {name: top + 72 + ROW * i for i, name in enumerate(names)}
    box = top + 56, top + 72 + ROW * len(names) - ROW / 2
    drawing.append(text(12, top + 24, variant_title(variant), size=15, weight="bold"))
    labels = {name: name + kept_share(rows, name, base) for name in names}
    left = 24 + LETTER * max(map(len, labels.values()))
    for name in names:
        drawing.append(text(left - 12, heights[name] + 4, labels[name], anchor="end"))
    width = (WIDTH - left) / len(tasks)
    for i, task in enumerate(tasks):
        found = task_statistics(results, rows, task)
        estimates = {name: estimate_row(found, name) for name in found["aucs"]}
        sides = left + i * width, left + (i + 1) * width - GAP
        heading = f"{task} (n={found['images']})"
        drawing.append(text(np.mean(sides), top + 46, heading, anchor="middle"))
        x_axis = axis_of([one["interval"] for one in estimates.values()], *sides)
        draw_grid(drawing, x_axis, *box)
        for reference, colour in ((scratch, GREY), (base, BLUE)):
            if reference in estimates:
                x = pixel(x_axis, estimates[reference]["value"])
                dashed = reference == scratch
                drawing.append(line(x, box[0], x, box[1], colour, width=1.5, dashed=dashed))
        for name in estimates:
            draw_row(drawing, x_axis, heights[name], estimates[name])
    return box[1] + 44


def kept_share(rows, name, base):
    """ " (14 %)", the slices of a row as a share of the baseline's; empty where unknown."""
    kept, everything = cost(rows, name), cost(rows, base)
    if not kept or not everything:
        return ""
    return f" ({100 * kept['slices'] / everything['slices']:.0f} %)"


def draw_row(drawing, x_axis, y, estimated):
    """A row's AUC as a dot and its interval as a bar; hollow where only one run is behind it."""
    low, high = (pixel(x_axis, end) for end in estimated["interval"])
    drawing.append(line(low, y, high, y, BLACK, width=2))
    drawing.append(dot(pixel(x_axis, estimated["value"]), y, BLACK, hollow=estimated["runs"] == 1))


def study_figure(results, path, task, variant):
    """AUC against optimiser steps (left) and against the dose of near-duplicate negatives (right).

    Left: a curve for each row of CURVES and its other lengths (ALL, ALL-steps-x3). Right: ALL and
    its runs of neighbours (ALL-c8), plain and with masked negatives (ALL-c8-masked); a masked row
    stands at the dose that its plain one met. Bands: 95 % t interval over runs, without the images,
    which are the same for all; a hollow dot has one run, so that no band reaches it.
    """
    rows = variants(read_results(results)).get(variant, [])
    if task not in unique(rows, "task"):
        fail(f"{results}: holds no results of {task}, {variant_title(variant)}")
    found = task_statistics(results, rows, task)
    found["covariance"] = np.zeros_like(found["covariance"])  # runs only
    estimates = {name: estimate_row(found, name) for name in found["aucs"]}
    costs = {name: cost(rows, name) for name in estimates}
    by_steps = {row: steps_curve(row, estimates, costs) for row in CURVES}
    by_dose = {
        "plain": dose_curve("", estimates, costs),
        "masked": dose_curve("-masked", estimates, costs),
        "masked-volume": dose_curve("-masked-volume", estimates, costs),
    }
    scratch = estimates.get(find_name(estimates, "scratch"))
    shown = [one for curve in [*by_steps.values(), *by_dose.values()] for _, one in curve]
    if not shown:
        print(f"no figure: {results} holds no rows of {', '.join(CURVES)}", file=sys.stderr)
        return
    y_axis = axis_of([one["interval"] for one in shown + [scratch] if one], 330, 44)
    doses = "near-duplicate negatives a slice meets"
    captions = [
        "Bands: 95 % interval over pre-training runs (hollow: one run). "
        "Dashed: untrained weights (scratch).",
        "Right: ALL, and batches made of runs of 8 or 32 neighbours, less varied.",
        "Masked: near-duplicates (masked-volume: all of the volume) are no negatives; "
        "at the dose that plain meets.",
    ]
    drawing = [text(12, 24, f"{task}, {variant_title(variant)}: AUC", size=15, weight="bold")]
    draw_curves(drawing, by_steps, y_axis, (56, 400), "optimiser steps", scratch)
    draw_curves(drawing, by_dose, y_axis, (446, 790), doses, scratch)
    for i, caption in enumerate(captions):
        drawing.append(text(12, 420 + 17 * i, caption, colour=GREY))
    write_svg(path, drawing, 468)


def steps_curve(row, estimates, costs):
    """[(steps, estimate), ...] of a row and of its other lengths."""
    names = [name for name in estimates if row_of(name) == row and costs[name]]
    return [(costs[name]["steps"], estimates[name]) for name in names]


def dose_curve(ending, estimates, costs):
    """[(dose of ALL or ALL-c8, estimate of the row of that name with this ending), ...]."""
    names = [name for name in estimates if re.fullmatch(r"ALL(-c\d+)?", name) and costs[name]]
    return [
        (costs[name]["dose"], estimates[name + ending])
        for name in names
        if name + ending in estimates
    ]


def draw_curves(drawing, curves, y_axis, sides, label, scratch):
    """A panel of curves, {name: [(x, estimate), ...]}, with bands over runs."""
    left, right = sides
    middle = (left + right) / 2
    draw_grid(drawing, y_axis, left, right, vertical=False)
    drawing.append(text(middle, 370, label, anchor="middle"))
    if scratch:
        y = pixel(y_axis, scratch["value"])
        drawing.append(line(left, y, right, y, GREY, width=1.5, dashed=True))
    x_of = spread_out([x for curve in curves.values() for x, _ in curve], left + 20, right - 20)
    labelled = -np.inf
    for x in x_of:
        if x_of[x] > labelled + 34:  # wide enough for a number
            labelled = x_of[x]
            number = f"{x:.0f}" if x >= 100 else f"{x:.2g}"
            drawing.append(text(labelled, 350, number, anchor="middle", colour=GREY))
    legend = left
    for (name, curve), colour in zip(curves.items(), (BLUE, ORANGE, GREEN)):
        if not curve:
            continue
        curve = sorted(curve, key=itemgetter(0))
        points = [(x_of[x], pixel(y_axis, one["value"])) for x, one in curve]
        lower = [(x_of[x], pixel(y_axis, one["interval"][0])) for x, one in curve]
        upper = [(x_of[x], pixel(y_axis, one["interval"][1])) for x, one in curve]
        for i in range(len(curve) - 1):
            drawing.append(line(*points[i], *points[i + 1], colour, width=2))
            if min(curve[i][1]["runs"], curve[i + 1][1]["runs"]) > 1:
                corners = [lower[i], lower[i + 1], upper[i + 1], upper[i]]
                drawing.append(band(corners, colour))
        for (x, y), low, high, (_, one) in zip(points, lower, upper, curve):
            drawing.append(line(*low, *high, colour, width=1.5))
            drawing.append(dot(x, y, colour, hollow=one["runs"] == 1))
        drawing.append(dot(legend + 5, 390, colour))
        drawing.append(text(legend + 14, 394, name))
        legend += 26 + LETTER * len(name)


def spread_out(values, start, end):
    """{value: pixel}, in order, on a logarithmic scale; on a plain one where a value is 0."""
    values = np.unique(values)
    scaled = np.log(values) if (values > 0).all() else values
    if len(values) < 2:
        return {x: (start + end) / 2 for x in values}
    return dict(zip(values, np.interp(scaled, [scaled[0], scaled[-1]], [start, end])))


# An axis is a pair: the two values at its ends, and the pixels where they lie.


def axis_of(intervals, start, end):
    """The axis from pixel `start` to `end` that holds all intervals, with a margin."""
    low, high = np.min(intervals), np.max(intervals)
    margin = max(0.06 * (high - low), 0.002)
    return (low - margin, high + margin), (start, end)


def pixel(axis, value):
    return float(np.interp(value, *axis))


def draw_grid(drawing, axis, start, end, vertical=True):
    """Pale lines and numbers at round values of an axis, from pixel start to end across it."""
    (low, high), _ = axis
    step = min(step for step in STEPS if high - low < 4.5 * step)
    for value in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step:
        at = pixel(axis, value)
        number = f"{value:.3f}" if step < 0.01 else f"{value:.2f}"
        if vertical:
            drawing.append(line(at, start, at, end, PALE))
            drawing.append(text(at, end + 16, number, anchor="middle", colour=GREY))
        else:
            drawing.append(line(start, at, end, at, PALE))
            drawing.append(text(start - 6, at + 4, number, anchor="end", colour=GREY))


def text(x, y, words, anchor="start", size=12, weight="normal", colour=BLACK):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="{colour}">{escape(words)}</text>'
    )


def line(x1, y1, x2, y2, colour, width=1, dashed=False):
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="{colour}" stroke-width="{width}"{dashes}/>'
    )


def dot(x, y, colour, hollow=False):
    fill = "white" if hollow else colour
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" '
        f'stroke="{colour}" stroke-width="1.5" fill="{fill}"/>'
    )


def band(points, colour):
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polygon points="{corners}" fill="{colour}" fill-opacity="0.15"/>'


def write_svg(path, drawing, height):
    """Write the shapes on a white ground, which a dark page needs."""
    with atomic_write(path, text=True) as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
            f'width="{WIDTH}" height="{height:.0f}" '
            f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">\n'
        )
        file.write('<rect width="100%" height="100%" fill="white"/>\n')
        file.write("\n".join(drawing) + "\n</svg>\n")
