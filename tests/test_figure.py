"""The figure, read as a person does: an axis's numbers tell what a dot's place means."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from test_tables import make

from common.figure import figure
from common.tables import read_tables

SVG = "{http://www.w3.org/2000/svg}"


def test_figure_shows_auc_and_interval_of_every_row(tmp_path):
    results = tmp_path / "results.csv"
    make(results, "covid-ct")
    figure(results, tmp_path / "figure.svg")
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    places = {t.text: (float(t.get("x")), float(t.get("y"))) for t in root.iter(SVG + "text")}
    assert "covid-ct, linear" in places and "AUC (n=80, 65 groups)" in places
    numbers = [(places[t][0], float(t)) for t in places if re.fullmatch(r"[01]\.\d+", t)]
    slope, offset = np.polyfit(*zip(*numbers, strict=True), 1)
    table = read_tables(results)["covid-ct", "linear", "1", ""]
    dots = root.iter(SVG + "circle")
    bars = [line for line in root.iter(SVG + "line") if line.get("stroke-width") == "2"]
    for name, dot, bar in zip(table.aucs, dots, bars, strict=True):
        expected = table.estimate({name: 1})
        assert float(dot.get("cy")) == places[name][1] - 4
        pixels = [float(of.get(end)) for of, end in ((dot, "cx"), (bar, "x1"), (bar, "x2"))]
        found = slope * np.array(pixels) + offset
        assert found == pytest.approx([expected.value, *expected.interval], abs=1e-3)
        assert (dot.get("fill") == "white") == (name == "imagenet")  # one run: hollow
