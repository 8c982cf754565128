from __future__ import annotations

import re
from xml.etree import ElementTree

from mta_ds.evaluation.charts import Line, line_chart, loss_charts

ROWS = [
    {"step": 0, "samples": 0, "validation/loss": 5.0, "validation/kl": 4.0},
    *({"step": s, "loss": 4.0 / s, "base": 3.0 / s, "dsa/6": 0.1, "dsa/12": 0.2, "hid/6": 0.3} for s in range(1, 30)),
]


def test_every_kind_of_curve_that_has_values():
    charts = loss_charts(ROWS)
    assert [chart.title for chart in charts] == ["Training loss", "Held-out", "DSA", "Hid"]
    dsa = str(charts[2].svg)
    assert dsa.index("layer 6") < dsa.index("layer 12")
    assert "layer 12" not in charts[3].svg
    assert [chart.title for chart in loss_charts(ROWS[:1])] == ["Held-out"]
    assert loss_charts([]) == []


def test_the_svg_stands_in_an_html_page():
    svg = str(line_chart("Loss", [Line("total", [1.0, 2.0], [3.0, 2.5])]))
    root = ElementTree.fromstring(svg)
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & set(root.attrib)  # scales with its container
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", svg)  # loads nothing


def test_equal_input_equal_output():
    assert loss_charts(ROWS) == loss_charts(ROWS)


def test_long_runs_are_thinned():
    steps = [float(s) for s in range(1, 50_001)]
    assert len(line_chart("Loss", [Line("total", steps, steps)])) < 40_000


def test_values_that_are_no_numbers_are_left_out():
    assert loss_charts([{"step": 1, "loss": None}, {"step": 2}]) == []
