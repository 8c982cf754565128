"""Stages around training: let a model answer prompts, score what a run has made, write out its newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mta_ds.data import PairCounts, write_pairs
from mta_ds.engine import distributed
from mta_ds.engine.checkpoint import load
from mta_ds.engine.commit import find_newest
from mta_ds.engine.config import RunConfig
from mta_ds.engine.export import export_student
from mta_ds.engine.pair import prepare_pair, student_folder, teacher_folder
from mta_ds.engine.setup import make_student_engine
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
    quantization = config.teacher.quantization if generation.model == "teacher" else None
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
        quantization=quantization,
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
    evaluate(
        folder,
        teacher_folder(config),
        output,
        config=config.evaluation,
        data=config.data,
        dtype=config.train.dtype,
        trust_remote_code=config.student.trust_remote_code,
        teacher_code=config.teacher.trust_remote_code,
        quantization=config.teacher.quantization,
    )
    return output


def export_checkpoint(config: RunConfig) -> Path:
    """Write the student of the newest valid checkpoint to the run's export folder; every rank must call it.

    Any number of ranks may, with any batch; neither data nor the teacher's weights are read.

    Raises:
        UserError: the run has no valid checkpoint.
    """
    distributed.initialise()
    root = config.run_dir / "checkpoints"
    found = find_newest(root, config.training_hash())
    if found is None:
        raise UserError(f"{root}: no valid checkpoint to export", on_every_rank=True)
    folder, progress = found
    pair = distributed.on_rank_zero_first(lambda: prepare_pair(config))
    engine = make_student_engine(config, pair)
    load(engine, folder, progress, config.train.seed)
    return export_student(config, pair, engine.module, progress.step)
