"""``mta-ds slurm``: submit a run's stages to a Slurm cluster, follow them, cancel them; see docs/slurm.md.

As in cli.py, a command imports what it runs; it tells ``mta_ds.launch`` what that must know of the stages' settings.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mta_ds.errors import UserError

if TYPE_CHECKING:
    from mta_ds.launch.works import RunSettings

app = typer.Typer(
    help="Submit a run's stages to a Slurm cluster, follow them, cancel them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

# what begins with "-" and is no option of ours is one of sbatch's
_PASSES_ON = {"ignore_unknown_options": True}
ConfigArgument = Annotated[Path, typer.Argument(help="The run's YAML file.")]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SETTINGS AND OPTIONS OF SBATCH",
        help="section.key=value ..., @FILE, and sbatch's own options, as --nodes=4; for one stage, train:--nodes=4.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the exact commands, and do nothing.")]
Scripts = Annotated[Path | None, typer.Option(help="Folder of the job scripts; else ./slurm, or the project's.")]
RunArgument = Annotated[Path, typer.Argument(help="The run's YAML file, or its run folder.")]
Settings = Annotated[
    list[str] | None, typer.Argument(help="Settings that override the file: section.key=value ..., or @FILE of them.")
]


@app.command(context_settings=_PASSES_ON)
def parse(
    config: ConfigArgument, arguments: Arguments = None, dry_run: DryRun = False, scripts: Scripts = None
) -> None:
    """Parse the missing shards of the span store, a task each; tasks that wait or run are left alone."""
    _submit(("parse",), config, arguments, dry_run, scripts)


@app.command(context_settings=_PASSES_ON)
def generate(
    config: ConfigArgument, arguments: Arguments = None, dry_run: DryRun = False, scripts: Scripts = None
) -> None:
    """Answer the prompts of the missing shards, a task each; tasks that wait or run are left alone."""
    _submit(("generate",), config, arguments, dry_run, scripts)


@app.command(context_settings=_PASSES_ON)
def train(
    config: ConfigArgument, arguments: Arguments = None, dry_run: DryRun = False, scripts: Scripts = None
) -> None:
    """Distil on one node or many; goes on by itself after its time limit or a preemption."""
    _submit(("train",), config, arguments, dry_run, scripts)


@app.command(context_settings=_PASSES_ON)
def evaluate(
    config: ConfigArgument, arguments: Arguments = None, dry_run: DryRun = False, scripts: Scripts = None
) -> None:
    """Score the run's student."""
    _submit(("evaluate",), config, arguments, dry_run, scripts)


@app.command(context_settings=_PASSES_ON)
def pipeline(
    config: ConfigArgument, arguments: Arguments = None, dry_run: DryRun = False, scripts: Scripts = None
) -> None:
    """Parse what is missing, check, train, evaluate: each begins when the one before it has succeeded."""
    from mta_ds.launch.options import PIPELINE

    _submit(PIPELINE, config, arguments, dry_run, scripts)


@app.command()
def status(run: RunArgument, settings: Settings = None) -> None:
    """Say how each stage stands, which shards are missing, why something waits or failed, and the last metrics."""
    from mta_ds.launch.status import status as describe

    print(describe(_run_dir(run, settings)))


@app.command()
def cancel(run: RunArgument, settings: Settings = None) -> None:
    """Cancel all jobs of a run that wait or run."""
    from mta_ds.launch.pipeline import cancel as cancel_jobs

    job_ids = cancel_jobs(_run_dir(run, settings))
    print(f"cancelled {', '.join(job_ids)}" if job_ids else "nothing waits or runs")


@app.command(hidden=True)
def guard(
    run: RunArgument,
    settings: Settings = None,
    restarts: Annotated[int, typer.Option(min=1, help="Restarts in a row without a new checkpoint.")] = 3,
) -> None:
    """Inside a job: fail if its last restarts brought no new checkpoint."""
    from mta_ds.launch.guard import guard as run_guard

    job_id = os.environ.get("SLURM_JOB_ID")
    if job_id is None:
        raise UserError("slurm guard: SLURM_JOB_ID is not set; this is for job scripts")
    run_guard(_run_dir(run, settings), job_id, int(os.environ.get("SLURM_RESTART_COUNT", "0")), restarts)


def _run_dir(run: Path, settings: list[str] | None) -> Path:
    """The run folder that a YAML file names, or the folder itself; of the file nothing else is read."""
    if run.is_dir():
        return run
    from mta_ds.config import load
    from mta_ds.launch.pipeline import RunFolder

    return load(run, RunFolder, settings or ()).run_dir


def _submit(
    stages: tuple[str, ...], config: Path, arguments: list[str] | None, dry_run: bool, scripts: Path | None
) -> None:
    """Submit ``stages``, each after the one before it, or print how that would be done."""
    from mta_ds.launch import pipeline as runs
    from mta_ds.launch.options import split_arguments
    from mta_ds.launch.scripts import array_ranges
    from mta_ds.launch.works import missing_works

    given = split_arguments(arguments or (), stages)
    run_dir = _run_dir(config, list(given.overrides))
    missing = missing_works(stages, run_dir, _settings(stages, config, given.overrides))
    works = runs.without_alive(run_dir, missing, alone=len(stages) > 1)
    if not works:
        print(f"{', '.join(stages)}: complete, or on its way; nothing to submit")
        return
    plan = runs.make_plan(run_dir, works, config, given, [runs.find_script(work.stage, scripts) for work in works])
    if dry_run:
        print(runs.dry_run(run_dir, plan))
        return
    for made in runs.submit(run_dir, plan):
        print(f"{made.stage}: job {made.job_id}" + (f", shards {array_ranges(made.shards)}" if made.shards else ""))


def _settings(stages: Sequence[str], config: Path, overrides: Sequence[str]) -> RunSettings:
    """What ``mta_ds.launch`` must know of the run; a pipeline parses only if there is a section for it."""
    from mta_ds.launch.works import RunSettings, Shards
    from mta_ds.spans.merge import complete_part
    from mta_ds.spans.parse import resolve_config
    from mta_ds.spans.store import part_name

    if tuple(stages) == ("parse",):  # needs no models, and of the file no more than this
        parsing = resolve_config(config, overrides, {})
        return RunSettings({"parse": Shards(parsing.output, parsing.num_shards, part_name, complete_part)})
    from mta_ds.config import load
    from mta_ds.engine import RunConfig, generated_folder
    from mta_ds.evaluation.generated import complete_part as complete_answers

    run = load(config, RunConfig, overrides)
    shards = {"generate": Shards(generated_folder(run), run.generation.num_shards, part_name, complete_answers)}
    if run.parse is not None:
        shards["parse"] = Shards(run.parse.output, run.parse.num_shards, part_name, complete_part)
    return RunSettings(shards, run.training_hash(), run.evaluation.model_dump(mode="json"))
