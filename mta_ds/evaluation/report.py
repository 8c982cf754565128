"""report.html: what a run did, on one page that needs nothing else and opens on any device."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mta_ds.errors import UserError
from mta_ds.evaluation.charts import loss_charts
from mta_ds.evaluation.page import render_page
from mta_ds.evaluation.tree import ParsedExample, marked_text, trees
from mta_ds.files import write_atomic

Json = dict[str, Any]

_MAX_TEXTS = 6
_MAX_TREES = 3


class RunFiles(NamedTuple):
    """What a run folder tells in numbers; what it lacks is empty."""

    metrics: list[Json]
    perf: list[Json]
    evaluations: dict[str, Json]
    """Of the student before and after training, and of the teacher."""
    environment: Json


class Score(NamedTuple):
    """One row of the table; a missing value is an empty string."""

    name: str
    note: str
    before: str
    after: str
    change: str
    percent: str
    teacher: str
    improved: bool


class Sample(NamedTuple):
    """One record and what each model answered: (model, text, ROUGE-L)."""

    fields: dict[str, str]
    answers: list[tuple[str, str, float]]
    reference: str


def write_report(run_dir: Path, example: ParsedExample | None = None, output: Path | None = None) -> Path:
    """Write ``run_dir``/report.html from what the run folder holds; sections without data are left out.

    Args:
        run_dir: with metrics.jsonl, perf.jsonl, config.yaml, environment.json, evaluation/{before,after,teacher}.json;
            any of them may be missing, and a run may still be going on.
        example: one parsed text with the units chosen from it, drawn as trees.
        output: where to write instead.

    Raises:
        UserError: the folder is none, or holds neither metrics nor an evaluation.
    """
    run_dir = Path(run_dir)
    metrics, perf, evaluations, environment = read_run(run_dir)
    context = {
        "title": run_dir.resolve().name,
        "summary": summary(metrics, evaluations, environment),
        "scores": scores(evaluations),
        "has_teacher": bool(evaluations["teacher"]),
        "charts": loss_charts(metrics),
        "samples": samples(run_dir / "evaluation", evaluations),
        "performance": performance(perf),
        "marked": marked_text(example) if example else None,
        "trees": trees(example, _MAX_TREES) if example else [],
        "num_sentences": len(example.units.sentences) - 1 if example else 0,
        "folded": _folded(run_dir, evaluations),
    }
    path = output or run_dir / "report.html"
    write_atomic(path, render_page("report.html.j2", context))
    return path


def read_run(run_dir: Path) -> RunFiles:
    """Read a run folder, of a run that may still be going on.

    Raises:
        UserError: the folder is none, or holds neither metrics nor an evaluation.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    metrics = _read_lines(run_dir / "metrics.jsonl")
    evaluations = {name: _read_json(run_dir / "evaluation" / f"{name}.json") for name in ("before", "after", "teacher")}
    if not metrics and not any(evaluations.values()):
        raise UserError(f"{run_dir}: not a run folder, it has neither metrics.jsonl nor evaluation/*.json")
    return RunFiles(metrics, _read_lines(run_dir / "perf.jsonl"), evaluations, _read_json(run_dir / "environment.json"))


def summary(metrics: Sequence[Json], evaluations: Mapping[str, Json], environment: Json) -> str:
    """One sentence with the numbers that matter."""
    steps = max((int(row["step"]) for row in metrics), default=0)
    ranks = environment.get("world_size")
    where = f" on {ranks} rank{'s' if ranks != 1 else ''}" if isinstance(ranks, int) else ""
    opening = f"{steps:,} optimizer steps{where}" if steps else "Evaluation only"
    moves = [_move(row) for row in scores(evaluations) if row.before and row.after]
    if not moves:
        losses = [row["loss"] for row in metrics if isinstance(row.get("loss"), int | float)]
        moves = [f"the training loss went from {losses[0]:.3f} to {losses[-1]:.3f}"] if losses else []
    return f"{opening}: {_and(moves)}." if moves else f"{opening}."


def scores(evaluations: Mapping[str, Json]) -> list[Score]:
    """The before/after table; rows without any value are left out."""
    rows = [
        _score("Held-out KL to the teacher", "nats per token, lower is better", "kl", evaluations),
        _score("Held-out loss", "cross-entropy with the labels, nats per token, lower is better", "loss", evaluations),
        _score("ROUGE-L", "of generated text, higher is better", "rouge_l", evaluations),
    ]
    return [row for row in rows if row.before or row.after or row.teacher]


def samples(folder: Path, evaluations: Mapping[str, Json]) -> list[Sample]:
    """The first records of the evaluation with every model's text of the first pass: not a selection."""
    named = {"before": "Student before", "after": "Student after", "teacher": "Teacher"}
    texts = {named[model]: _first_pass(folder, evaluation) for model, evaluation in evaluations.items()}
    record_ids = list(dict.fromkeys(record_id for rows in texts.values() for record_id in rows))
    return [_sample(record_id, texts) for record_id in record_ids[:_MAX_TEXTS]]


def performance(rows: Sequence[Json]) -> list[tuple[str, str]]:
    """Throughput and memory in words; medians, since the first steps warm up."""
    if not rows:
        return []
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    tokens = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    memory = [row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row]
    found = []
    if tokens:
        found.append(("tokens per second, all ranks (median)", f"{statistics.median(tokens):,.0f}"))
    if seconds:
        found.append(("seconds per step (median)", f"{statistics.median(seconds):.2f}"))
        found.append(("time in steps", _duration(sum(seconds))))
    if memory:
        found.append(("peak memory of the first rank", f"{max(memory) / 2**30:.2f} GiB"))
    return found


def _score(name: str, note: str, key: str, evaluations: Mapping[str, Json]) -> Score:
    before, after, teacher = (value_of(evaluations[model], key) for model in ("before", "after", "teacher"))
    change, percent, improved = "", "", False
    if before is not None and after is not None:
        difference = after - before
        improved = difference > 0 if key == "rouge_l" else difference < 0
        change = (f"{difference:+.2f}" if key == "rouge_l" else f"{difference:+.3f}").replace("-", "−")
        percent = f"{100 * difference / before:+.0f} %".replace("-", "−") if before > 0 else ""
    shown = [shown_value(evaluations[m], key, v) for m, v in zip(evaluations, (before, after, teacher), strict=True)]
    return Score(name, note, shown[0], shown[1], change, percent, shown[2], improved)


def _first_pass(folder: Path, evaluation: Json) -> dict[str, Json]:
    """The rows of an evaluation's first pass of generation, by record id."""
    name = evaluation.get("generations")
    rows = _read_lines(folder / Path(name).name) if isinstance(name, str) else []
    return {row["record_id"]: row for row in rows if row["pass"] == rows[0]["pass"]}


def _sample(record_id: str, texts: Mapping[str, Mapping[str, Json]]) -> Sample:
    rows = {model: by_id[record_id] for model, by_id in texts.items() if record_id in by_id}
    first = next(iter(rows.values()))
    answers = [(model, row["text"], row["rouge_l"]) for model, row in rows.items()]
    return Sample(first["fields"], answers, first["references"][0])


def value_of(evaluation: Json, key: str) -> float | None:
    """A score of an evaluation, the mean of several passes; None if it has none."""
    value = evaluation.get(key)
    value = value.get("mean") if isinstance(value, dict) else value
    return float(value) if isinstance(value, int | float) else None


def shown_value(evaluation: Json, key: str, value: float | None) -> str:
    """The value as the tables show it, with its deviation over passes; empty if there is none."""
    if value is None:
        return ""
    if key != "rouge_l":
        return f"{value:.3f}"
    deviation = evaluation[key].get("std")
    return f"{value:.2f}" + (f" ± {deviation:.2f}" if isinstance(deviation, int | float) else "")


def _move(row: Score) -> str:
    name = row.name if row.name.startswith("ROUGE") else row.name[0].lower() + row.name[1:]
    verb = "stayed at" if row.before == row.after else "fell from" if row.change.startswith("−") else "rose from"
    return f"{name} {verb} {row.before}" + ("" if row.before == row.after else f" to {row.after}")


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), seconds % 3600 / 60
    return f"{hours} h {minutes:.0f} min" if hours else f"{minutes:.1f} min"


def _folded(run_dir: Path, evaluations: Mapping[str, Json]) -> list[tuple[str, str]]:
    """(heading, text) of what is looked up rather than read: configuration, environment, settings of the scores."""
    found = []
    for heading, name in (("Configuration", "config.yaml"), ("Environment", "environment.json")):
        path = run_dir / name
        if path.is_file():
            found.append((f"{heading} ({name})", path.read_text(encoding="utf-8", errors="replace")))
    for model, evaluation in evaluations.items():
        if settings := evaluation.get("settings"):
            text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
            found.append((f"Settings of the evaluation “{model}”", text))
    return found


def _read_json(path: Path) -> Json:
    """An object, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _read_lines(path: Path) -> list[Json]:
    """The whole lines of a JSONL file; a last line that is still being written is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
    return rows
