"""Charts as inline SVG: curves of a run's metrics.jsonl, bars of what a span store holds."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
_DASHES = ("", "5 2", "1.5 1.5")  # the colours' second and third time around
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


class Stroke(NamedTuple):
    """How the lines of one run look, in every chart and in the legend."""

    colour: str
    dashes: str
    """As SVG's stroke-dasharray; empty: a whole line."""


def stroke(index: int) -> Stroke:
    """The look of run ``index`` (from 0); no two of the first 24 are alike."""
    return Stroke(_COLOURS[index % len(_COLOURS)], _DASHES[index // len(_COLOURS) % len(_DASHES)])


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


def overlay_charts(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """A chart for each metric with the curves of all runs that log it, drawn as :func:`stroke` says; no empty ones."""
    planned = [
        ("Training loss", "all terms together", "loss"),
        ("Base loss", "without the alignment", "base"),
        ("DSA", "relations between spans, mean of the key layers", "dsa"),
        ("Hid", "hidden states of covered tokens", "hid"),
        ("Held-out loss", "cross-entropy with the labels, nats a token", "validation/loss"),
        ("Held-out KL", "to the teacher, nats a token", "validation/kl"),
        ("Learning rate", "the student's", "lr"),
        ("Gradient norm", "before clipping", "grad_norm"),
    ]
    charts = []
    for title, note, key in planned:
        lines = [_line(rows, key, "") for rows in runs]
        if any(line.steps for line in lines):
            charts.append(Chart(title, note, line_chart(title, lines, legend=False)))
    return charts


def line_chart(title: str, lines: Sequence[Line], unit: str = "step", legend: bool = True) -> Markup:
    """An SVG that scales with its container; few points get markers, a line without points none."""
    with _axes(title) as (figure, axes):
        for index, line in enumerate(lines):
            look = stroke(index)
            steps, values = _thinned(line)
            axes.plot(
                steps,
                values,
                color=look.colour,
                linestyle=(0, tuple(map(float, look.dashes.split()))),
                linewidth=1.6,
                marker="o" if len(steps) <= 12 else None,
                markersize=3.5,
                label=line.name,
            )
        axes.set_xlabel(unit)
        if legend:
            axes.legend(frameon=False, ncols=2 if len(lines) > 3 else 1, handlelength=1.2)
        return _inline(figure, f"{title} by {unit}")


def histogram(title: str, unit: str, edges: Sequence[float], counts: Sequence[int]) -> Markup:
    """An SVG of bars: ``counts[i]`` between ``edges[i]`` and ``edges[i + 1]``."""
    with _axes(title) as (figure, axes):
        widths = [after - before for before, after in pairwise(edges)]
        axes.bar(edges[:-1], counts, width=widths, align="edge", color=_COLOURS[0], edgecolor="white", linewidth=0.3)
        axes.set_xlabel(unit)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        return _inline(figure, title)


def ranking(title: str, unit: str, names: Sequence[str], values: Sequence[float]) -> Markup:
    """An SVG of one lying bar a name, the first at the top; names may be any text."""
    with _axes(title, 0.7 + 0.2 * len(names), grid="x") as (figure, axes):
        axes.barh(range(len(names)), values, height=0.7, color=_COLOURS[0])
        axes.set_yticks(range(len(names)), labels=list(names), parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.xaxis.set_major_formatter("{x:,.4g}")
        return _inline(figure, title)


@contextmanager
def _axes(title: str, height: float = 2.7, grid: Literal["x", "y"] = "y") -> Iterator[tuple[Figure, Any]]:
    """An empty figure in the pages' style, which holds until it has been drawn."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, color="#94a3b8", alpha=0.3, linewidth=0.8)  # faint on white and on black
        axes.set_axisbelow(True)
        yield figure, axes


def _line(rows: Sequence[Mapping[str, Any]], key: str, name: str) -> Line:
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return Line(name, [float(step) for step, _ in points], [float(value) for _, value in points])


def _thinned(line: Line) -> tuple[list[float], list[float]]:
    """At most ``_MAX_POINTS`` points, each the mean of a block of neighbours: long runs stay small and legible."""
    size = max(1, -(-len(line.steps) // _MAX_POINTS))
    blocks = [slice(start, start + size) for start in range(0, len(line.steps), size)]

    def means(values: list[float]) -> list[float]:
        return [sum(values[block]) / len(values[block]) for block in blocks]

    return means(line.steps), means(line.values)


def _inline(figure: Figure, description: str) -> Markup:
    """The bare element for an HTML page: no prologue, metadata or fixed size, no group names (they would repeat)."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    # Our own drawing: the only foreign words are a ranking's names, which matplotlib's XML writer escapes.
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))
