"""What the stages of a run have still to make, read off its files: what is complete is not submitted again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """What a stage has to make."""

    stage: str
    shards: tuple[int, ...] | None
    """Those that are missing; None for a stage without shards."""
    markers: tuple[str, ...]
    """Files or folders that are there once a shard is complete, in the order of ``shards``; or the one of the stage."""


@dataclass(frozen=True)
class Shards:
    """A folder that a stage fills shard by shard."""

    folder: Path
    number: int
    name: Callable[[int, int], str]
    """The name that the shard of an index, of so many, has in the folder, without its ending."""
    complete: Callable[[Path, int, int], object | None]
    """What is known of a complete shard in a folder, by its index and the number of shards; else None."""


@dataclass(frozen=True)
class RunSettings:
    """What must be known of a run's configuration."""

    shards: Mapping[str, Shards] = field(default_factory=dict)
    """By stage; a pipeline leaves a stage out that has none."""
    training_hash: str = ""
    """As a training leaves it in environment.json."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """As an evaluation leaves it in its result."""


def missing_works(stages: Sequence[str], run_dir: Path, settings: RunSettings) -> list[Work]:
    """What each of ``stages`` has to make, without those that are complete."""
    trained = is_trained(run_dir, settings.training_hash)
    complete = {
        "check": trained,  # what a check finds out, a training that has come to its end has proved
        "train": trained,
        "evaluate": trained and is_evaluated(run_dir, settings.evaluation),
    }
    # that training has begun is what a passed check leaves behind
    ends = {"check": "config.yaml", "train": "export", "evaluate": "evaluation/after.json"}
    works = []
    for stage in stages:
        if stage in settings.shards:
            works.append(_work_of_shards(stage, settings.shards[stage]))
        elif not complete.get(stage, True):
            works.append(Work(stage, None, (str((run_dir / ends[stage]).absolute()),)))
    return [work for work in works if work.shards != ()]


def is_trained(run_dir: Path, training_hash: str) -> bool:
    """Whether the last training in ``run_dir`` had the settings of this hash, reached its end and left its export."""
    return (
        _read_json(run_dir / "environment.json").get("training_hash") == training_hash
        and _read_json(run_dir / "heartbeat" / "rank-00000.json").get("phase") == "end"
        and (run_dir / "export").is_dir()
    )


def is_evaluated(run_dir: Path, evaluation: Mapping[str, Any]) -> bool:
    """Whether the result is newer than the export and was made under the same settings."""
    result = run_dir / "evaluation" / "after.json"
    made = _read_json(result).get("settings", {})
    return made.get("evaluation") == evaluation and result.stat().st_mtime >= (run_dir / "export").stat().st_mtime


def _work_of_shards(stage: str, shards: Shards) -> Work:
    folder, number = shards.folder, shards.number
    missing = [index for index in range(number) if shards.complete(folder, index, number) is None]
    if not missing and not (folder / "manifest.json").is_file():
        missing = [0]  # will find all parts there, and write the manifest
    markers = (str(folder.absolute() / f"{shards.name(index, number)}.json") for index in missing)
    return Work(stage, tuple(missing), tuple(markers))


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or a damaged one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
