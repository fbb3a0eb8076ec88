"""The study's figure: AUC against optimiser steps, and against the dose of near-duplicates."""

import re

import numpy as np

from common.figure import BLACK, BLUE, GREY, PALE, axis, dot, line, text, write_svg
from common.files import fail

TOP, BOTTOM = 52, 330  # of both panels
COLOURS = {  # of a curve; all slices are blue in both panels
    "ALL": BLUE,
    "Hash-6": "#c24a00",
    "Random-matched": "#2f7d32",
    "ALL, masked": "#8a3fa0",
    "ALL, masked-volume": "#b8860b",
}
CAPTIONS = [
    "Bars: 95 % interval over pre-training runs. What lies at one place is drawn side by side.",
    "Right: ALL as it is, and in batches made of runs of 8 or of 32 neighbouring slices.",
    "Masked: a slice's near-duplicates (masked-volume: all slices of its volume) are no negatives;",
    "drawn at the dose that the same batches have without a mask.",
]


def draw(table, heading, path):
    """Draw the rows of a table: AUC with its interval over runs.

    Left: the selections, each at several lengths (ALL, ALL-steps-x3). Right: ALL and its runs of
    neighbours (ALL-c8), plain and with masked negatives (ALL-c8-masked).
    """
    table = table._replace(covariance=np.zeros_like(table.covariance))  # runs only
    by_steps = {row: lengths_of(table, row) for row in ("ALL", "Hash-6", "Random-matched")}
    by_dose = {
        "ALL": doses_of(table, ""),
        "ALL, masked": doses_of(table, "-masked"),
        "ALL, masked-volume": doses_of(table, "-masked-volume"),
    }
    curves = [*by_steps.values(), *by_dose.values()]
    names = [name for curve in curves for _, name in curve]
    if not names:
        fail(f"{path}: nothing to draw: no row ALL, Hash-6 or Random-matched")
    names += [name for name in table.aucs if name == "scratch"]
    estimates = {name: table.estimate({name: 1}) for name in names}
    y_of, numbers = axis([estimate.interval for estimate in estimates.values()], BOTTOM, TOP)
    shapes = [text(12, 24, heading, size=15)]
    panels = [
        ("optimiser steps", by_steps),
        ("near-duplicate negatives of a slice", by_dose),
    ]
    for left, (label, curves) in zip((56, 456), panels, strict=True):
        draw_ground(shapes, left, left + 330, estimates, y_of, numbers)
        draw_curves(shapes, left, left + 330, label, curves, estimates, y_of)
    for i, caption in enumerate(CAPTIONS):
        shapes.append(text(12, 424 + 17 * i, caption, GREY))
    write_svg(path, shapes, 490)


def lengths_of(table, row):
    """[(steps, name)] of a row and of its other lengths, by steps."""
    names = [name for name in table.aucs if name.split("-steps")[0] == row and table.cost(name)]
    return sorted((table.cost(name)["steps"], name) for name in names)


def doses_of(table, ending):
    """[(dose of ALL or ALL-c8, the row of that name with this ending)], by dose."""
    names = [name for name in table.aucs if re.fullmatch(r"ALL(-c\d+)?", name)]
    pairs = [(table.cost(name)["dose"], name + ending) for name in names if table.cost(name)]
    return sorted(pair for pair in pairs if pair[1] in table.aucs)


def draw_ground(shapes, left, right, estimates, y_of, numbers):
    """The axis of AUC, and scratch."""
    for number, words in numbers:
        shapes.append(line(left, y_of(number), right, y_of(number), PALE))
        shapes.append(text(left - 6, y_of(number) + 4, words, GREY, "end"))
    if "scratch" in estimates:
        y = y_of(estimates["scratch"].value)
        shapes.append(line(left, y, right, y, GREY, 1.5, "5 4"))
        shapes.append(text(right, y - 6, "scratch (untrained weights)", GREY, "end"))


def draw_curves(shapes, left, right, label, curves, estimates, y_of):
    """The curves of a panel, {name: [(x, row), ...]}, their axis and their legend."""
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return
    x_of, scale = spread({x for curve in curves.values() for x, _ in curve}, left + 30, right - 30)
    for x, place in x_of.items():
        number = f"{x:.0f}" if x >= 100 else f"{x:.1f}"
        shapes.append(text(place, BOTTOM + 18, number, GREY, "middle"))
    shapes.append(text((left + right) / 2, BOTTOM + 38, label + scale, BLACK, "middle"))
    legend = left
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[name]
        beside = 6 * (i - (len(curves) - 1) / 2)
        points = [(x_of[x] + beside, y_of(estimates[row].value)) for x, row in curve]
        for start, end in zip(points[:-1], points[1:], strict=True):
            shapes.append(line(*start, *end, colour, 2))
        for (x, y), (_, row) in zip(points, curve, strict=True):
            low, high = map(y_of, estimates[row].interval)
            shapes.append(line(x, low, x, high, colour, 1.5))
            shapes.append(dot(x, y, colour, hollow=estimates[row].runs == 1))
        shapes.append(dot(legend + 5, BOTTOM + 62, colour))
        shapes.append(text(legend + 14, BOTTOM + 66, name))
        legend += 30 + 6.4 * len(name)


def spread(values, start, end):
    """({value: its pixel}, ", logarithmic"); where a value is 0 the scale is plain, and ""."""
    values = sorted(values)
    logarithmic = all(value > 0 for value in values)
    scaled = np.log(values) if logarithmic else np.array(values)
    middle, half = np.mean(scaled[[0, -1]]), max(np.ptp(scaled) / 2, 1e-9)
    places = (start + end) / 2 + (end - start) / 2 * (scaled - middle) / half
    return dict(zip(values, places, strict=True)), ", logarithmic" if logarithmic else ""
