"""Rows of FDD on the GPU: from both models' logits at two key layers to both terms and the student's gradients.

One program for each token, in blocks of the vocabulary. With the student's logits a at this key layer and b at the one
before, the teacher's c and e there, and q = softmax(a/τ), p = softmax(c/τ),

    KL = Σ p (log p - log q)                                ∂KL/∂a = (q - p) / τ
    Δ = log softmax(a) - log softmax(b),   Θ = log softmax(c) - log softmax(e),   cos = <Δ, Θ> / (|Δ| |Θ|)
    g = ∂(1 - cos)/∂Δ = cos Δ / |Δ|² - Θ / (|Δ| |Θ|)
    ∂(1 - cos)/∂a = g - softmax(a) Σ g,     ∂(1 - cos)/∂b = softmax(b) Σ g - g

Sweep 1 finds the log-sum-exps, each lane with its own running maximum, so that it has no barrier. Sweep 2 sums KL, the
products of Δ and Θ, and what Σ g is made of: from differences, not from moments of the logits, which would cancel where
little has changed. Sweep 3 writes the gradients, over a and b themselves if it may. Sums are fp32 and no atomics are
used: two runs agree to the bit.
"""

from __future__ import annotations

import itertools

import triton
import triton.language as tl
from torch import Tensor

from mta_ds.ops.kernels.divergence import follow, gather
from mta_ds.ops.kernels.launch import Specialisation, on_their_device
from mta_ds.ops.trajectory import Factors

# Six log-sum-exps at once: four elements of each row for a thread, or the accumulators would leave the registers.
BLOCK = 1024
NUM_WARPS = 8

# Logits past the end of a row: their probability is 0, and their log-probabilities are finite and equal.
_PAST_END = tl.constexpr(-1e30)
# A running maximum before the first element, below every logit and above _PAST_END.
_NO_MAXIMUM = tl.constexpr(-1e28)


@triton.jit
def _log_sum(maximum, total):
    """Lanes to one log-sum-exp, in two parts: their sum would be rounded at the size of the logits."""
    maximum, _, _, total = gather(maximum, total)
    return maximum, tl.log(total)


@triton.jit
def trajectory_kernel(
    student,
    teacher,
    divergences,
    derivatives,
    gradient,
    vocab_size,
    inverse_temperature,
    kl_factor,
    derivative_factor,
    HAS_PREVIOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token: its row, and with ``HAS_PREVIOUS`` the one as many rows below as there are tokens."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    before = tl.num_programs(0).to(tl.int64) * vocab_size
    student += row * vocab_size
    teacher += row * vocab_size
    gradient += row * vocab_size

    # sweep 1
    a_max = tl.full([BLOCK], _NO_MAXIMUM, tl.float32)
    a_sum = tl.zeros([BLOCK], tl.float32)
    b_max, c_max, e_max, q_max, p_max = a_max, a_max, a_max, a_max, a_max
    b_sum, c_sum, e_sum, q_sum, p_sum = a_sum, a_sum, a_sum, a_sum, a_sum
    for start in range(0, vocab_size, BLOCK):
        columns = start + lanes
        inside = columns < vocab_size
        a = tl.load(student + columns, mask=inside, other=_PAST_END)
        c = tl.load(teacher + columns, mask=inside, other=_PAST_END)
        q_max, _, _, _, _, q_sum = follow(a * inverse_temperature, q_max, q_sum)
        p_max, _, _, _, _, p_sum = follow(c * inverse_temperature, p_max, p_sum)
        if HAS_PREVIOUS:
            b = tl.load(student + before + columns, mask=inside, other=_PAST_END)
            e = tl.load(teacher + before + columns, mask=inside, other=_PAST_END)
            a_max, _, _, _, _, a_sum = follow(a, a_max, a_sum)
            b_max, _, _, _, _, b_sum = follow(b, b_max, b_sum)
            c_max, _, _, _, _, c_sum = follow(c, c_max, c_sum)
            e_max, _, _, _, _, e_sum = follow(e, e_max, e_sum)
    q_top, q_log = _log_sum(q_max, q_sum)
    p_top, p_log = _log_sum(p_max, p_sum)
    a_top, b_top, c_top, e_top = 0.0, 0.0, 0.0, 0.0
    a_log, b_log, c_log, e_log = 0.0, 0.0, 0.0, 0.0
    if HAS_PREVIOUS:
        a_top, a_log = _log_sum(a_max, a_sum)
        b_top, b_log = _log_sum(b_max, b_sum)
        c_top, c_log = _log_sum(c_max, c_sum)
        e_top, e_log = _log_sum(e_max, e_sum)

    # sweep 2
    divergence = tl.zeros([BLOCK], tl.float32)
    dot, square, their_square, total, their_total = divergence, divergence, divergence, divergence, divergence
    for start in range(0, vocab_size, BLOCK):
        columns = start + lanes
        inside = columns < vocab_size
        a = tl.load(student + columns, mask=inside, other=_PAST_END)
        c = tl.load(teacher + columns, mask=inside, other=_PAST_END)
        log_p = c * inverse_temperature - p_top - p_log
        divergence += tl.exp(log_p) * (log_p - (a * inverse_temperature - q_top - q_log))
        if HAS_PREVIOUS:
            b = tl.load(student + before + columns, mask=inside, other=_PAST_END)
            e = tl.load(teacher + before + columns, mask=inside, other=_PAST_END)
            ours = (a - a_top - a_log) - (b - b_top - b_log)  # past the end too small to differ: 0
            theirs = (c - c_top - c_log) - (e - e_top - e_log)
            dot += ours * theirs
            square += ours * ours
            their_square += theirs * theirs
            total += ours
            their_total += theirs
    tl.store(divergences + row, tl.sum(divergence, 0))
    along, back, mean = 0.0, 0.0, 0.0
    if HAS_PREVIOUS:
        length = tl.sqrt(tl.sum(square, 0))
        norms = length * tl.sqrt(tl.sum(their_square, 0))
        # no change: the cosine is 0, and so is its gradient
        nonzero = norms > 0
        inverse = tl.where(nonzero, 1.0 / tl.where(nonzero, norms, 1.0), 0.0)
        cosine = tl.sum(dot, 0) * inverse
        tl.store(derivatives + row, 1.0 - cosine)
        along = -derivative_factor * inverse
        back = derivative_factor * cosine / tl.where(nonzero, length * length, 1.0)
        mean = along * tl.sum(their_total, 0) + back * tl.sum(total, 0)

    # sweep 3; what other threads load of these rows they have loaded before the last reduction, a barrier
    kl_factor *= inverse_temperature
    for start in range(0, vocab_size, BLOCK):
        columns = start + lanes
        inside = columns < vocab_size
        a = tl.load(student + columns, mask=inside, other=_PAST_END)
        c = tl.load(teacher + columns, mask=inside, other=_PAST_END)
        q = tl.exp(a * inverse_temperature - q_top - q_log)
        toward = kl_factor * (q - tl.exp(c * inverse_temperature - p_top - p_log))
        if HAS_PREVIOUS:
            b = tl.load(student + before + columns, mask=inside, other=_PAST_END)
            e = tl.load(teacher + before + columns, mask=inside, other=_PAST_END)
            log_a = a - a_top - a_log
            log_b = b - b_top - b_log
            change = along * ((c - c_top - c_log) - (e - e_top - e_log)) + back * (log_a - log_b)
            toward += change - mean * tl.exp(log_a)
            away = mean * tl.exp(log_b) - change
            tl.store(gradient + before + columns, away.to(gradient.dtype.element_ty), mask=inside)
        tl.store(gradient + columns, toward.to(gradient.dtype.element_ty), mask=inside)


@on_their_device
def trajectory_rows(
    student: Tensor, teacher: Tensor, num_tokens: int, factors: Factors, values: Tensor, gradient: Tensor
) -> None:
    """Fill ``values`` [2, m] with KL and 1 - cos, and ``gradient`` [m or 2m, V].

    Args:
        student, teacher: contiguous fp32 logits: m = ``num_tokens`` rows of this key layer [m, V], then, if there is
            one, as many of the key layer before [2m, V].
        values: fp32; the second row is left as it is at the first key layer.
        gradient: of the factored sum to the student's logits, in any dtype; may be ``student`` itself.
    """
    assert all(matrix.is_contiguous() for matrix in (student, teacher, gradient))
    trajectory_kernel[(num_tokens,)](
        student,
        teacher,
        values[0],
        values[1],
        gradient,
        student.shape[1],
        1 / factors.temperature,
        float(factors.kl),
        float(factors.derivative),
        HAS_PREVIOUS=len(student) > num_tokens,
        BLOCK=min(BLOCK, triton.next_power_of_2(student.shape[1])),
        num_warps=NUM_WARPS,
    )


def specialisations(width: int) -> list[Specialisation]:
    """A first key layer and a later one; rows are of logits, whatever the width of the states."""
    signature = {"student": "*fp32", "teacher": "*fp32", "divergences": "*fp32", "derivatives": "*fp32"}
    signature |= {"vocab_size": "i32"}
    signature |= dict.fromkeys(("inverse_temperature", "kl_factor", "derivative_factor"), "fp32")
    return [
        Specialisation(
            f"trajectory {'later' if later else 'first'} key layer, {name} gradient{', odd vocabulary' if odd else ''}",
            trajectory_kernel,
            signature | {"gradient": f"*{name}"},
            {"HAS_PREVIOUS": later, "BLOCK": BLOCK},
            NUM_WARPS,
            3,
            ("vocab_size",) if odd else (),
        )
        for later, odd, name in itertools.product((False, True), (False, True), ("bf16", "fp32"))
    ]
