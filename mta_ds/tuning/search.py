"""Every plan that keeps the global batch: what cannot fit goes with its reason, the rest is ranked by its step time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from mta_ds.errors import UserError
from mta_ds.tuning.machine import GB, Machine
from mta_ds.tuning.memory import Memory, Plan, memory
from mta_ds.tuning.shapes import Workload
from mta_ds.tuning.time import StepTime, step_time

REDUCE_BUCKETS = (10_000_000, 50_000_000, 200_000_000)
PREFETCH_BUCKETS = (0, 10_000_000, 50_000_000, 200_000_000)


@dataclass(frozen=True, slots=True)
class Correction:
    """What measured trials multiply predictions by: all parts of them, so that they still add up."""

    memory: float = 1.0
    time: float = 1.0


class Candidate(NamedTuple):
    """A plan and what is predicted of it."""

    plan: Plan
    memory: Memory
    time: StepTime
    reason: str | None
    """Why it does not fit; None if it does."""


class Search(NamedTuple):
    """All plans of a step on a machine."""

    fitting: list[Candidate]
    """The fastest first."""
    pruned: list[Candidate]
    """The leanest first."""


def search(work: Workload, machine: Machine, correction: Correction | None = None) -> Search:
    """Try every plan."""
    tried = [judge(work, plan, machine, correction) for plan in plans(work, machine)]
    fitting = _ranked([c for c in tried if c.reason is None])
    pruned = sorted((c for c in tried if c.reason is not None), key=lambda c: c.memory.peak)
    return Search(fitting, pruned)


def _ranked(fitting: list[Candidate]) -> list[Candidate]:
    """The fastest first; what differs by a hundredth is as fast, then the simplest plan that holds least is better."""
    best = min((c.time.total for c in fitting), default=1.0)

    def order(candidate: Candidate) -> tuple[float, ...]:
        plan = candidate.plan
        moved = plan.offload_optimizer + plan.offload_teacher + (plan.teacher_hpz > 1)
        return (round(100 * candidate.time.total / best), moved, plan.student_stage, candidate.memory.peak)

    return sorted(fitting, key=order)


def plans(work: Workload, machine: Machine) -> Iterator[Plan]:
    """Every plan worth trying: options that cannot matter on this machine are left out.

    An optimizer on NVMe is none of them: no checkpoint can hold it.
    """
    teacher_places = [(1, False)]
    if work.teacher is not None:
        if machine.num_nodes > 1 and machine.gpus_per_node > 1:
            teacher_places.append((machine.gpus_per_node, False))
        if machine.is_gpu:
            teacher_places.append((1, True))
    student_places = [(1, False), (2, False), (3, True), (3, False)]
    for (stage, resident), offload, (hpz, offload_teacher), checkpointing, micro in itertools.product(
        student_places,
        (False, True) if machine.is_gpu else (False,),
        teacher_places,
        (False, True),
        divisors(work.batch_per_rank),
    ):
        for bucket, prefetch in itertools.product(REDUCE_BUCKETS, PREFETCH_BUCKETS):
            yield Plan(
                student_stage=stage,
                resident=resident,
                offload_optimizer=offload,
                teacher_hpz=hpz,
                offload_teacher=offload_teacher,
                gradient_checkpointing=checkpointing,
                micro_batch_size=micro,
                gradient_accumulation_steps=work.batch_per_rank // micro,
                reduce_bucket_size=bucket,
                prefetch_bucket_size=prefetch,
            )


def divisors(number: int) -> list[int]:
    """All, rising."""
    return [d for d in range(1, number + 1) if number % d == 0]


def judge(work: Workload, plan: Plan, machine: Machine, correction: Correction | None = None) -> Candidate:
    """Predict a plan, corrected by trials if there were any, and say whether it fits."""
    factors = correction or Correction()
    predicted = memory(work, plan, machine)
    needed = predicted.times(factors.memory)
    if machine.is_gpu:  # trials tell of the GPU alone
        needed = needed._replace(host=predicted.host)
    seconds = step_time(work, plan, machine).times(factors.time)
    return Candidate(plan, needed, seconds, _reason(needed, machine))


def _reason(needed: Memory, machine: Machine) -> str | None:
    """What does not fit, and what fills it."""
    on_device = needed.peak + (0 if machine.is_gpu else needed.host_total)
    if on_device > machine.usable:
        parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in needed.largest[:3])
        return (
            f"{needed.peak_phase} needs {on_device / GB:.1f} GB of {machine.usable / GB:.1f} usable on each rank "
            f"(GB: {parts})"
        )
    on_host = needed.host_total * machine.gpus_per_node
    if machine.is_gpu and on_host > 0.9 * machine.host_memory:
        return f"{on_host / GB:.0f} GB in a node's memory of {machine.host_memory / GB:.0f}"
    return None


def global_batch(work: Workload, machine: Machine) -> int:
    """Samples of an optimizer step over all ranks."""
    return work.batch_per_rank * machine.num_ranks


def with_global_batch(work: Workload, samples: int, machine: Machine) -> Workload:
    """The same step of ``samples`` in all.

    Raises:
        UserError: the ranks cannot share them evenly.
    """
    per_rank, rest = divmod(samples, machine.num_ranks)
    if rest or not per_rank:
        near = max(1, round(samples / machine.num_ranks)) * machine.num_ranks
        raise UserError(
            f"a global batch of {samples} cannot be shared by {machine.num_ranks} ranks; the nearest that can is {near}"
        )
    return replace(work, batch_per_rank=per_rank)
