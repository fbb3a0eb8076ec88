"""The figure of a results.csv: a panel a table, as plain SVG that a README shows at 800 pixels."""

from html import escape

import numpy as np

from common.files import atomic_write
from common.tables import read_tables, title

WIDTH = 800
LETTER = 7.2  # width of a letter of 12 pixels, about
ROW = 21  # height of a row
STEPS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]  # between the numbers of an axis
BLACK, GREY, PALE, BLUE = "#222222", "#6b6b6b", "#e4e4e4", "#0062a3"


def figure(results, path, baseline="ALL"):
    """AUC of every row with its 95 % interval, one panel a table; a line at the baseline's."""
    shapes = []
    top = 0
    for key, table in read_tables(results).items():
        shapes.append(text(12, top + 24, title(key), size=15))
        shapes.append(text(12, top + 42, f"AUC ({table.images()})", GREY))
        top = draw_table(shapes, top + 76, table, baseline)
    sentence = "Dot: mean over runs (hollow: of one run); bar: 95 % interval (of one: images only)."
    shapes.append(text(12, top, sentence, GREY))
    write_svg(path, shapes, top + 16)


def draw_table(shapes, top, table, baseline):
    """Draw the rows of a table below `top`; where the next panel may start."""
    estimates = {name: table.estimate({name: 1}) for name in table.aucs}
    left = 30 + LETTER * max(map(len, estimates))
    bottom = top + ROW * len(estimates)
    x_of, numbers = axis([e.interval for e in estimates.values()], left, WIDTH - 30)
    for number, label in numbers:
        shapes.append(line(x_of(number), top, x_of(number), bottom, PALE))
        shapes.append(text(x_of(number), bottom + 16, label, GREY, "middle"))
    if baseline in estimates:
        x = x_of(estimates[baseline].value)
        shapes.append(line(x, top, x, bottom, BLUE, 1.5))
        shapes.append(text(x, top - 4, baseline, BLUE, "middle"))
    for i, (name, estimate) in enumerate(estimates.items()):
        y = top + ROW * (i + 0.5)
        low, high = map(x_of, estimate.interval)
        shapes.append(text(left - 12, y + 4, name, anchor="end"))
        shapes.append(line(low, y, high, y, BLACK, 2))
        shapes.append(dot(x_of(estimate.value), y, BLACK, hollow=estimate.runs == 1))
    return bottom + 44


def axis(intervals, start, end):
    """(pixel of a value, [(round value, its text)]): an axis from pixel start to end that holds all
    intervals, with a margin."""
    low, high = np.min(intervals), np.max(intervals)
    margin = max(0.06 * (high - low), 0.002)
    low, high = low - margin, high + margin
    step = next((step for step in STEPS if high - low < 5 * step), 1)
    values = step * np.arange(np.ceil(low / step), np.floor(high / step) + 1)
    digits = 3 if step < 0.01 else 2

    def pixel(value):
        return start + (end - start) * (value - low) / (high - low)

    return pixel, [(value, f"{value:.{digits}f}") for value in values]


def text(x, y, words, colour=BLACK, anchor="start", size=12):
    style = f'text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def line(x1, y1, x2, y2, colour, width=1, dashes=""):
    style = f'stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes or "none"}"'
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def dot(x, y, colour, hollow=False):
    style = f'stroke="{colour}" stroke-width="1.5" fill="{"white" if hollow else colour}"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {style}/>'


def write_svg(path, shapes, height):
    """Write the shapes on a white ground, which a dark page needs."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" font-family="Helvetica, Arial, sans-serif">'
    )
    ground = '<rect width="100%" height="100%" fill="white"/>'
    with atomic_write(path, text=True) as file:
        file.write("\n".join([head, ground, *shapes, "</svg>\n"]))
