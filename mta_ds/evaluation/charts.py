"""The report's line charts: rows of metrics.jsonl to inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
_MAX_POINTS = 400
_STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, and set in the page's own font
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#475569",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "text.color": "#334155",
}


class Chart(NamedTuple):
    """One figure of the report."""

    title: str
    note: str
    svg: Markup


class Line(NamedTuple):
    """One curve: values over optimizer steps."""

    name: str
    steps: list[float]
    values: list[float]


def loss_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Charts of a run's metrics rows: training loss, held-out values, DSA and Hid by key layer; no empty ones."""
    layers = sorted({int(key[4:]) for row in rows for key in row if re.fullmatch(r"(dsa|hid)/\d+", key)})
    planned = [
        ("Training loss", "all terms together, and the base loss alone", {"loss": "total", "base": "base"}),
        ("Held-out", "token means, nats", {"validation/loss": "loss", "validation/kl": "KL to the teacher"}),
        ("DSA", "relations between spans, by student layer", {f"dsa/{n}": f"layer {n}" for n in layers}),
        ("Hid", "hidden states of covered tokens, by student layer", {f"hid/{n}": f"layer {n}" for n in layers}),
    ]
    charts = []
    for title, note, keys in planned:
        lines = [_line(rows, key, name) for key, name in keys.items()]
        if drawn := [line for line in lines if line.steps]:
            charts.append(Chart(title, note, line_chart(title, drawn)))
    return charts


def line_chart(title: str, lines: Sequence[Line]) -> Markup:
    """An SVG that scales with its container; few points get markers."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for line, colour in zip(lines, _COLOURS * (1 + len(lines) // len(_COLOURS)), strict=False):
            steps, values = _thinned(line)
            marker = "o" if len(steps) <= 12 else None
            axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=line.name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("step")
        axes.legend(frameon=False, ncols=2 if len(lines) > 3 else 1, handlelength=1.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), title)


def _line(rows: Sequence[Mapping[str, Any]], key: str, name: str) -> Line:
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return Line(name, [float(step) for step, _ in points], [float(value) for _, value in points])


def _thinned(line: Line) -> tuple[list[float], list[float]]:
    """At most ``_MAX_POINTS`` points, each the mean of a block of neighbours: long runs stay small and legible."""
    size = -(-len(line.steps) // _MAX_POINTS)
    blocks = [slice(start, start + size) for start in range(0, len(line.steps), size)]

    def means(values: list[float]) -> list[float]:
        return [sum(values[block]) / len(values[block]) for block in blocks]

    return means(line.steps), means(line.values)


def _inline(svg: str, title: str) -> Markup:
    """The bare element for an HTML page: no prologue, metadata or fixed size, no group names (they would repeat)."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    # Our own drawing with our own words: nothing of the records is in it.
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title} over steps"', 1))
