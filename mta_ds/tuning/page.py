"""The page that tune writes: the step, the chosen plan with its memory and time, what else was tried, and why not."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from mta_ds.files import write_atomic
from mta_ds.tuning.machine import GB, Machine
from mta_ds.tuning.memory import Plan
from mta_ds.tuning.search import Candidate, Correction, Search, global_batch
from mta_ds.tuning.shapes import Workload
from mta_ds.tuning.trials import Trial

_NEXT = {
    "student": "the student's own products: only more or faster GPUs help",
    "recomputation": "recomputing the student's layers: memory for its activations would save it",
    "teacher": "the teacher's forward, which every token must go through once: only more or faster GPUs help",
    "LM heads and divergence": "both LM heads over the whole vocabulary: fewer labelled tokens or a smaller one",
    "MTA's losses": "the structural losses: fewer key layers",
    "optimizer step": "AdamW's step: more ranks share it, accumulation spreads it over more samples",
    "rollouts": "the student's writing: a larger loss.rollouts.batch_size, or fewer new tokens",
    "teacher gathers": "gathering the teacher each micro-step: memory for a larger micro-batch, hpZ, or a faster link",
    "student gathers": "gathering the student: memory for stage 2, a larger micro-batch, or a faster link",
    "gradient reduction": "reducing the student's gradients: less accumulation, or a faster link",
    "heads and updated weights gathered": "gathering the LM head and the updated weights: a faster link",
}


def write_page(
    folder: Path, work: Workload, machine: Machine, found: Search, trials: Sequence[Trial], correction: Correction
) -> Path:
    """Write tune.md and tune.json; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = found.fitting[0] if found.fitting else None
    record = {
        "machine": dataclasses.asdict(machine),
        "chosen": dataclasses.asdict(chosen.plan) if chosen else None,
        "predicted": {"peak_bytes": chosen.memory.peak, "seconds": chosen.time.total} if chosen else None,
        "correction": dataclasses.asdict(correction),
        "trials": [trial.as_json() for trial in trials],
    }
    write_atomic(folder / "tune.json", json.dumps(record, indent=1) + "\n")
    path = folder / "tune.md"
    write_atomic(path, page(work, machine, found, trials, correction, folder))
    return path


def page(
    work: Workload,
    machine: Machine,
    found: Search,
    trials: Sequence[Trial],
    correction: Correction,
    folder: Path,
) -> str:
    """The page: the step, the chosen plan with its memory and time, what else was tried, and why not."""
    lines = ["# ZeRO plan", "", *_setting(work, machine, found)]
    if found.fitting:
        lines += ["", "## Chosen", "", *_chosen(found.fitting[0], machine, folder)]
        lines += ["", "## Fastest plans that fit", "", *_ranking(found.fitting[:10])]
    if trials:
        lines += ["", "## Trials", "", *_trials(trials, correction)]
    lines += ["", "## Every way to place the models", "", *_families(found)]
    return "\n".join(lines) + "\n"


def next_bottleneck(chosen: Candidate) -> str:
    """What bounds the step now, in one sentence."""
    name = chosen.time.bottleneck
    means = _NEXT[name]
    if name == "optimizer step" and chosen.plan.offload_optimizer:
        means = "AdamW's step on the host: with memory for the optimizer on the GPUs it would be short"
    return f"Next bottleneck: {means} ({chosen.time.parts[name]:.2f} s of a step)."


def _setting(work: Workload, machine: Machine, found: Search) -> list[str]:
    student, teacher = work.student, work.teacher
    models = f"student {student.parameters / 1e9:.3f} B parameters in {student.num_layers} layers"
    if teacher is not None:
        models += f", teacher {teacher.parameters / 1e9:.3f} B in {teacher.num_layers}"
    nodes = f"{machine.num_nodes} node{'s' * (machine.num_nodes > 1)} of {machine.gpus_per_node}"
    assumed = f" Its rates are not known: those of {machine.rates_of} are assumed." if machine.rates_of else ""
    return [
        f"- Models: {models}; {work.trained / 1e9:.3f} B trained, {work.projections / 1e6:.1f} M of them projections.",
        f"- Machine: {nodes} × {machine.name}, {machine.memory / GB:.0f} GB each, {machine.reserve / GB:.0f} GB of it "
        f"left to CUDA and NCCL; {machine.intra / GB:.0f} GB/s in a node, {machine.inter / GB:.0f} GB/s between nodes; "
        f"products at {100 * machine.efficiency:.0f} % of the peak.{assumed}",
        f"- Step: {global_batch(work, machine)} samples of up to {work.sequence_length} tokens, "
        f"{work.element_bytes}-byte elements.",
        f"- Plans: {len(found.fitting)} fit, {len(found.pruned)} do not. All figures are predictions for full-length "
        "sequences unless a table says measured.",
    ]


def _chosen(chosen: Candidate, machine: Machine, folder: Path) -> list[str]:
    needed, seconds = chosen.memory, chosen.time
    parts = _table(("bytes of a rank at the peak", "GB"), [(n, f"{size / GB:.2f}") for n, size in needed.largest])
    phases = {name: sum(needed.always.values()) + sum(parts.values()) for name, parts in needed.phases.items()}
    by_phase = ", ".join(f"{name} {size / GB:.1f}" for name, size in phases.items())
    host = ", ".join(f"{name} {size / GB:.2f}" for name, size in needed.host.items())
    times = _table(("seconds of a step", "s"), [(name, f"{value:.3f}") for name, value in seconds.parts.items()])
    return [
        f"**{chosen.plan.describe()}**: {seconds.total:.2f} s a step, "
        f"{needed.peak / GB:.1f} of {machine.usable / GB:.1f} GB ({needed.peak_phase}).",
        "",
        next_bottleneck(chosen),
        "",
        f"Use it: `mta-ds train CONFIG {shlex.quote(f'@{folder}/override.yaml')}`",
        "",
        *parts,
        "",
        f"By phase, GB: {by_phase}. In the node's memory, GB a rank: {host}.",
        "",
        *times,
        "",
        "Gathers and reductions run beside products, so the parts add up to more than the step.",
    ]


def _ranking(candidates: Iterable[Candidate]) -> list[str]:
    rows = [(c.plan.describe(), f"{c.time.total:.2f}", f"{c.memory.peak / GB:.1f}") for c in candidates]
    return _table(("plan", "s a step", "GB"), rows)


def _trials(trials: Sequence[Trial], correction: Correction) -> list[str]:
    rows = [
        (
            trial.plan.describe(),
            trial.outcome,
            f"{trial.predicted_seconds:.2f} / {trial.seconds:.2f}" if trial.seconds else "",
            f"{trial.predicted_bytes / GB:.2f} / {trial.peak_bytes / GB:.2f}" if trial.peak_bytes else "",
            trial.note,
        )
        for trial in trials
    ]
    return [
        *_table(("plan", "outcome", "s, predicted / measured", "GB, predicted / measured", "note"), rows),
        "",
        f"All other predictions on this page are multiplied by {correction.memory:.3f} (memory) and "
        f"{correction.time:.3f} (time).",
    ]


def _families(found: Search) -> list[str]:
    """For every placement of the models: its largest micro-batch that fits, or what keeps even the smallest from it."""
    best: dict[str, Candidate] = {}
    for candidate in found.fitting:
        best.setdefault(_family(candidate.plan), candidate)
    rows = [(name, "yes", f"{c.plan.describe()}: {c.time.total:.2f} s") for name, c in best.items()]
    why: dict[str, Candidate] = {}
    for candidate in found.pruned:
        if (name := _family(candidate.plan)) not in best:
            why.setdefault(name, candidate)
    rows += [(name, "no", f"leanest: {c.reason}") for name, c in why.items()]
    return _table(("placement", "fits", "fastest plan, or why not"), rows)


def _family(plan: Plan) -> str:
    whole = dataclasses.replace(plan, micro_batch_size=1, gradient_accumulation_steps=1)
    return whole.describe().partition(", micro-batch")[0]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]
