"""The command line: every command parses its arguments, loads a configuration and calls one function.

Only typer is imported here; a command imports what it runs, so ``mta-ds --help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from mta_ds.cli_slurm import app as slurm_app
from mta_ds.errors import UsageError, UserError, error_line
from mta_ds.launch.local import follow_parent, launch

app = typer.Typer(
    help="Distil large language models with Multi-Granular Trajectory Alignment, the teacher sharded and streamed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(slurm_app, name="slurm")

ConfigArgument = Annotated[Path, typer.Argument(help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings that override the file: section.key=value ..., or @FILE of them.")
]
NumRanks = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Local ranks to start; under torchrun or srun leave it out."),
]


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and its exit code, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    follow_parent()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0":
        logging.getLogger("mta_ds").setLevel(logging.INFO)
    try:
        app()
    except UserError as error:
        # what every rank meets is told by rank 0; what only this one met, nobody else can tell
        if rank == "0":
            print(f"mta-ds: error: {error_line(error)}", file=sys.stderr)
        elif not error.on_every_rank:
            print(f"mta-ds: error: rank {rank}: {error_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def train(config: ConfigArgument, overrides: Overrides = None, nproc: NumRanks = None) -> None:
    """Distil the student; resumes the run folder's newest valid checkpoint."""
    if nproc is not None:
        _launch("train", config, overrides, nproc)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until the run itself listens there is nothing to save
        signal.signal(number, lambda *_: os._exit(75))
    from mta_ds.config import load
    from mta_ds.engine import RunConfig, shutdown
    from mta_ds.engine import train as run

    finished = run(load(config, RunConfig, overrides or ()))
    shutdown()
    sys.exit(0 if finished else 75)


@app.command()
def check(config: ConfigArgument, overrides: Overrides = None, nproc: NumRanks = None) -> None:
    """Check a run before a GPU hour is spent: models, vocabularies, key layers, spans; print the plan."""
    from mta_ds.config import load
    from mta_ds.engine import RunConfig
    from mta_ds.engine import check as run

    run(load(config, RunConfig, overrides or ()), nproc or 1)


@app.command()
def parse(
    config: Annotated[Path | None, typer.Argument(help="A run's YAML file; its section 'parse' is used.")] = None,
    overrides: Overrides = None,
    inputs: Annotated[list[str] | None, typer.Option("--input", help="File, folder, glob or datasets name.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the span store.")] = None,
    parser: Annotated[str | None, typer.Option(help="A Benepar path, spacy:MODEL or none; else the bundled.")] = None,
    num_shards: Annotated[int | None, typer.Option(min=1, help="Parts of the store.")] = None,
    shard_index: Annotated[int | None, typer.Option(min=0, help="Parse this part only, as a job array does.")] = None,
    max_reject_share: Annotated[float | None, typer.Option(min=0, max=1, help="Share of bad rows allowed.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes, a core each; all cores unless given.")] = None,
    status: Annotated[bool, typer.Option("--status", help="Say what the store in --output lacks, and stop.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Only write the manifest of complete parts.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write a page about the complete store to this file.")] = None,
) -> None:
    """Parse every text field once into a span store; a rerun makes only the parts that are missing."""
    from mta_ds.spans.merge import status as store_status
    from mta_ds.spans.parse import merge_only, recorded_inputs, resolve_config
    from mta_ds.spans.parse import parse as run

    output = Path(os.path.expanduser(output)) if output is not None else None
    options = {
        "inputs": inputs or None,
        "output": output,
        "parser": parser,
        "num_shards": num_shards,
        "max_reject_share": max_reject_share,
        "workers": workers,
    }
    of_parsing = {"--parser": parser, "--num-shards": num_shards, "--shard-index": shard_index, "--workers": workers}
    if status:
        others = {"--input": inputs or None, "--max-reject-share": max_reject_share, "--report": report}
        _refuse_options("--status", {**of_parsing, **others, "--merge": merge or None})
    elif merge:
        _refuse_options("--merge", of_parsing)
    if status and config is None and output is not None:
        print(store_status(output))
        return
    if merge and config is None and output is not None and not inputs:
        options["inputs"] = recorded_inputs(output)
    resolved = resolve_config(config, overrides or (), options)
    if status:
        print(store_status(resolved.output))
        return
    manifest = merge_only(resolved) if merge else run(resolved, shard_index)
    if manifest is None:
        print("this part is done; others are missing")
    else:
        print("span store complete: " + ", ".join(f"{n} {name}" for name, n in manifest.counts if n))
        if report is not None:
            from mta_ds.evaluation.store_report import write_store_report

            print(write_store_report(resolved.output, report))


@app.command()
def generate(
    config: ConfigArgument,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="teacher, student or a model folder; else generation.model.")
    ] = None,
    inputs: Annotated[list[str] | None, typer.Option("--input", help="Prompts: file, folder, glob or name.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; <run_dir>/generated/<model> unless given.")] = None,
    num_shards: Annotated[int | None, typer.Option(min=1, help="Parts of the output.")] = None,
    shard_index: Annotated[int | None, typer.Option(min=0, help="Make this part only, as a job array does.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what is sampled.")] = None,
    pair_with: Annotated[
        str | None, typer.Option(help="Records with chosen responses; write pairs.jsonl with these and the new ones.")
    ] = None,
) -> None:
    """Answer prompts with the teacher or the student, as records to train on; a rerun makes only missing parts."""
    from mta_ds.config import load, validate
    from mta_ds.engine import RunConfig, generate_run
    from mta_ds.evaluation import GenerateConfig

    resolved = load(config, RunConfig, overrides or ())
    options = {"model": model, "inputs": inputs or None, "output": output, "num_shards": num_shards, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    generation = validate(resolved.generation.model_dump() | given, GenerateConfig, where="mta-ds generate")
    made = generate_run(resolved.model_copy(update={"generation": generation}), shard_index, pair_with)
    if made.manifest is None:
        print("this part is done; others are missing")
        return
    print(f"{made.output}: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in made.manifest.counts if n))
    if made.pairs is not None:
        print(f"{made.output / 'pairs.jsonl'}: {made.pairs.pairs} pairs")


@app.command()
def evaluate(
    config: ConfigArgument,
    overrides: Overrides = None,
    student: Annotated[Path | None, typer.Option(help="Model folder; the run's export unless given.")] = None,
    name: Annotated[str, typer.Option(help="Name of the result: <run_dir>/evaluation/<name>.json.")] = "after",
) -> None:
    """Score a student: validation loss, KL to the teacher, ROUGE-L of what it writes."""
    from mta_ds.config import load
    from mta_ds.engine import RunConfig, evaluate_run

    print(evaluate_run(load(config, RunConfig, overrides or ()), student, name))


@app.command()
def export(config: ConfigArgument, overrides: Overrides = None, nproc: NumRanks = None) -> None:
    """Write the student of the newest valid checkpoint as a Hugging Face folder, <run_dir>/export."""
    if nproc is not None:
        _launch("export", config, overrides, nproc)
    from mta_ds.config import load
    from mta_ds.engine import RunConfig, distributed, export_checkpoint

    output = export_checkpoint(load(config, RunConfig, overrides or ()))
    if distributed.rank() == 0:
        print(output)
    distributed.shutdown()


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    output: Annotated[
        Path | None, typer.Option(help="The page; else RUN/report.html, or comparison.html for several runs.")
    ] = None,
) -> None:
    """Write a page about a run: loss curves, scores, samples; or one that compares several."""
    from mta_ds.evaluation import write_comparison, write_report

    if len(run_dirs) == 1:
        print(write_report(run_dirs[0], output=output))
    else:
        print(write_comparison(run_dirs, output or Path("comparison.html")))


@app.command()
def inspect(
    store: Annotated[Path, typer.Argument(help="A span store.")],
    record: Annotated[str | None, typer.Argument(help="A record's id.")] = None,
    records: Annotated[list[str] | None, typer.Option(help="Its text, if not where it was parsed.")] = None,
    field: Annotated[str | None, typer.Option(help="Only this field of the record.")] = None,
    choose: Annotated[str | None, typer.Option(help="Phrases: innermost, maximal or all.")] = None,
    labels: Annotated[str | None, typer.Option(help="Labels of phrases, as NP,VP.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the record as a page, too.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder: show its token weights.")] = None,
    layer: Annotated[int | None, typer.Option(min=1, help="Layer of --model; the last unless given.")] = None,
    template: Annotated[str, typer.Option(help="How --model reads the record: minillm, chat or plain.")] = "minillm",
    report: Annotated[Path | None, typer.Option(help="Write a page about the whole store.")] = None,
) -> None:
    """Look at a span store: one record's trees and chosen units, or the whole store's statistics."""
    if record is None and (report is None or html is not None or model is not None):
        raise UsageError("mta-ds inspect: give a RECORD; without one there is only --report FILE, for the whole store")
    from mta_ds.config import validate
    from mta_ds.data import DataConfig

    chosen = {"choose": choose, "labels": labels.split(",") if labels is not None else None}
    given = {"template": template, "units": {name: value for name, value in chosen.items() if value is not None}}
    data = validate(given, DataConfig, where="mta-ds inspect")
    if report is not None:
        from mta_ds.evaluation.store_report import write_store_report

        print(write_store_report(store, report, data.units))
    if record is not None:
        from mta_ds.evaluation.inspect import describe, write_page
        from mta_ds.evaluation.inspect import inspect as run
        from mta_ds.evaluation.weights import record_weights

        inspection = run(store, record, records or (), field, data.units)
        weights = record_weights(inspection.record, model, layer, data.template) if model is not None else None
        text = describe(inspection, weights)
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding))  # a batch log may be plain ASCII
        if html is not None:
            print(f"\n{write_page(html, inspection, weights)}")


@app.command()
def tune(
    config: ConfigArgument,
    overrides: Overrides = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Predict, run nothing; needs no weights.")] = False,
    gpu: Annotated[str | None, typer.Option(help="a100-40, a100-80, h100-80, ...; else this node's own.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of a node; ranks, where there is no GPU.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpu_memory: Annotated[float | None, typer.Option(min=1, help="GB of a GPU.")] = None,
    host_memory: Annotated[float | None, typer.Option(min=1, help="GB of a node's own memory.")] = None,
    intra: Annotated[float | None, typer.Option(min=0.1, help="GB/s that a GPU receives from its node.")] = None,
    inter: Annotated[float | None, typer.Option(min=0.1, help="GB/s that a node receives from others.")] = None,
    efficiency: Annotated[float | None, typer.Option(min=0.01, max=1, help="Share of the peak rate reached.")] = None,
    global_batch: Annotated[int | None, typer.Option(min=1, help="Samples a step; else the file's, a rank.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Plans to run for real.")] = 3,
    minutes: Annotated[float, typer.Option(min=0.1, help="A trial's time.")] = 20,
) -> None:
    """Choose ZeRO stages, offloads, buckets and micro-batch for both models; writes <run_dir>/tune."""
    from mta_ds.config import load
    from mta_ds.engine import RunConfig
    from mta_ds.tuning import TuneOptions, choose_machine
    from mta_ds.tuning import tune as run

    machine = choose_machine(
        plan_only,
        gpu=gpu,
        gpus_per_node=gpus,
        num_nodes=nodes,
        memory=gpu_memory,
        host_memory=host_memory,
        intra=intra,
        inter=inter,
        efficiency=efficiency,
    )
    options = TuneOptions(0 if plan_only else trials, minutes, global_batch)
    print(run(load(config, RunConfig, overrides or ()), machine, options))


@app.command()
def demo(
    run_dir: Annotated[Path | None, typer.Option(help="Where everything goes; else runs/demo[-METHOD].")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Local ranks.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 30,
    method: Annotated[str, typer.Option(help="The base method: kd, fdd, distillm, distillm2 or gkd.")] = "kd",
) -> None:
    """Distil SmolLM2-135M-Instruct into eight of its layers, on two CPU cores, from parsing to a report."""
    from mta_ds.demo import demo as run

    run(run_dir, nproc, steps, method)


def _refuse_options(of: str, given: Mapping[str, object]) -> None:
    """Whoever gives an option that does nothing expects something else of the command."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"mta-ds parse {of}: {name} would do nothing there; leave it out")


def _launch(command: str, config: Path, overrides: list[str] | None, nproc: int) -> None:
    """Become the parent of ``nproc`` ranks of the same command; a mistake in the file is told by one of them."""
    if "RANK" in os.environ:
        raise UserError("--nproc: this process is already a rank of a launcher (RANK is set); leave --nproc out")
    sys.exit(launch([command, str(config), *(overrides or ())], nproc))
