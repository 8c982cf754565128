"""Stages that follow training: score what a run has made, or write out its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

from mta_ds.engine import distributed
from mta_ds.engine.config import RunConfig
from mta_ds.engine.export import export
from mta_ds.engine.setup import prepare
from mta_ds.engine.train import resume
from mta_ds.errors import UserError
from mta_ds.evaluation import evaluate
from mta_ds.models import resolve_model


def evaluate_run(config: RunConfig, student: Path | None, name: str) -> Path:
    """Score ``student`` (the run's export unless given) against the run's teacher; returns the result's path.

    Raises:
        UserError: there is no export yet, or whatever the evaluation finds wrong.
    """
    folder = student or config.run_dir / "export"
    if not folder.is_dir():
        raise UserError(f"{folder}: no model to evaluate; 'mta-ds export' writes it, or name one with --student")
    output = config.run_dir / "evaluation" / f"{name}.json"
    teacher = resolve_model(config.teacher.path)
    evaluate(folder, teacher, output, config=config.evaluation, data=config.data, dtype=config.train.dtype)
    return output


def export_checkpoint(config: RunConfig) -> Path:
    """Write the student of the newest valid checkpoint to the run's export folder; every rank must call it.

    Raises:
        UserError: the run has no valid checkpoint.
    """
    distributed.initialise()
    run = prepare(config)
    if resume(run) == 0:
        raise UserError(f"{config.run_dir}/checkpoints: no valid checkpoint to export")
    output = config.run_dir / "export"
    export(run.distiller.student.model, run.pair.student_dir, output)
    return output
