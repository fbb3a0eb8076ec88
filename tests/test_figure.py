"""The figures, read as a person does: an axis's numbers tell what a dot's place means."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from test_tables import make

from common.figure import WIDTH, figure, study_figure
from common.results import COLUMNS, read_results, write_line
from common.tables import estimate_row, task_statistics, variants

SVG = "{http://www.w3.org/2000/svg}"
LINEAR = ("linear", "1", "")


def read_svg(path):
    """(its root, {text: [(x, y)]}, [(x, y, fill)] of the dots), on a white ground, in the page."""
    root = ElementTree.parse(path).getroot()
    ground = root[0]
    assert (ground.tag, ground.get("fill"), ground.get("width")) == (SVG + "rect", "white", "100%")
    texts = {}
    for found in root.iter(SVG + "text"):
        x, y = float(found.get("x")), float(found.get("y"))
        width = 7.2 * len(found.text) * int(found.get("font-size")) / 12
        start = x - {"start": 0, "middle": width / 2, "end": width}[found.get("text-anchor")]
        assert start >= 0 and start + width <= WIDTH and y <= float(root.get("height"))
        texts.setdefault(found.text, []).append((x, y))
    dots = [
        (float(found.get("cx")), float(found.get("cy")), found.get("fill"))
        for found in root.iter(SVG + "circle")
    ]
    return root, texts, dots


def numbers(texts):
    """[(number, x, y)] of the texts that are numbers."""
    pairs = [(text, place) for text in texts for place in texts[text]]
    return [(float(text), *place) for text, place in pairs if re.fullmatch(r"[\d.]+", text)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    results = tmp_path_factory.mktemp("figure") / "results.csv"
    make(results, "covid-ct", "linear")
    make(results, "organ", "linear", rows=["scratch", "ALL"])
    make(results, "organ", "linear", "0.01", rows=["scratch", "ALL"])
    return results


def test_figure_shows_auc_and_interval_of_every_row(made, tmp_path):
    figure(made, tmp_path / "figure.svg")
    root, texts, dots = read_svg(tmp_path / "figure.svg")
    assert "linear" in texts and "linear, 1 % of the training labels" in texts
    assert "covid-ct (n=80)" in texts and len(texts["organ (n=80)"]) == 2
    assert any("too narrow" in text for text in texts)
    assert "Hash-6 (20 %)" in texts and "scratch" in texts
    assert len(dots) == 7 + 2 + 2
    found = task_statistics(made, variants(read_results(made))[LINEAR], "covid-ct")
    organ_starts = texts["organ (n=80)"][0][0] - 150  # x of the second panel's middle
    axis = [
        (n, x)
        for n, x, y in numbers(texts)
        if y < texts["linear, 1 % of the training labels"][0][1]
    ]
    axis = np.array(sorted(pair for pair in axis if pair[1] < organ_starts))
    slope, offset = np.polyfit(axis[:, 1], axis[:, 0], 1)
    bars = [
        [float(bar.get(end)) for end in ("x1", "x2", "y1")]
        for bar in root.iter(SVG + "line")
        if bar.get("stroke-width") == "2"
    ]
    for name, label in (
        ("Hash-6", "Hash-6 (20 %)"),
        ("ALL", "ALL (100 %)"),
        ("imagenet", "imagenet"),
    ):
        y = texts[label][0][1] - 4
        expected = estimate_row(found, name)
        x, _, fill = next(dot for dot in dots if dot[1] == y and dot[0] < organ_starts)
        assert slope * x + offset == pytest.approx(expected["value"], abs=0.002)
        assert (fill == "white") == (name == "imagenet")  # one run: hollow
        low, high, _ = next(bar for bar in bars if bar[2] == y and bar[0] < organ_starts)
        ends = (slope * low + offset, slope * high + offset)
        assert ends == pytest.approx(expected["interval"], abs=0.002)
        if name == "ALL":  # the line of the baseline goes through its dot
            verticals = [l for l in root.iter(SVG + "line") if l.get("stroke-width") == "1.5"]
            assert any(float(l.get("x1")) == float(l.get("x2")) == x for l in verticals)


def test_figure_refuses_no_results(tmp_path):
    with pytest.raises(SystemExit, match="holds no results"):
        figure(tmp_path / "none.csv", tmp_path / "figure.svg")


def test_study_figure_shows_steps_and_doses(tmp_path):
    results = tmp_path / "results.csv"
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    rows = {  # steps, dose
        "scratch": ("", ""),
        "ALL": (750, 0.4),
        "ALL-steps-x0.5": (375, 0.4),
        "Hash-6": (750, 0.1),
        "Hash-6-steps-x0.146": (106, 0.1),
        "ALL-masked": (750, 0.0),
        "ALL-c32": (750, 13),
        "ALL-c32-masked": (750, 0.0),
        "ALL-c32-masked-volume": (750, 0.0),
        "ALL-c32-steps-x3": (2250, 13),  # another length of a row that has no curve
        "Random-matched": (750, 0.4),
    }
    for name, (steps, dose) in rows.items():
        for seed in range(1 if name == "Random-matched" else 2):
            line = dict.fromkeys(COLUMNS, "1") | {
                "task": "organ",
                "name": name,
                "encoder": f"{name}-{seed}",
                "protocol": "linear",
                "seed": seed,
                "folds": "",
                "slices": steps,
                "steps": steps,
                "dose": dose,
                "auc": f"{0.8 + 0.1 * rng.random():.5f}",
            }
            p = rng.random((60, 2))
            write_line(results, line, np.arange(60), labels, np.arange(60), p)
    study_figure(results, tmp_path / "study.svg", "organ", LINEAR)
    root, texts, dots = read_svg(tmp_path / "study.svg")
    points = [dot for dot in dots if dot[1] < 345]  # those below are the legend
    assert len(points) == (2 + 2 + 1) + (2 + 2 + 1)
    assert [fill for _, _, fill in points].count("white") == 1  # one run
    bands = list(root.iter(SVG + "polygon"))
    assert len(bands) == 4  # ALL and Hash-6 by steps, plain and masked by dose: 2 points each
    left = {number for number, x, y in numbers(texts) if y == 350 and x < 420}
    right = {number: x for number, x, y in numbers(texts) if y == 350 and x > 420}
    assert left == {106, 375, 750} and set(right) == {0.4, 13}
    # masked rows stand at the dose that their plain ones met
    assert sorted(round(x) for x, _, _ in points if x > 420) == [466, 466, 770, 770, 770]
    heights = np.array([(y, n) for n, x, y in numbers(texts) if x < 56 and y < 345])
    slope, offset = np.polyfit(heights[:, 0] - 4, heights[:, 1], 1)
    found = task_statistics(results, read_results(results), "organ")
    x = texts["106"][0][0]
    y = next(dot[1] for dot in points if dot[0] == x)
    assert slope * y + offset == pytest.approx(
        found["aucs"]["Hash-6-steps-x0.146"].mean(), abs=0.002
    )
    with pytest.raises(SystemExit, match="no results of covid-ct"):
        study_figure(results, tmp_path / "study.svg", "covid-ct", LINEAR)
