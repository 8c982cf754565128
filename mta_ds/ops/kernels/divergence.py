"""Rows of a divergence on the GPU: from both models' logits to values, teacher entropy and the student's gradient.

One program for each row of logits, in blocks of the vocabulary. With student logits z, teacher logits x,
q = softmax(z), p = softmax(x), label y, weight w and ratio r, a row's loss is

    w [(1 - r) CE + r D],    CE = log Σ exp z - z_y,    D as in METHOD §8,    H = -Σ p log p.

With s_i = ∂D/∂q_i, known up to a constant of the row since the softmax removes one,

    ∂loss/∂z = w [(1 - r) (q - onehot_y) + r q (s - Σ q s)]

    fkl   q (s - Σ q s) = q - p                             rkl   s = log(q/p)
    tvd   s = -½ sign(p - q)                                jsd   s = (1 - β) log(q/m),   m = β p + (1 - β) q
    skl   s = -(1 - α) p/m,   m = α p + (1 - α) q           srkl  s = log(q/m) - α q/m,   m = (1 - α) p + α q
                                                            detached mixture: s = log(q/m)

Sweep 1 finds both log-sum-exps, and with them Σ p log(p/q) (fkl), Σ q log(q/p) (rkl) and H. Each lane of the block
keeps its own running maximum n and its sums relative to it, so that the sweep has no barrier: for a = x - n and
b = z - n' (their own maxima), Σ e^a (a - b) follows a change of the maxima, δ = n_old - n_new <= 0, by

    T <- e^δ (T + (δ - δ') Σ_old e^a) + e^a (a - b).

Sweep 2, for the other divergences, sums D and Σ q s. Sweep 3 writes the gradient, over z itself if it may.
Sums are fp32 and no atomics are used: two runs agree to the bit.
"""

from __future__ import annotations

import itertools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mta_ds.ops.divergence import Divergence
from mta_ds.ops.kernels.launch import Specialisation, on_their_device

# Eight elements of each row for a thread: 16-byte loads, enough of them in flight, and accumulators that stay in
# registers with at least two programs on a multiprocessor.
BLOCK = 2048
NUM_WARPS = 8

# Logits past the end of a row: their probability is 0, and finite, so that 0 times their logarithm is 0.
_PAST_END = tl.constexpr(-1e32)
# A running maximum before the first element, below every logit and above _PAST_END.
_NO_MAXIMUM = tl.constexpr(-1e30)
_TINY = tl.constexpr(1.1754943508222875e-38)


def block_of(vocab_size: int) -> int:
    """Elements of a row that a program works on at once.

    Rows of an odd length are loaded one element at a time, whose addresses and masks want registers too: half as many.
    """
    return BLOCK if vocab_size % 16 == 0 else BLOCK // 2


@triton.jit
def follow(logits, maximum, total):
    """A lane's next logit: new maximum, its change δ <= 0 and e^δ, the logit and its weight relative to the maximum."""
    larger = logits > maximum
    small = tl.exp(-tl.abs(logits - maximum))  # of e^δ and the new weight one is 1, this is the other
    change = tl.where(larger, maximum - logits, 0.0)
    scale = tl.where(larger, small, 1.0)
    weight = tl.where(larger, 1.0, small)
    maximum = tl.where(larger, logits, maximum)
    return maximum, change, scale, logits - maximum, weight, total * scale + weight


@triton.jit
def gather(maximum, total):
    """Lanes to one: the maximum, each lane's change δ and e^δ, and the sum relative to the maximum."""
    change = maximum - tl.max(maximum, 0)
    scale = tl.exp(change)
    return tl.max(maximum, 0), change, scale, tl.sum(total * scale, 0)


@triton.jit
def _terms(log_q, log_p, share, NAME: tl.constexpr, DETACH: tl.constexpr):
    """What a vocabulary entry adds to D, its slope s, and q."""
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    if NAME == "rkl":
        slope = log_q - log_p
        value = q * slope
    elif NAME == "tvd":
        difference = p - q
        value = 0.5 * tl.abs(difference)
        slope = tl.where(difference > 0, -0.5, tl.where(difference < 0, 0.5, 0.0))
    elif NAME == "jsd":
        log_m = tl.log(tl.maximum(share * p + (1 - share) * q, _TINY))
        slope = (1 - share) * (log_q - log_m)
        value = share * p * (log_p - log_m) + q * slope
    elif NAME == "skl":
        m = tl.maximum(share * p + (1 - share) * q, _TINY)
        value = p * (log_p - tl.log(m))
        slope = (share - 1) * (p / m)
    else:
        tl.static_assert(NAME == "srkl")
        m = tl.maximum((1 - share) * p + share * q, _TINY)
        slope = log_q - tl.log(m)
        value = q * slope
        if not DETACH:
            slope -= share * (q / m)
    return value, slope, q


@triton.jit
def divergence_kernel(
    student,
    teacher,
    targets,
    weights,
    shares,
    divergences,
    cross_entropies,
    entropies,
    gradient,
    vocab_size,
    share,
    ratio,
    NAME: tl.constexpr,
    DETACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row; ``share`` is α or β, unless each row has its own. What is not given of the pointers is None."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    student += row * vocab_size
    if shares is not None:
        share = tl.load(shares + row)

    # sweep 1
    z_max = tl.full([BLOCK], _NO_MAXIMUM, tl.float32)
    z_sum = tl.zeros([BLOCK], tl.float32)
    x_max, x_sum, crossed, entropy = z_max, z_sum, z_sum, z_sum
    if teacher is not None:
        teacher += row * vocab_size
    for start in range(0, vocab_size, BLOCK):
        columns = start + lanes
        z = tl.load(student + columns, mask=columns < vocab_size, other=_PAST_END)
        z_before = z_sum
        z_max, z_change, z_scale, z, z_weight, z_sum = follow(z, z_max, z_sum)
        if teacher is not None:
            x = tl.load(teacher + columns, mask=columns < vocab_size, other=_PAST_END)
            x_before = x_sum
            x_max, x_change, x_scale, x, x_weight, x_sum = follow(x, x_max, x_sum)
            if NAME == "fkl":
                crossed = x_scale * (crossed + (x_change - z_change) * x_before) + x_weight * (x - z)
            if NAME == "rkl":
                crossed = z_scale * (crossed + (z_change - x_change) * z_before) + z_weight * (z - x)
            if entropies is not None:
                entropy = x_scale * (entropy + x_change * x_before) + x_weight * x
    z_max, z_change, z_scale, z_total = gather(z_max, z_sum)
    # kept apart from the maximum: their sum would be rounded at the size of the logits, not of their differences
    z_log = tl.log(z_total)
    target = tl.load(targets + row)
    tl.store(cross_entropies + row, z_log - (tl.load(student + target) - z_max))
    value, mean, x_log = 0.0, 0.0, 0.0
    if teacher is not None:
        x_max, x_change, x_scale, x_total = gather(x_max, x_sum)
        x_log = tl.log(x_total)
        if NAME == "fkl":
            crossed = tl.sum(x_scale * (crossed + (x_change - z_change) * x_sum), 0)
            value = crossed / x_total + z_log - x_log
        if NAME == "rkl":
            crossed = tl.sum(z_scale * (crossed + (z_change - x_change) * z_sum), 0)
            value = crossed / z_total + x_log - z_log
            mean = value
        if entropies is not None:
            entropy = tl.sum(x_scale * (entropy + x_change * x_sum), 0)
            tl.store(entropies + row, x_log - entropy / x_total)

    # sweep 2
    if NAME == "tvd" or NAME == "jsd" or NAME == "skl" or NAME == "srkl":
        values = tl.zeros([BLOCK], tl.float32)
        slopes = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            columns = start + lanes
            z = tl.load(student + columns, mask=columns < vocab_size, other=_PAST_END)
            x = tl.load(teacher + columns, mask=columns < vocab_size, other=_PAST_END)
            term, slope, q = _terms(z - z_max - z_log, x - x_max - x_log, share, NAME, DETACH)
            values += term
            slopes += q * slope
        value = tl.sum(values, 0)
        mean = tl.sum(slopes, 0)
    tl.store(divergences + row, value)

    # sweep 3
    if gradient is not None:
        # every thread has read its label's logit before another writes the gradient over it
        tl.debug_barrier()
        gradient += row * vocab_size
        label = 1 - ratio
        if weights is not None:
            weight = tl.load(weights + row).to(tl.float32)
            label *= weight
            ratio *= weight
        for start in range(0, vocab_size, BLOCK):
            columns = start + lanes
            z = tl.load(student + columns, mask=columns < vocab_size, other=_PAST_END)
            if NAME == "sft":
                q = tl.exp(z - z_max - z_log)
                grad = label * q
            else:
                x = tl.load(teacher + columns, mask=columns < vocab_size, other=_PAST_END)
                if NAME == "fkl":
                    q = tl.exp(z - z_max - z_log)
                    grad = label * q + ratio * (q - tl.exp(x - x_max - x_log))
                else:
                    _, slope, q = _terms(z - z_max - z_log, x - x_max - x_log, share, NAME, DETACH)
                    grad = q * (label + ratio * (slope - mean))
            grad -= tl.where(columns == target, label, 0.0)
            tl.store(gradient + columns, grad.to(gradient.dtype.element_ty), mask=columns < vocab_size)


@on_their_device
def divergence_rows(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    divergence: Divergence,
    values: Tensor,
    gradient: Tensor | None,
    alphas: Tensor | None = None,
) -> None:
    """Fill ``values`` [2 or 3, m] with divergence, cross-entropy and teacher entropy, and ``gradient`` [m, V].

    Args:
        student, teacher: contiguous fp32 logits [m, V]; no teacher: the divergence is 0.
        targets, weights: [m]; None: every weight is 1.
        values: fp32; with a third row the teacher's entropy is computed.
        gradient: of the weighted loss to the student's logits, in any dtype; may be ``student`` itself.
        alphas: fp32 [m], α of each row; None: the divergence's own.
    """
    if len(student) == 0:
        return
    assert all(matrix is None or matrix.is_contiguous() for matrix in (student, teacher, gradient))
    divergence_kernel[(len(student),)](
        student,
        teacher,
        targets,
        weights,
        alphas,
        values[0],
        values[1],
        values[2] if len(values) == 3 else None,
        gradient,
        student.shape[1],
        divergence.beta if divergence.name == "jsd" else divergence.alpha,
        divergence.divergence_ratio,
        NAME=divergence.formula if teacher is not None else "sft",
        DETACH=divergence.detach_mixture,
        BLOCK=min(block_of(student.shape[1]), triton.next_power_of_2(student.shape[1])),
        num_warps=NUM_WARPS,
    )


def specialisations(width: int) -> list[Specialisation]:
    """Every divergence as training and evaluation launch it; rows are of logits, whatever the width of the states."""
    pointers = {"student": "*fp32", "teacher": "*fp32", "targets": "*i64", "weights": "*fp32", "shares": "*fp32"}
    pointers |= {"divergences": "*fp32", "cross_entropies": "*fp32", "entropies": "*fp32", "gradient": "*bf16"}
    scalars = {"vocab_size": "i32", "share": "fp32", "ratio": "fp32"}
    names = ["sft", "fkl", "rkl", "jsd", "tvd", "skl", "srkl", "srkl detached"]
    names += ["skl of each row's α", "srkl detached of each row's α"]
    uses = ("", ", weights and entropy", ", evaluation")
    found = []
    for name, use, odd in itertools.product(names, uses, (False, True)):
        full = "weights" in use
        constants: dict[str, Any] = {"NAME": name.partition(" ")[0], "DETACH": "detached" in name}
        constants["BLOCK"] = block_of(50_257 if odd else 50_304)
        wanted = {"shares": "each row" in name, "weights": full, "entropies": full, "teacher": name != "sft" or full}
        wanted["gradient"] = "evaluation" not in use
        constants |= {key: None for key, given in wanted.items() if not given}
        kinds = pointers | scalars | ({"gradient": "*fp32"} if full and odd else {})
        signature = {key: kind for key, kind in kinds.items() if key not in constants}
        title = f"divergence {name}{use}{', odd vocabulary' if odd else ''}"
        sizes = ("vocab_size",) if odd else ()
        found.append(Specialisation(title, divergence_kernel, signature, constants, NUM_WARPS, 3, sizes))
    return found
