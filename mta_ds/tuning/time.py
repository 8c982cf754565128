"""How long a step takes on a machine: products at an assumed share of the peak rate, gathers at the links' rates.

FLOPs: 2 a parameter and token forward, twice that backward (once where adapters are trained beside frozen weights),
once more where layers are recomputed; attention counts its causal half; of a mixture's experts those count that a token
is sent to. Bytes: the teacher is gathered once a micro-step; the student once where it stays gathered, twice where it
is released, 2.7 times with checkpointing (measured); gradients are reduced once a micro-step under stages 2 and 3, once
a step under stage 1; the teacher's head is gathered once a step. Gathers run beside products where something is
prefetched. Rollouts read all weights for every token that they write. Efficiency, what overlap hides and what small
matrices lose are assumptions; trials correct their sum.
"""

from __future__ import annotations

from typing import NamedTuple

from mta_ds.tuning.machine import Machine
from mta_ds.tuning.memory import Plan
from mta_ds.tuning.shapes import SPANS_PER_TOKEN, ModelShape, Workload

LATENCY = {"node": 30e-6, "network": 80e-6}
"""Seconds that a collective takes however small it is."""
_EXPOSED = 0.1
_HALF_RATE_TOKENS = 256  # at which products reach half of their rate: small matrices do not fill a GPU
_STEPPED_BYTES = 30  # of an element in AdamW: gradient, master, moments read; master, moments, weight written
_LAYER_CALL = 5e-4  # seconds of Python and launches for one layer, however small: what bounds a token that is written


class StepTime(NamedTuple):
    """Seconds of one optimizer step of a rank."""

    total: float
    parts: dict[str, float]
    """Each by itself; those of links run beside products, so they add up to more than the total."""
    micro_steps: int

    def times(self, factor: float) -> StepTime:
        """All of it, as trials correct it."""
        return StepTime(factor * self.total, {name: factor * s for name, s in self.parts.items()}, self.micro_steps)

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
        + parts["rollouts"]
    )
    return StepTime(total, parts, steps)


def _beside(first: float, second: float) -> float:
    """Two things at once: some of the shorter is never hidden."""
    return max(first, second) + _EXPOSED * min(first, second)


def _one_after_another(first: float, second: float) -> float:
    return first + second


def model_flops(shape: ModelShape, sequences: int, length: int) -> tuple[float, float]:
    """Of a forward without the LM head: with weights, and in attention."""
    attention = 2.0 * sequences * length**2 * shape.attention_width * shape.num_layers
    return 2.0 * shape.active * sequences * length, attention


def _products(work: Workload, plan: Plan, machine: Machine) -> dict[str, float]:
    """Seconds of products, over all micro-steps."""
    sequences, tokens = plan.micro_batch_size * work.sequences_per_sample, work.tokens(plan.micro_batch_size)
    steps, rate = plan.gradient_accumulation_steps, product_rate(work, tokens, machine)
    weights, attention = model_flops(work.student, sequences, work.sequence_length)
    teacher = sum(model_flops(work.teacher, sequences, work.sequence_length)) if work.teacher else 0.0
    # logits and their gradient to the states; frozen weights have none of their own
    heads = 4.0 * tokens * work.student.head + 2.0 * tokens * work.trained_head
    if work.teacher is not None and work.teacher_head:
        heads += 2.0 * tokens * work.teacher.head
    stepped = _STEPPED_BYTES * work.trained / machine.num_ranks
    bandwidth = machine.host_bandwidth / machine.gpus_per_node if plan.offload_optimizer else machine.bandwidth
    copied = 2 * work.element_bytes * work.trained / machine.num_ranks if plan.offload_optimizer else 0.0
    return {
        "student": steps * ((2 if work.adapters else 3) * weights + 3 * attention) / rate,
        "recomputation": steps * (weights + attention) / rate if plan.gradient_checkpointing else 0.0,
        "teacher": steps * teacher / rate,
        "LM heads and divergence": steps * work.head_passes * heads / rate,
        "MTA's losses": steps * _structural_seconds(work, sequences, machine),
        "optimizer step": stepped / bandwidth + copied / machine.host_link,
        "rollouts": _writing_seconds(work, machine),
    }


def _writing_seconds(work: Workload, machine: Machine) -> float:
    """A rank's sequences of a step, written a batch at a time, a token of each after another."""
    if work.writing is None:
        return 0.0
    shape, sequences = work.student, min(work.writing.sequences, work.batch_per_rank)
    cached = shape.cache_width * sequences * work.sequence_length / 2  # on average
    reading = work.element_bytes * (shape.parameters + cached) / machine.bandwidth
    products = 2.0 * (shape.active + shape.head) * sequences / machine.rate(work.element_bytes)
    token = max(reading, products, shape.num_layers * _LAYER_CALL)
    return -(-work.batch_per_rank // sequences) * work.writing.new_tokens * token


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
    student, teacher = work.student_elements, work.teacher
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
        times = 1.0 if plan.resident else 2.7 if plan.gradient_checkpointing else 2.0
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
