"""The figures, read as a person does: an axis's numbers tell what a dot's place means."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from test_tables import line_of, make

from common.figure import figure
from common.tables import add_line, read_tables
from results.study.figure import COLOURS, draw

SVG = "{http://www.w3.org/2000/svg}"


def read_svg(path):
    """(its root, {text: [(x, y)]})."""
    root = ElementTree.parse(path).getroot()
    texts = {}
    for found in root.iter(SVG + "text"):
        texts.setdefault(found.text, []).append((float(found.get("x")), float(found.get("y"))))
    return root, texts


def value_of(texts, axis):
    """What a pixel means, from the numbers at an axis ("x" or "y") of the first panel."""
    numbers = [(float(t), *texts[t][0]) for t in texts if re.fullmatch(r"[01]\.\d+", t)]
    at = np.array([(place[0] if axis == "x" else place[1] - 4) for _, *place in numbers])
    slope, offset = np.polyfit(at, [number for number, *_ in numbers], 1)
    return lambda *pixels: [slope * float(pixel) + offset for pixel in pixels]


def shapes_of(root, kind, **attributes):
    return [s for s in root.iter(SVG + kind) if attributes.items() <= s.attrib.items()]


def test_figure_shows_auc_and_interval_of_every_row(tmp_path):
    results = tmp_path / "results.csv"
    make(results, "covid-ct")
    figure(results, tmp_path / "figure.svg")
    root, texts = read_svg(tmp_path / "figure.svg")
    assert "covid-ct, linear" in texts and "AUC (n=80, 65 groups)" in texts
    x_means = value_of(texts, "x")
    table = read_tables(results)["covid-ct", "linear", "1", ""]
    dots, bars = shapes_of(root, "circle"), shapes_of(root, "line", **{"stroke-width": "2"})
    for name, dot, bar in zip(table.aucs, dots, bars, strict=True):
        expected = table.estimate({name: 1})
        assert float(dot.get("cy")) == float(texts[name][0][1]) - 4 or name in ("ALL", "scratch")
        found = x_means(dot.get("cx"), bar.get("x1"), bar.get("x2"))
        assert found == pytest.approx([expected.value, *expected.interval], abs=1e-3)
        assert (dot.get("fill") == "white") == (name == "imagenet")  # one run: hollow


ROWS = {  # of the study: steps, dose
    "scratch": ("", ""),
    "ALL": (750, 0.4),
    "ALL-steps-x0.5": (375, 0.4),
    "Hash-6": (750, 0.1),
    "Hash-6-steps-x0.146": (106, 0.1),
    "ALL-masked": (750, 0.0),
    "ALL-c32": (750, 13.0),
    "ALL-c32-masked": (750, 0.0),
    "ALL-c32-steps-x3": (2250, 13.0),  # another length of a row that has no curve
    "ALL-c32-random": (750, 11.0),  # on no curve
}
CURVES = {  # one colour in both panels
    "ALL": ["ALL-steps-x0.5", "ALL", "ALL", "ALL-c32"],
    "Hash-6": ["Hash-6-steps-x0.146", "Hash-6"],
    "ALL, masked": ["ALL-masked", "ALL-c32-masked"],
}


def test_the_studys_figure_shows_steps_and_doses(tmp_path):
    results = tmp_path / "results.csv"
    rng = np.random.default_rng(0)
    images, scores = np.arange(60), rng.random((60, 2))  # of all rows: a large part of images
    for name, (steps, dose) in ROWS.items():
        for seed in range(2):
            cells = {"name": name, "encoder": f"{name}-{seed}", "dose": dose}
            cells |= {"slices": steps, "steps": steps}
            line = line_of("organ", "ALL", seed, 0.8 + 0.1 * rng.random()) | cells
            add_line(results, line, images, images % 2, images, scores)
    table = read_tables(results)["organ", "linear", "1", ""]
    draw(table, "AUC: organ", tmp_path / "study.svg")
    root, texts = read_svg(tmp_path / "study.svg")
    assert {"106", "375", "750", "0.4", "13.0"} <= set(texts) and "2250" not in texts
    y_means = value_of({t: texts[t] for t in texts if t != "0.4"}, "y")
    runs_only = table._replace(covariance=0 * table.covariance)
    x = {}
    for name, rows in CURVES.items():
        dots = shapes_of(root, "circle", fill=COLOURS[name])
        dots = [dot for dot in dots if float(dot.get("cy")) < 340]  # those below are the legend
        expected = [table.aucs[row].mean() for row in rows]
        found = y_means(*(dot.get("cy") for dot in dots))
        assert found == pytest.approx(expected, abs=1e-3)
        bars = shapes_of(root, "line", stroke=COLOURS[name], **{"stroke-width": "1.5"})
        for bar, row in zip(bars, rows, strict=True):
            ends = y_means(bar.get("y1"), bar.get("y2"))
            assert ends == pytest.approx(runs_only.estimate({row: 1}).interval, abs=1e-3)
        x[name] = [float(dot.get("cx")) for dot in dots]
    # 375 lies at log(375 / 106) / log(750 / 106) of the way; a masked row beside the plain one
    way = np.interp(x["ALL"][0], [x["Hash-6"][0] - 6, x["ALL"][1]], [0, 1])
    assert way == pytest.approx(np.log(375 / 106) / np.log(750 / 106), abs=0.01)
    assert np.subtract(x["ALL, masked"], x["ALL"][2:]) == pytest.approx([6, 6])
