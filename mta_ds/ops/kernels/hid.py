"""Distances of projected tokens: one program a row, which is read for its three sums and again for its gradient.

    cos = <P, T> / (|P| |T|),    value = w (1 - cos),    ∂/∂P = a T + b P,    a = -w / (|P| |T|),    b = w cos / |P|²

The products around it, P = h Wᵀ and the two of its gradient, are a library's.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_ds.ops.kernels.launch import Specialisation, block_size, on_their_device

FEATURES = 2048


@triton.jit
def _distances(
    projected, teacher, tokens, weights, values, gradient, teacher_stride, num_features, first_token,
    HAS_TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row) if HAS_TOKENS else first_token + row
    projected += row * num_features
    gradient += row * num_features
    teacher += token * teacher_stride
    features = tl.arange(0, FEATURES)
    dot = tl.zeros([FEATURES], tl.float32)
    ours = tl.zeros([FEATURES], tl.float32)
    theirs = tl.zeros([FEATURES], tl.float32)
    for first in range(0, num_features, FEATURES):
        inside = first + features < num_features
        p = tl.load(projected + first + features, mask=inside, other=0.0)
        t = tl.load(teacher + first + features, mask=inside, other=0.0).to(tl.float32)
        dot += p * t
        ours += p * p
        theirs += t * t
    length, their_length = tl.sqrt(tl.sum(ours, 0)), tl.sqrt(tl.sum(theirs, 0))
    # a zero vector's cosine is 0, and so is its gradient
    nonzero = (length != 0.0) & (their_length != 0.0)
    inverse = tl.where(nonzero, 1.0 / (length * their_length), 0.0)
    cosine = tl.sum(dot, 0) * inverse
    weight = tl.load(weights + row)
    along = -weight * inverse
    back = tl.where(nonzero, weight * cosine / (length * length), 0.0)
    tl.store(values + row, weight * (1.0 - cosine))
    for first in range(0, num_features, FEATURES):
        inside = first + features < num_features
        p = tl.load(projected + first + features, mask=inside, other=0.0)
        t = tl.load(teacher + first + features, mask=inside, other=0.0).to(tl.float32)
        tl.store(gradient + first + features, (along * t + back * p).to(gradient.dtype.element_ty), mask=inside)


@on_their_device
def distances(
    projected: Tensor, teacher: Tensor, rows: slice | Tensor, weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Values [c] and ∂/∂projected [c, d_T] in ``dtype``, over ``projected`` where that is fp32.

    Args:
        projected: fp32 [c, d_T].
        teacher: [n, d_T], of which ``rows`` (int64 [c], or a slice) are read in place.
        weights: fp32 [c].
    """
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    gradient = projected if dtype == torch.float32 else torch.empty_like(projected, dtype=dtype)
    values = weights.new_empty(len(projected))
    has_tokens = isinstance(rows, Tensor)
    width = projected.shape[1]
    _distances[len(projected),](
        projected, teacher, rows if has_tokens else teacher, weights.contiguous(), values, gradient,
        teacher.stride(0), width, 0 if has_tokens else rows.start, has_tokens, block_size(width, FEATURES),
        num_warps=8,
    )  # fmt: skip
    return values, gradient


def specialisations(width: int) -> list[Specialisation]:
    """Every compiled form for states of this width."""
    found = []
    dtypes = (("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "bf16"))
    for (student, teacher), chosen in itertools.product(dtypes, (True, False)):
        signature = {
            "projected": "*fp32", "teacher": f"*{teacher}", "tokens": "*i64", "weights": "*fp32", "values": "*fp32",
            "gradient": f"*{student}", "teacher_stride": "i32", "num_features": "i32", "first_token": "i32",
        }  # fmt: skip
        constexprs = {"HAS_TOKENS": chosen, "FEATURES": block_size(width, FEATURES)}
        sides = student if student == teacher else f"{student} student, {teacher} teacher"
        title = f"hid {sides}{'' if chosen else ', all tokens'}"
        found.append(Specialisation(title, _distances, signature, constexprs, 8, 3))
    return found
