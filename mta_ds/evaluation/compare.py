"""One page about several runs: how they were set, how they ended, and their curves over one another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from mta_ds.errors import UserError
from mta_ds.evaluation.charts import overlay_charts, stroke
from mta_ds.evaluation.page import render_page
from mta_ds.evaluation.report import Json, RunFiles, performance, read_run, shown_value, value_of
from mta_ds.files import write_atomic

_LAST = 10  # logged steps that a final training loss is the mean of
# what differs from run to run by itself, or follows from the rest
_OF_EVERY_RUN = {"run_dir", "slurm", "training_hash"}
_NONE = "–"
_ABSENT = object()


class Row(NamedTuple):
    """One line of a table, a cell for each run."""

    name: str
    note: str
    cells: list[str]
    best: frozenset[int] = frozenset()
    """Cells to point out."""


def write_comparison(run_dirs: Sequence[Path], output: Path) -> Path:
    """Write a page about the runs in ``run_dirs`` to ``output``; a folder that is named twice counts once.

    Raises:
        UserError: a folder is none, or holds neither metrics nor an evaluation.
    """
    folders = list(dict.fromkeys(Path(run_dir).resolve() for run_dir in run_dirs))
    runs = [read_run(folder) for folder in folders]
    context = {
        "title": f"{len(runs)} runs compared",
        "names": run_names(folders),
        "strokes": [stroke(index) for index in range(len(runs))],
        "scores": score_rows(runs),
        "last": _LAST,
        "charts": overlay_charts([run.metrics for run in runs]),
        "settings": differences([_read_config(folder) for folder in folders]),
        "environment": differences([run.environment for run in runs]),
        "performance": performance_rows(runs),
    }
    write_atomic(output, render_page("compare.html.j2", context))
    return output


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, those that are not the only ones with as many of their parents as tell them apart."""

    def ending(folder: Path, length: int) -> str:
        return "/".join(folder.parts[-length:])

    names = []
    for folder in folders:
        length = 1
        while sum(ending(other, length) == ending(folder, length) for other in folders) > 1:
            length += 1
        names.append(ending(folder, length))
    return names


def score_rows(runs: Sequence[RunFiles]) -> list[Row]:
    """How every run ended; the best value is pointed out where values can be compared whatever was optimised."""
    steps = [max((int(row["step"]) for row in run.metrics), default=0) for run in runs]
    rows = [
        Row("Optimizer steps", "", [f"{n:,}" if n else _NONE for n in steps]),
        _logged_row("Training loss", "all terms together", "loss", runs, _LAST),
        _logged_row("Base loss", "without the alignment", "base", runs, _LAST),
        _logged_row("Held-out loss", "the last validation of the training, lower is better", "validation/loss", runs),
        _logged_row("Held-out KL to the teacher", "likewise", "validation/kl", runs),
        _evaluated_row("Evaluated loss", "mta-ds evaluate, lower is better", "loss", runs),
        _evaluated_row("Evaluated KL to the teacher", "likewise", "kl", runs),
        _evaluated_row("ROUGE-L", "of generated text, higher is better", "rouge_l", runs),
    ]
    return [row for row in rows if set(row.cells) != {_NONE}]


def performance_rows(runs: Sequence[RunFiles]) -> list[Row]:
    """Throughput and memory of every run."""
    told = [dict(performance(run.perf)) for run in runs]
    measures = dict.fromkeys(name for each in told for name in each)
    return [Row(name, "", [each.get(name, _NONE) for each in told]) for name in measures]


def differences(values: Sequence[Json]) -> list[Row]:
    """What differs between configurations, by dotted key; a section that a run does not have is told as a whole.

    A run of which nothing is known (an empty configuration) differs in nothing.
    """
    return [Row(name, "", cells) for name, cells in _differences([value or _ABSENT for value in values], "")]


def _differences(values: Sequence[Any], name: str) -> Iterator[tuple[str, list[str]]]:
    """Go down into sections while there are any; what is in a section that is not there, ``_ABSENT``, equals all."""
    sections = [value for value in values if isinstance(value, dict)]
    shown = [_shown(value) for value in values]
    if len({text for value, text in zip(values, shown, strict=True) if value is not _ABSENT}) > 1:
        yield name, shown
    for key in dict.fromkeys(key for section in sections for key in section):
        if name or key not in _OF_EVERY_RUN:
            inner = [value.get(key) if isinstance(value, dict) else _ABSENT for value in values]
            yield from _differences(inner, f"{name}.{key}" if name else key)


def _shown(value: Any) -> str:
    """A setting in a cell; what a section holds is told by its own rows."""
    if value is None or value is _ABSENT:
        return _NONE
    if isinstance(value, dict):
        return "set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _logged_row(name: str, note: str, key: str, runs: Sequence[RunFiles], last: int | None = None) -> Row:
    """A metric at the end of training; means over the ``last`` logged rows depend on the method and have no best."""
    series = [[row[key] for row in run.metrics if isinstance(row.get(key), int | float)] for run in runs]
    values = [fmean(logged[-(last or 1) :]) if logged else None for logged in series]
    cells = [_NONE if value is None else f"{value:.4f}" for value in values]
    return Row(name, note, cells, frozenset() if last else _best(values, min))


def _evaluated_row(name: str, note: str, key: str, runs: Sequence[RunFiles]) -> Row:
    evaluations = [run.evaluations["after"] for run in runs]
    values = [value_of(evaluation, key) for evaluation in evaluations]
    pairs = zip(evaluations, values, strict=True)
    cells = [shown_value(evaluation, key, value) or _NONE for evaluation, value in pairs]
    return Row(name, note, cells, _best(values, max if key == "rouge_l" else min))


def _best(values: Sequence[float | None], choose: Callable[[Iterable[float]], float]) -> frozenset[int]:
    """Where the best value is; nowhere if there is nothing to compare it with."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return frozenset()
    return frozenset(index for index, value in enumerate(values) if value == choose(known))


def _read_config(folder: Path) -> Json:
    """config.yaml as plain values; empty where there is none."""
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except yaml.YAMLError:
        raise UserError(f"{path}: not valid YAML") from None
    return values if isinstance(values, dict) else {}
