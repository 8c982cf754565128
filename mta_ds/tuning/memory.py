"""How much memory a plan needs on every rank: named parts for each phase of a step (bytes; Ψ elements, N ranks).

What lives through the whole step:
    student      weights b·Ψ, or b·Ψ/N under stage 3, and there whole what is smaller than the persistence threshold;
                 master weights and moments 12·Ψ/N, in the host's memory if offloaded;
                 gradients b·Ψ (stage 1) or b·Ψ/N, and buckets, b·size: stage 3 makes both once, one bucket; stages 1
                 and 2 have them from backward to the optimizer's step alone, two buckets as reducing overlaps backward,
                 and the gradients always where several micro-steps add to them
    teacher      b·Ψt/N, in the host's memory if offloaded; with hpZ b·Ψt/(GPUs of a node) besides
Then the most that a phase adds: both forwards (inside the teacher's MTA's and FDD's losses run), heads, backward, which
begins with all activations and ends with all gradients, and the optimizer; before them rollouts.
Every part is an upper bound: sequences of full length, all tokens counted and covered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mta_ds.models.zero import is_fetched_whole
from mta_ds.ops.heads import chunk_shape
from mta_ds.ops.hid import hid_chunk_tokens
from mta_ds.ops.key_layer import tokens_at_once
from mta_ds.tuning.machine import Machine
from mta_ds.tuning.shapes import SPANS_PER_TOKEN, Workload, Writing

PERSISTENCE_THRESHOLD = 100_000
CHECKPOINT_COPY = "asynchronous checkpoint"
BUCKETS = "reduce buckets"
LIBRARIES = "libraries at work"
SUB_GROUP = 1_000_000_000

# On a CPU: what a run's libraries take at their first use, beyond their import: half of it before there is a model
# (tokenizer, TensorBoard), the rest kernels, threads' stacks and pages of code. Read off one run (1 rank, ZeRO-2).
_LIBRARY_BYTES = 115e6
# On a CPU: parts that are whole blocks of a partition's or a bucket's size.
_OWN_BLOCKS = {"student gradients", "fp32 gradients of the step", "logits chunk", BUCKETS}

Parts = dict[str, float]


@dataclass(frozen=True, slots=True, order=True)
class Plan:
    """What may be chosen, the losses being the same."""

    student_stage: int
    resident: bool
    """Stage 3: weights that forward has gathered stay until backward."""
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

    def times(self, factor: float) -> Memory:
        """All of it, as trials correct it."""

        def scaled(parts: Parts) -> Parts:
            return {name: factor * size for name, size in parts.items()}

        return Memory(scaled(self.always), {n: scaled(p) for n, p in self.phases.items()}, scaled(self.host))

    @property
    def host_total(self) -> float:
        return sum(self.host.values())

    @property
    def largest(self) -> list[tuple[str, float]]:
        """The parts at the peak, largest first."""
        parts = self.always | self.phases[self.peak_phase]
        return sorted(((n, size) for n, size in parts.items() if size), key=lambda part: -part[1])


def memory(work: Workload, plan: Plan, machine: Machine) -> Memory:
    """Predict what one rank needs."""
    always, host = _states(work, plan, machine)
    gathers, reduction = _student_gathers(work, plan, machine), _reduction(work, plan, machine)
    lasting = _lasting(plan, reduction)
    passing = {name: size for name, size in reduction.items() if name not in lasting}
    buckets = {name: size for name, size in passing.items() if name == BUCKETS}
    gradients = {name: size for name, size in passing.items() if name != BUCKETS}
    held = student_activations(work, plan) | _key_layers(work, plan) | gathers
    lm_head = _teacher_lm_head(work, plan, machine)  # from its first reader to the step's end
    phases = {
        "student's forward": held | _student_layer(work, plan),
        "teacher's forward": held | _teacher_forward(work, plan, machine) | _trajectory(work, plan, machine),
        "heads": held | _heads(work, plan, machine) | lm_head,
        "backward's start": held | _backward(work, plan) | buckets | lm_head,
        "backward's end": gathers | passing | lm_head,
        "optimizer": _optimizer(work, plan, machine) | gradients | lm_head,
    }
    if work.writing is not None:
        phases["rollouts"] = _rollouts(work, work.writing)
    if not machine.is_gpu:
        always[LIBRARIES] = _LIBRARY_BYTES
        phases = _with_heap(phases)
    return Memory(always | lasting, phases, host)


def _states(work: Workload, plan: Plan, machine: Machine) -> tuple[Parts, Parts]:
    """What lives through the step, on the GPU and in the host's memory; gradients apart."""
    b, n, stage = work.element_bytes, machine.num_ranks, plan.student_stage
    student = work.student_elements
    device: Parts = {}
    host: Parts = {CHECKPOINT_COPY: 12 * work.trained / n} if work.asynchronous_saves else {}
    persistent = work.student.persistent(PERSISTENCE_THRESHOLD)
    device["student weights"] = b * student if stage < 3 else b * (student / n + _unless_alone(persistent, n))
    optimizer = 12 * work.trained / n
    if plan.offload_optimizer:
        host["student gradients"] = (4 + b) * work.trained / n
    (host if plan.offload_optimizer else device)["student master weights and moments"] = optimizer
    if work.teacher is not None:
        teacher = work.teacher.parameters
        (host if plan.offload_teacher else device)["teacher partitions"] = b * teacher / n
        if plan.teacher_hpz > 1:
            device["teacher hpZ partitions"] = b * teacher / plan.teacher_hpz
        device["teacher small parameters"] = b * _unless_alone(work.teacher.persistent(PERSISTENCE_THRESHOLD), n)
    return device, host


def _reduction(work: Workload, plan: Plan, machine: Machine) -> Parts:
    """The student's gradients and what they are reduced in."""
    b, n, stage = work.element_bytes, machine.num_ranks, plan.student_stage
    gradients = b * work.trained / (n if stage > 1 else 1)
    if plan.offload_optimizer and stage > 1:  # a whole gradient is copied at a time; stage 1 keeps all to the boundary
        gradients = b * work.student.largest
    buckets = (1 if stage == 3 else 2) * plan.reduce_bucket_size
    # a GPU's memory is taken when it is asked for, a CPU's when it is written
    return {"student gradients": gradients, BUCKETS: b * (buckets if machine.is_gpu else min(buckets, work.trained))}


def _lasting(plan: Plan, reduction: Parts) -> Parts:
    """What of the reduction there is outside backward too."""
    if plan.student_stage == 3:
        return reduction
    accumulates = plan.gradient_accumulation_steps > 1
    return {name: size for name, size in reduction.items() if accumulates and name != BUCKETS}


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
    """MTA and FDD: ragged copies of the student's key layers, and gradients stored until backward."""
    tokens, b = work.tokens(plan.micro_batch_size), work.element_bytes
    width, layers, compared = work.student.width, len(work.key_layers), len(work.trajectory)
    spans = sum(SPANS_PER_TOKEN[layer.granularity] for layer in work.key_layers)
    tapped = {layer.student for layer in work.key_layers} | set(work.trajectory)
    parts: Parts = {
        "key layers' states": b * tokens * width * len(tapped),
        "key layers' stored gradients": b * tokens * width * (layers + spans) + 4 * work.projections,
        "final states": b * tokens * work.student.final_width,
    }
    if compared:  # in fp32, of each layer and of the one before it
        parts["FDD's stored gradients"] = 4 * tokens * width * (2 * compared - 1)
    if work.trajectory_normed:
        parts["FDD's normed states"] = tokens * compared * (b * width + work.student.bytes.saved_outside)
    return parts


def _student_gathers(work: Workload, plan: Plan, machine: Machine) -> Parts:
    """Stage 3: weights that are whole at once, the head and the projections for as long as the module runs."""
    if plan.student_stage < 3 or machine.num_ranks == 1:
        return {}
    shape, b = work.student, work.element_bytes
    released = shape.largest + shape.layer_parameters + plan.prefetch_bucket_size + shape.head
    return {
        "student gathered weights": b * (shape.parameters if plan.resident else min(shape.parameters, released)),
        "projections gathered": b * (work.student_elements - shape.parameters),
    }


def _student_layer(work: Workload, plan: Plan) -> Parts:
    return {"student layer at work": work.tokens(plan.micro_batch_size) * work.student.bytes.working}


def _teacher_lm_head(work: Workload, plan: Plan, machine: Machine) -> Parts:
    """Gathered whole; a rank alone has it already, unless it lies on the host."""
    if work.teacher is None or not (work.teacher_head or work.trajectory):
        return {}
    head = work.teacher.head
    held = head if plan.offload_teacher else _unless_alone(head, machine.num_ranks)
    return {"teacher's LM head": work.element_bytes * held}


def _teacher_forward(work: Workload, plan: Plan, machine: Machine) -> Parts:
    """One layer's activations, gathered parameters, and the structural ops inside."""
    if work.teacher is None:
        return {}
    shape, b, tokens = work.teacher, work.element_bytes, work.tokens(plan.micro_batch_size)
    n = machine.num_ranks
    layer = shape.layer_parameters if is_fetched_whole(shape.layer_parameters, plan.prefetch_bucket_size) else 0
    gathered = min(shape.parameters, max(shape.largest, layer) + plan.prefetch_bucket_size)
    parts = {
        "teacher gathered parameters": b * (gathered if plan.offload_teacher else _unless_alone(gathered, n)),
        "teacher layer at work": tokens * shape.bytes.working,
        "teacher final states": b * tokens * shape.final_width,
    }
    if not work.key_layers:
        return parts
    group = min(tokens, max(tokens_at_once(machine.is_gpu, b), work.sequence_length))
    widest = max(SPANS_PER_TOKEN[layer.granularity] for layer in work.key_layers)
    both = shape.width + work.student.width
    chunk = min(tokens, hid_chunk_tokens(machine.is_gpu, b))
    parts["key layer's ragged state"] = b * tokens * shape.width
    parts["spans pooled"] = 4 * 2 * group * widest * both
    parts["projected tokens"] = chunk * shape.width * (4 + 4 + b) + 4 * shape.width * work.student.width
    if work.keeps_teacher_states:
        parts["teacher states kept for entropy"] = 2 * tokens * shape.width * len(work.key_layers)
    return parts


def _trajectory(work: Workload, plan: Plan, machine: Machine) -> Parts:
    """FDD goes through both heads inside the teacher's forward, this key layer's states beside those before."""
    if work.teacher is None or not work.trajectory:
        return {}
    tokens, b = work.tokens(plan.micro_batch_size), work.element_bytes
    copies = 4 if work.trajectory_normed else 2
    return {
        "logits chunk": _logits_chunk(work, tokens, machine, min(2, len(work.trajectory))),
        "student head's gradient": 4 * work.trained_head,
        "FDD's teacher states": copies * b * tokens * work.teacher.width,
        **_teacher_lm_head(work, plan, machine),
    }


def _logits_chunk(work: Workload, tokens: int, machine: Machine, layers: int = 1) -> float:
    dtype = torch.bfloat16 if work.element_bytes == 2 else torch.float32
    full, size = chunk_shape(work.student.vocabulary, dtype, machine.is_gpu, layers=layers)
    return min(full, tokens) * size


def _heads(work: Workload, plan: Plan, machine: Machine) -> Parts:
    """One chunk of logits through both heads, and the gradients that are made with them."""
    tokens, b = work.tokens(plan.micro_batch_size), work.element_bytes
    parts: Parts = {
        "logits chunk": _logits_chunk(work, tokens, machine),
        "student head's gradient": 4 * work.trained_head,
        "final states' gradient": (4 + b) * tokens * work.student.final_width,
    }
    if work.teacher is not None and work.teacher_head:
        parts["teacher final states"] = 2 * b * tokens * work.teacher.final_width
    return parts


def _backward(work: Workload, plan: Plan) -> Parts:
    """A layer recomputed, gradients on their way through it, and those of the heads in their own dtype."""
    tokens, shape, b = work.tokens(plan.micro_batch_size), work.student, work.element_bytes
    parts: Parts = {
        **_student_layer(work, plan),
        "student head's gradient": (4 + b) * work.trained_head,
        "whole gradients on their way": b * min(work.trained, shape.layer_parameters),
    }
    if plan.gradient_checkpointing:
        parts["student layer recomputed"] = tokens * shape.bytes.saved
    return parts


def _optimizer(work: Workload, plan: Plan, machine: Machine) -> Parts:
    """The fp32 gradients of what is stepped on at once."""
    if plan.offload_optimizer:
        return {}
    own = work.trained / machine.num_ranks
    return {"fp32 gradients of the step": 4 * (min(own, SUB_GROUP) if plan.student_stage == 3 else own)}


def _rollouts(work: Workload, writing: Writing) -> Parts:
    """The whole student as a plain model, and the keys and values of all that it writes at once."""
    b, shape = work.element_bytes, work.student
    return {
        "whole student while it writes": b * shape.parameters,
        "keys and values": b * shape.cache_width * writing.sequences * work.sequence_length,
    }


def _with_heap(phases: dict[str, Parts]) -> dict[str, Parts]:
    """On a CPU: what glibc's heap has grown to in one phase stays resident in the others.

    Only blocks of 32 MB and more go back to the system when they are freed: those of whole partitions and buckets.
    """
    most: Parts = {}
    for parts in phases.values():
        for name in parts.keys() - _OWN_BLOCKS:
            most[name] = max(most.get(name, 0), parts[name])
    grown = sum(most.values())
    return {
        phase: parts | {"freed, but kept by the heap": grown - sum(parts[name] for name in parts.keys() - _OWN_BLOCKS)}
        for phase, parts in phases.items()
    }
