"""The study's figure: AUC against optimiser steps, and against the dose of near-duplicates."""

import re

import numpy as np

from common.figure import BLACK, BLUE, GREY, PALE, axis, dot, line, text, write_svg
from common.files import fail

TOP, BOTTOM, WIDTH = 52, 330, 330  # of both panels
SELECTIONS = ["ALL", "Hash-6", "Random-matched"]  # left, each at several lengths
# right: what the names of a curve's rows end with
BATCHES = {"ALL": "", "ALL, masked": "-masked", "ALL, masked-volume": "-masked-volume"}
COLOURS = {  # of a curve; all slices are blue in both panels
    "ALL": BLUE,
    "Hash-6": "#c24a00",
    "Random-matched": "#2f7d32",
    "ALL, masked": "#8a3fa0",
    "ALL, masked-volume": "#b8860b",
    "Random-128": "#8a3fa0",
}
EPOCHS_800 = r"(LARS-)?(ALL-38400|Hash-6-5600|Random-matched-5600)"  # ringed
CAPTIONS = [
    "Bars: 95 % interval over pre-training runs. What lies at one place is drawn side by side.",
    "Right: ALL as it is, and in batches made of runs of 8 or of 32 neighbouring slices.",
    "Masked: a slice's near-duplicates (masked-volume: all slices of its volume) are no negatives;",
    "drawn at the dose that the same batches have without a mask.",
]
LENGTH_CAPTIONS = [
    "Bars: 95 % interval over pre-training runs. Rings: 800 epochs of the selection, as the paper",
    "compares. What lies at one place is drawn side by side.",
]


def draw(table, heading, path):
    """Left the selections at several lengths, right ALL and its batches of neighbours (ALL-c8)."""
    by_steps = {row: lengths_of(table, row) for row in SELECTIONS}
    by_dose = {name: doses_of(table, ending) for name, ending in BATCHES.items()}
    panels = {"optimiser steps": by_steps, "near-duplicate negatives of a slice": by_dose}
    draw_panels(table, heading, panels, CAPTIONS, path)


def draw_lengths(table, heading, path):
    """length.md's rows: LARS left, AdamW right, a curve a selection, 800 epochs of it ringed."""
    panels = {}
    for prefix, name in {"LARS-": "LARS", "": "AdamW"}.items():
        curves = panels[f"{name}: optimiser steps"] = {}
        for row in [*SELECTIONS, "Random-128"]:
            names = [name for name in table.aucs if re.fullmatch(rf"{prefix}{row}-\d+", name)]
            curves[row] = sorted((int(name.split("-")[-1]), name) for name in names)
    draw_panels(table, heading, panels, LENGTH_CAPTIONS, path)


def draw_panels(table, heading, panels, captions, path):
    """Two panels, {label: {name of a curve: [(x, row), ...]}}, over one axis of AUC."""
    table = table._replace(covariance=np.zeros_like(table.covariance))  # runs only
    names = [name for panel in panels.values() for curve in panel.values() for _, name in curve]
    if not names:
        fail(f"{path}: nothing to draw: no row ALL, Hash-6 or Random-matched")
    names += ["scratch"] * ("scratch" in table.aucs)
    estimates = {name: table.estimate({name: 1}) for name in names}
    y_of, numbers = axis([estimate.interval for estimate in estimates.values()], BOTTOM, TOP)
    shapes = [text(12, 24, heading, size=15)]
    for left, (label, curves) in zip((56, 456), panels.items(), strict=True):
        for number, words in numbers:
            shapes.append(line(left, y_of(number), left + WIDTH, y_of(number), PALE))
            shapes.append(text(left - 6, y_of(number) + 4, words, GREY, "end"))
        if "scratch" in estimates:
            y = y_of(estimates["scratch"].value)
            shapes.append(line(left, y, left + WIDTH, y, GREY, 1.5, "5 4"))
            shapes.append(text(left + WIDTH, y - 6, "scratch (untrained weights)", GREY, "end"))
        curves = {name: curve for name, curve in curves.items() if curve}
        draw_curves(shapes, left, f"{label}, logarithmic", curves, estimates, y_of)
    for i, caption in enumerate(captions):
        shapes.append(text(12, 424 + 17 * i, caption, GREY))
    write_svg(path, shapes, 422 + 17 * len(captions))


def lengths_of(table, row):
    """[(steps, name)] of a row and of its other lengths, by steps."""
    names = [name for name in table.aucs if name.split("-steps")[0] == row and table.cost(name)]
    return sorted((table.cost(name)["steps"], name) for name in names)


def doses_of(table, ending):
    """[(dose of ALL or ALL-c8, the row of that name with this ending)], by dose."""
    plain = [name for name in table.aucs if re.fullmatch(r"ALL(-c\d+)?", name)]
    names = [name for name in plain if name + ending in table.aucs]
    return sorted((table.cost(name)["dose"], name + ending) for name in names)


def draw_curves(shapes, left, label, curves, estimates, y_of):
    """The curves of a panel, {name: [(x, row), ...]}, their axis and their legend."""
    values = sorted({x for curve in curves.values() for x, _ in curve})
    if not values:
        return
    ends = np.log([values[0], values[-1]])
    x_of = {x: np.interp(np.log(x), ends, [left + 30, left + WIDTH - 30]) for x in values}
    for x, place in x_of.items():
        number = f"{x:.0f}" if x >= 100 else f"{x:.1f}"
        shapes.append(text(place, BOTTOM + 18, number, GREY, "middle"))
    shapes.append(text(left + WIDTH / 2, BOTTOM + 38, label, BLACK, "middle"))
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
            shapes.append(dot(x, y, colour))
            if re.fullmatch(EPOCHS_800, row):
                shapes.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="black"/>'
                )
        shapes.append(dot(legend + 5, BOTTOM + 62, colour))
        shapes.append(text(legend + 14, BOTTOM + 66, name))
        legend += 30 + 6.4 * len(name)
