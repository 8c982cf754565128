"""Shares of a weight within a span or a sequence, from logarithms.

Attention may give a token a weight of e^-300: nothing in the batch, and all there is in a span of its own. Shares
depend on ratios alone, so weights are carried as logarithms in float64, n numbers: their range has no end, and no digit
is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mta_ds.ops.backend import backend_of
from mta_ds.ops.layout import Segments

# Below e^-40 of the largest weight, a pair of two others adds nothing to one with it.
_LOG_NEGLIGIBLE = -40.0


def softmax_within(logs: Tensor, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each value's share of its own segment, and each segment's sum.

    Args:
        logs: logarithms of N weights, float64; -inf where one is zero.
        segments: of the N values.
        dtype: the shares'.

    Returns:
        Shares [N], zeros where a segment weighs nothing, and the logarithms of the sums [B], float64.
    """
    like = logs.new_empty(0, dtype=dtype)
    if backend_of(like) == "triton":
        import mta_ds.ops.kernels.segments as kernels

        return kernels.softmax_within(logs, segments.on("cu", logs.device), dtype)
    if not len(logs):
        return like, logs.new_full((len(segments.cu) - 1,), -torch.inf)
    cu, owners = (segments.on(name, logs.device) for name in ("cu", "owners"))
    top = torch.segment_reduce(logs, "max", offsets=cu, initial=-torch.inf, unsafe=True)
    top.masked_fill_(top == -torch.inf, 0.0)  # exp(-inf - -inf) would be NaN
    shares = (logs - top[owners]).exp_()
    total = torch.segment_reduce(shares, "sum", offsets=cu, unsafe=True)
    shares /= total.clamp_min(1.0)[owners]  # the largest adds 1: only what is zero is below
    return shares.to(dtype), total.log_().add_(top)


def pair_weights(log_mass: Tensor, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ω of each span, so that its products with the others' keep their digits.

    Beside a span with all but e^-40 of its sequence's weight, the others are lifted to sum up to e^-40: they matter by
    their products with it, and of each other's products nothing shows before or after.

    Args:
        log_mass: float64 [K].
        segments: the spans of each sequence.
        dtype: what ω is wanted in.

    Returns:
        ω [K], and the logarithm [B] of the factor that products are too large by, float64; 0 where ω sums to 1.
    """
    shares, total = softmax_within(log_mass, segments, dtype)
    largest = shares > 0.5  # no more than one in a sequence
    rest = softmax_within(log_mass.masked_fill(largest, -torch.inf), segments, dtype)[1]
    lift = (_LOG_NEGLIGIBLE - (rest - total)).clamp_min_(0.0)
    lift.masked_fill_(rest == -torch.inf, 0.0)
    owners = segments.on("owners", log_mass.device)
    lifted = (log_mass - (total - lift)[owners]).exp_().to(dtype)
    return torch.where(largest | (lift[owners] == 0.0), shares, lifted), lift
