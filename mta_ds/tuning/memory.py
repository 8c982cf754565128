"""How much memory a plan needs on every rank: named parts for each phase of a step (bytes; Ψ elements, N ranks).

What lives through the whole step:
    student      weights  b·Ψ, or b·Ψ/N under stage 3, and there whole what is smaller than the persistence threshold
                 gradients b·Ψ (stage 1) or b·Ψ/N; master weights and moments 12·Ψ/N, in the host's memory if offloaded
                 buckets, b·size: two under stage 1 and 2, where reducing overlaps backward, one under stage 3
    teacher      b·Ψt/N, in the host's memory if offloaded; with hpZ b·Ψt/(GPUs of a node) besides
Then the most that a phase adds: both forwards (inside the teacher's MTA's losses run), heads, backward, optimizer.
Every part is an upper bound: sequences of full length, all tokens counted and covered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mta_ds.ops.heads import chunk_shape
from mta_ds.ops.hid import hid_chunk_tokens
from mta_ds.ops.key_layer import tokens_at_once
from mta_ds.tuning.machine import Machine
from mta_ds.tuning.shapes import SPANS_PER_TOKEN, Workload

PERSISTENCE_THRESHOLD = 100_000
CHECKPOINT_COPY = "asynchronous checkpoint"
SUB_GROUP = 1_000_000_000
RESIDENT = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters: below it a student stays gathered from forward to backward."""

Parts = dict[str, float]


@dataclass(frozen=True, slots=True, order=True)
class Plan:
    """What may be chosen, the losses being the same."""

    student_stage: int
    resident: bool
    """Stage 3: weights that forward has gathered stay until backward, up to RESIDENT elements."""
    offload_optimizer: bool
    teacher_hpz: int
    """Ranks of a node that hold a second whole copy of the teacher between them; 1 is off."""
    offload_teacher: bool
    gradient_checkpointing: bool
    micro_batch_size: int
    gradient_accumulation_steps: int
    reduce_bucket_size: int
    prefetch_bucket_size: int

    def describe(self) -> str:
        """The plan in a line."""
        student = f"student ZeRO-{self.student_stage}"
        if self.student_stage == 3:
            student += " (kept gathered)" if self.resident else " (released)"
        choices = {
            "optimizer on the host": self.offload_optimizer,
            "teacher on the host": self.offload_teacher,
            f"hpZ {self.teacher_hpz}": self.teacher_hpz > 1,
            "checkpointing": self.gradient_checkpointing,
        }
        batch = f"micro-batch {self.micro_batch_size} × {self.gradient_accumulation_steps}"
        sizes = f"buckets {self.reduce_bucket_size / 1e6:g} M, prefetch {self.prefetch_bucket_size / 1e6:g} M"
        return ", ".join([student, *(name for name, on in choices.items() if on), batch, sizes])


class Memory(NamedTuple):
    """Bytes of one rank."""

    always: Parts
    phases: Mapping[str, Parts]
    """What each phase adds to ``always``."""
    host: Parts
    """In the node's memory."""

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        """The most that a rank's GPU holds."""
        return sum(self.always.values()) + sum(self.phases[self.peak_phase].values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())

    @property
    def largest(self) -> list[tuple[str, float]]:
        """The parts at the peak, largest first."""
        parts = self.always | self.phases[self.peak_phase]
        return sorted(((n, size) for n, size in parts.items() if size), key=lambda part: -part[1])


def memory(work: Workload, plan: Plan, machine: Machine) -> Memory:
    """Predict what one rank needs; the sum of all on a CPU, where there is but one memory."""
    device, host = _states(work, plan, machine)
    saved = student_activations(work, plan)
    held = saved | _key_layers(work, plan) | _student_gathers(work, plan, machine)
    heads = _heads(work, plan, machine)
    kept_head = {name: size for name, size in heads.items() if name == "teacher's LM head"}
    phases = {
        "student's forward": held | _layer_at_work(work, plan),
        "teacher's forward": held | _teacher_forward(work, plan, machine),
        "heads": held | heads,
        "backward": held | _backward(work, plan, machine) | kept_head,
        "optimizer": _optimizer(work, plan, machine) | kept_head,
    }
    if work.rollouts:
        phases["rollouts"] = {"whole student while it writes": work.element_bytes * work.student.parameters}
    return Memory(device, phases, host)


def _states(work: Workload, plan: Plan, machine: Machine) -> tuple[Parts, Parts]:
    """What lives through the step, on the GPU and in the host's memory."""
    b, n, stage = work.element_bytes, machine.num_ranks, plan.student_stage
    student = work.student.parameters + work.projections
    device: Parts = {}
    host: Parts = {CHECKPOINT_COPY: 12 * work.trained / n} if work.asynchronous_saves else {}
    persistent = work.student.persistent(PERSISTENCE_THRESHOLD)
    device["student weights"] = b * student if stage < 3 else b * (student / n + _unless_alone(persistent, n))
    gradients = b * work.trained / (n if stage > 1 else 1)
    optimizer = 12 * work.trained / n
    if plan.offload_optimizer:
        host["student master weights and moments"] = optimizer
        host["student gradients"] = (4 + b) * work.trained / n
        # stages 1 and 2 copy a whole gradient at a time; below stage 2 all of them wait for the boundary
        device["student gradients"] = gradients if stage == 1 else b * work.student.largest
    else:
        device["student gradients"] = gradients
        device["student master weights and moments"] = optimizer
    buckets = (1 if stage == 3 else 2) * plan.reduce_bucket_size
    device["reduce buckets"] = b * (buckets if machine.is_gpu else min(buckets, work.trained))
    if work.teacher is not None:
        teacher = work.teacher.parameters
        (host if plan.offload_teacher else device)["teacher partitions"] = b * teacher / n
        if plan.teacher_hpz > 1:
            device["teacher hpZ partitions"] = b * teacher / plan.teacher_hpz
        device["teacher small parameters"] = b * _unless_alone(work.teacher.persistent(PERSISTENCE_THRESHOLD), n)
    return device, host


def _unless_alone(elements: float, num_ranks: int) -> float:
    """A rank alone gathers nothing: its partition is the parameter."""
    return elements if num_ranks > 1 else 0


def student_activations(work: Workload, plan: Plan) -> Parts:
    """What the student's forward leaves for its backward."""
    tokens, shape, b = work.tokens(plan.micro_batch_size), work.student, work.element_bytes
    layer = b * shape.width if plan.gradient_checkpointing else shape.bytes.saved
    mask = b * plan.micro_batch_size * work.sequences_per_sample * work.sequence_length**2
    return {
        "student activations": tokens * (shape.num_layers * layer + shape.bytes.saved_outside),
        "attention mask": mask,
    }


def _key_layers(work: Workload, plan: Plan) -> Parts:
    """MTA: ragged copies of the student's key layers, and gradients stored until backward."""
    tokens, b = work.tokens(plan.micro_batch_size), work.element_bytes
    width = work.student.width
    layers = len(work.key_layers)
    spans = sum(SPANS_PER_TOKEN[layer.granularity] for layer in work.key_layers)
    return {
        "key layers' states": b * tokens * width * layers,
        "key layers' stored gradients": b * (tokens * width * (layers + spans) + work.projections),
        "final states": b * tokens * work.student.final_width,
    }


def _student_gathers(work: Workload, plan: Plan, machine: Machine) -> Parts:
    """Stage 3: weights that are whole at once, the head and the projections for as long as the module runs."""
    if plan.student_stage < 3 or machine.num_ranks == 1:
        return {}
    shape = work.student
    most = RESIDENT if plan.resident else shape.largest + shape.layer_parameters + plan.prefetch_bucket_size
    return {
        "student gathered weights": work.element_bytes * min(shape.parameters, most + shape.head),
        "projections gathered": work.element_bytes * work.projections,
    }


def _layer_at_work(work: Workload, plan: Plan) -> Parts:
    return {"student layer at work": work.tokens(plan.micro_batch_size) * work.student.bytes.working}


def _teacher_forward(work: Workload, plan: Plan, machine: Machine) -> Parts:
    """One layer's activations, gathered parameters, and the structural ops inside."""
    if work.teacher is None:
        return {}
    shape, b, tokens = work.teacher, work.element_bytes, work.tokens(plan.micro_batch_size)
    n = machine.num_ranks
    gathered = min(shape.parameters, shape.largest + plan.prefetch_bucket_size)
    parts = {
        "teacher gathered parameters": b * (gathered if plan.offload_teacher else _unless_alone(gathered, n)),
        "teacher layer at work": tokens * shape.bytes.working,
        "teacher final states": b * tokens * shape.final_width,
    }
    if not work.key_layers:
        return parts
    group = min(tokens, max(tokens_at_once(machine.is_gpu), work.sequence_length))
    widest = max(SPANS_PER_TOKEN[layer.granularity] for layer in work.key_layers)
    both = shape.width + work.student.width
    chunk = min(tokens, hid_chunk_tokens(machine.is_gpu))
    parts["key layer's ragged state"] = b * tokens * shape.width
    parts["spans pooled"] = 4 * 2 * group * widest * both
    parts["projected tokens"] = chunk * shape.width * (4 + 4 + b) + 4 * shape.width * work.student.width
    if work.keeps_teacher_states:
        parts["teacher states kept for entropy"] = 2 * tokens * shape.width * len(work.key_layers)
    return parts


def _heads(work: Workload, plan: Plan, machine: Machine) -> Parts:
    """Both heads whole, one chunk of logits, and the gradients that are made with them."""
    tokens, b, shape = work.tokens(plan.micro_batch_size), work.element_bytes, work.student
    dtype = torch.bfloat16 if b == 2 else torch.float32
    full, size = chunk_shape(shape.vocabulary, dtype, machine.is_gpu)
    parts: Parts = {
        "logits chunk": min(full, tokens) * size,
        "student head's gradient": 4 * shape.head,
        "final states' gradient": (4 + b) * tokens * shape.final_width,
    }
    if work.teacher is not None and work.teacher_head:
        head = work.teacher.head
        parts["teacher's LM head"] = b * (head if plan.offload_teacher else _unless_alone(head, machine.num_ranks))
        parts["teacher final states"] = 2 * b * tokens * work.teacher.final_width
    return parts


def _backward(work: Workload, plan: Plan, machine: Machine) -> Parts:
    """A layer recomputed, gradients on their way through it, and those of the heads in their own dtype."""
    tokens, shape, b = work.tokens(plan.micro_batch_size), work.student, work.element_bytes
    parts: Parts = {
        "student layer at work": tokens * shape.bytes.working,
        "student head's gradient": (4 + b) * shape.head,
    }
    if plan.gradient_checkpointing:
        parts["student layer recomputed"] = tokens * shape.bytes.saved
    if plan.student_stage > 1:
        parts["whole gradients on their way"] = b * shape.layer_parameters
    return parts


def _optimizer(work: Workload, plan: Plan, machine: Machine) -> Parts:
    """The fp32 gradients of what is stepped on at once."""
    if plan.offload_optimizer:
        return {}
    own = work.trained / machine.num_ranks
    return {"fp32 gradients of the step": 4 * (min(own, SUB_GROUP) if plan.student_stage == 3 else own)}
