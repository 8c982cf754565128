"""The command line: every command parses its arguments, loads a configuration and calls one function.

Only typer is imported here; a command imports what it runs, so ``mta-ds --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mta_ds.errors import UserError

app = typer.Typer(
    help="Distil large language models with Multi-Granular Trajectory Alignment, the teacher sharded and streamed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigArgument = Annotated[Path, typer.Argument(help="The run's YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that override the file: section.key=value ...")]
NumRanks = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Local ranks to start; under torchrun or srun leave it out."),
]


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and its exit code, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"mta-ds: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def train(config: ConfigArgument, overrides: Overrides = None, nproc: NumRanks = None) -> None:
    """Distil the student; resumes the run folder's newest valid checkpoint."""
    if nproc is not None:
        _launch("train", config, overrides, nproc)
    from mta_ds.config import load
    from mta_ds.engine import RunConfig
    from mta_ds.engine import train as run

    finished = run(load(config, RunConfig, overrides or ()))
    sys.exit(0 if finished else 75)


@app.command()
def check(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Check a run before a GPU hour is spent: models, vocabularies, key layers, spans; print the plan."""
    from mta_ds.config import load
    from mta_ds.engine import RunConfig
    from mta_ds.engine import check as run

    run(load(config, RunConfig, overrides or ()))


def _launch(command: str, config: Path, overrides: list[str] | None, nproc: int) -> None:
    """Become the parent of ``nproc`` ranks of the same command."""
    if "RANK" in os.environ:
        raise UserError("--nproc: this process is already a rank of a launcher (RANK is set); leave --nproc out")
    from mta_ds.config import load
    from mta_ds.engine import RunConfig
    from mta_ds.launch.local import launch

    load(config, RunConfig, overrides or ())  # a mistake is told once, before any rank starts
    sys.exit(launch([command, str(config), *(overrides or ())], nproc))
