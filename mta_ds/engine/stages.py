"""Stages around training: let a model answer prompts, score what a run has made, write out its newest checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from mta_ds.data import PairCounts, write_pairs
from mta_ds.engine import distributed
from mta_ds.engine.config import RunConfig
from mta_ds.engine.pair import student_folder, teacher_folder
from mta_ds.engine.setup import prepare
from mta_ds.engine.train import export_student, resume
from mta_ds.errors import UserError
from mta_ds.evaluation import GeneratedManifest, evaluate, write_responses
from mta_ds.models import resolve_model


class Generated(NamedTuple):
    """What ``mta-ds generate`` has made."""

    output: Path
    manifest: GeneratedManifest | None
    """None while parts are missing."""
    pairs: PairCounts | None
    """Preference records in ``output``/pairs.jsonl; None if none were asked for, or parts are missing."""


def generate_run(config: RunConfig, shard_index: int | None = None, pair_with: str | None = None) -> Generated:
    """Answer the prompts of ``config.generation``: all shards that are missing, or one.

    Args:
        pair_with: answered records (a folder that another run of this wrote, or any record files); once all parts are
            there, these are joined by id as chosen with the new responses as rejected.

    Raises:
        UserError: no such model, or whatever the stage finds wrong.
    """
    generation = config.generation
    folder, trusted = _answering_model(config)
    output = generated_folder(config)
    manifest = write_responses(
        folder,
        generation.inputs or config.data.train,
        output,
        config=generation,
        data=config.data,
        dtype=config.train.dtype,
        shard_index=shard_index,
        trust_remote_code=trusted,
    )
    if manifest is None or pair_with is None:
        return Generated(output, manifest, None)
    return Generated(output, manifest, write_pairs([pair_with], [str(output)], output / "pairs.jsonl"))


def generated_folder(config: RunConfig) -> Path:
    """Where :func:`generate_run` writes."""
    generation = config.generation
    return generation.output or config.run_dir / "generated" / Path(generation.model).name


def _answering_model(config: RunConfig) -> tuple[Path, bool]:
    """The folder of ``generation.model``, and whether its own code may run."""
    if config.generation.model == "teacher":
        return teacher_folder(config), config.teacher.trust_remote_code
    if config.generation.model != "student":
        return resolve_model(config.generation.model), False
    export = config.run_dir / "export"
    folder = export if export.is_dir() else student_folder(config, teacher_folder(config))
    return folder, config.student.trust_remote_code


def evaluate_run(config: RunConfig, student: Path | None, name: str) -> Path:
    """Score ``student`` (the run's export unless given) against the run's teacher; returns the result's path.

    Raises:
        UserError: there is no export yet, or whatever the evaluation finds wrong.
    """
    folder = student or config.run_dir / "export"
    if not folder.is_dir():
        raise UserError(f"{folder}: no model to evaluate; 'mta-ds export' writes it, or name one with --student")
    output = config.run_dir / "evaluation" / f"{name}.json"
    teacher = teacher_folder(config)
    evaluate(folder, teacher, output, config=config.evaluation, data=config.data, dtype=config.train.dtype)
    return output


def export_checkpoint(config: RunConfig) -> Path:
    """Write the student of the newest valid checkpoint to the run's export folder; every rank must call it.

    Raises:
        UserError: the run has no valid checkpoint.
    """
    distributed.initialise()
    run = dataclasses.replace(prepare(config), rollouts=None)  # texts on their way would start their parsers
    if (step := resume(run)) == 0:
        raise UserError(f"{config.run_dir}/checkpoints: no valid checkpoint to export")
    return export_student(run, step)
