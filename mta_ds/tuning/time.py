"""How long a step takes on a machine: products at an assumed share of the peak rate, gathers at the links' rates.

FLOPs: 2 a parameter and token forward, twice that backward, once more where layers are recomputed; attention counts
its causal half. Bytes: the teacher is gathered once a micro-step; the student once where it stays gathered, twice where
it is released, 2.7 times with checkpointing (measured); gradients are reduced once a micro-step under stages 2 and 3,
once a step under stage 1; the teacher's head is gathered once a step. Gathers run beside products where something is
prefetched. Efficiency, what overlap hides and what small matrices lose are assumptions; trials correct their sum.
"""

from __future__ import annotations

from typing import NamedTuple

from mta_ds.tuning.machine import Machine
from mta_ds.tuning.memory import RESIDENT, Plan
from mta_ds.tuning.shapes import SPANS_PER_TOKEN, ModelShape, Workload

LATENCY = {"node": 30e-6, "network": 80e-6}
"""Seconds that a collective takes however small it is."""
_EXPOSED = 0.1
_HALF_RATE_TOKENS = 256  # at which products reach half of their rate: small matrices do not fill a GPU
_STEPPED_BYTES = (
    30  # that AdamW moves for each element: gradient, master, moments read; master, moments, weight written
)


class StepTime(NamedTuple):
    """Seconds of one optimizer step of a rank."""

    total: float
    parts: dict[str, float]
    """Each by itself; those of links run beside products, so they add up to more than the total."""
    micro_steps: int

    @property
    def bottleneck(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


def step_time(work: Workload, plan: Plan, machine: Machine) -> StepTime:
    """Predict one optimizer step."""
    parts = _products(work, plan, machine) | _links(work, plan, machine)
    steps = plan.gradient_accumulation_steps
    gather_s, gather_t = parts["student gathers"], parts["teacher gathers"]
    reduce = parts["gradient reduction"]
    student = parts["student"] + parts["recomputation"]
    together = _beside if plan.prefetch_bucket_size else _one_after_another
    total = (
        together(student, gather_s + reduce)
        + together(parts["teacher"], gather_t)
        + parts["LM heads and divergence"]
        + parts["MTA's losses"]
        + parts["optimizer step"]
        + parts["heads and updated weights gathered"]
    )
    return StepTime(total, parts, steps)


def _beside(first: float, second: float) -> float:
    """Two things at once: some of the shorter is never hidden."""
    return max(first, second) + _EXPOSED * min(first, second)


def _one_after_another(first: float, second: float) -> float:
    return first + second


def model_flops(shape: ModelShape, sequences: int, length: int) -> float:
    """Of a forward without the LM head."""
    tokens = sequences * length
    body = shape.num_layers * shape.layer_parameters
    return 2.0 * body * tokens + 2.0 * sequences * length**2 * shape.attention_width * shape.num_layers


def _products(work: Workload, plan: Plan, machine: Machine) -> dict[str, float]:
    """Seconds of products, over all micro-steps."""
    sequences, tokens = plan.micro_batch_size * work.sequences_per_sample, work.tokens(plan.micro_batch_size)
    steps, rate = plan.gradient_accumulation_steps, product_rate(work, tokens, machine)
    student = model_flops(work.student, sequences, work.sequence_length)
    teacher = model_flops(work.teacher, sequences, work.sequence_length) if work.teacher else 0.0
    heads = 6.0 * tokens * work.student.head
    if work.teacher is not None and work.teacher_head:
        heads += 2.0 * tokens * work.teacher.head
    stepped = _STEPPED_BYTES * work.trained / machine.num_ranks
    bandwidth = machine.host_bandwidth / machine.gpus_per_node if plan.offload_optimizer else machine.bandwidth
    copied = 2 * work.element_bytes * work.trained / machine.num_ranks if plan.offload_optimizer else 0.0
    return {
        "student": steps * 3 * student / rate,
        "recomputation": steps * student / rate if plan.gradient_checkpointing else 0.0,
        "teacher": steps * teacher / rate,
        "LM heads and divergence": steps * work.head_passes * heads / rate,
        "MTA's losses": steps * _structural_seconds(work, sequences, machine),
        "optimizer step": stepped / bandwidth + copied / machine.host_link,
    }


def product_rate(work: Workload, tokens: int, machine: Machine) -> float:
    """FLOPs a second of a micro-batch's products."""
    return machine.rate(work.element_bytes) * tokens / (tokens + _HALF_RATE_TOKENS)


def _structural_seconds(work: Workload, sequences: int, machine: Machine) -> float:
    """Token weights, DSA and Hid of all key layers, every token covered; DSA multiplies fp32 states."""
    if work.teacher is None:
        return 0.0
    tokens, length = sequences * work.sequence_length, work.sequence_length
    ours, both = work.student.width, work.student.width + work.teacher.width
    narrow = wide = 0.0
    for layer in work.key_layers:
        spans = SPANS_PER_TOKEN[layer.granularity] * length
        narrow += 4.0 * tokens * length * both + 6.0 * tokens * ours * work.teacher.width
        wide += 2.0 * sequences * spans**2 * (both + ours)
    return narrow / machine.rate(work.element_bytes) + wide / machine.rate(4)


def _links(work: Workload, plan: Plan, machine: Machine) -> dict[str, float]:
    """Seconds of gathers and reductions, over all micro-steps."""
    b, n, steps = work.element_bytes, machine.num_ranks, plan.gradient_accumulation_steps
    student = work.student.parameters + work.projections
    teacher = work.teacher
    in_node = machine.num_nodes == 1

    def across(elements: float, chunk: float, within: bool = in_node) -> float:
        """A gather or reduction of all ranks, or of a node's, ``chunk`` elements at a time."""
        ranks = machine.gpus_per_node if within else n
        if ranks == 1 or not elements:
            return 0.0
        bandwidth = machine.intra if within else min(machine.intra, machine.inter)
        calls = elements / max(1.0, min(chunk, elements))
        return b * elements * (ranks - 1) / ranks / bandwidth + calls * LATENCY["node" if within else "network"]

    gathers = 0.0
    if plan.student_stage == 3:
        stays = plan.resident and student <= RESIDENT
        times = 1.0 if stays else 2.7 if plan.gradient_checkpointing else 2.0
        gathers = steps * times * across(student, _at_once(work.student, plan))
    teacher_gathers = heads = 0.0
    if teacher is not None:
        teacher_gathers = across(teacher.parameters, _at_once(teacher, plan), in_node or plan.teacher_hpz > 1)
        if plan.offload_teacher:
            teacher_gathers += b * teacher.parameters / n / machine.host_link
        heads = across(teacher.head, teacher.head, in_node or plan.teacher_hpz > 1) if work.teacher_head else 0.0
    reductions = 1 if plan.student_stage == 1 else steps
    updated = across(work.trained, plan.reduce_bucket_size) if plan.student_stage < 3 else 0.0
    return {
        "teacher gathers": steps * teacher_gathers,
        "student gathers": gathers,
        "gradient reduction": reductions * across(work.trained, plan.reduce_bucket_size),
        "heads and updated weights gathered": heads + updated,
    }


def _at_once(shape: ModelShape, plan: Plan) -> float:
    """Elements of one gather: what is prefetched together, or one parameter."""
    return max(plan.prefetch_bucket_size, shape.parameters / len(shape.sizes))
