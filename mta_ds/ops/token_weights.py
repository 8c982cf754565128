"""Token weights (MTA eqs. 5-7): how much each token is attended to by the tokens of its own sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from mta_ds.ops.arguments import check_bounds, check_rows
from mta_ds.ops.backend import backend_of
from mta_ds.ops.layout import pairs
from mta_ds.ops.products import accumulating
from mta_ds.ops.reference import STD_EPSILON

# Scores of a CPU at once: 1 MB in fp32 stays in a core's cache from the product to the column sums.
_BLOCK_SCORES = 1 << 18


@torch.no_grad()
def token_weights(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Column means of softmax(Ĥ Ĥᵀ / √d) without its diagonal, Ĥ_t = H_t / (std(H_t) + 1e-5); no gradient.

    Args:
        hidden: [n, d], the valid tokens of B sequences one after another.
        cu_seqlens: int64 [B + 1] on the CPU.

    Returns:
        [n] in fp32 (float64 stays), positive, summing to 1 in each sequence; a sequence of one token has weight 1. A
        NaN or Inf in a sequence makes all its weights NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_rows("hidden", hidden)
    check_bounds("cu_seqlens", cu_seqlens, len(hidden))
    if backend_of(hidden) == "triton" and hidden.dtype != torch.float64:
        import mta_ds.ops.kernels.token_weights as kernels

        return kernels.token_weights(hidden, cu_seqlens)
    weights = hidden.new_empty(len(hidden), dtype=accumulating(hidden[:0]).dtype)
    for start, end in pairs(cu_seqlens):
        weights[start:end] = _attention_received(accumulating(hidden[start:end]))
    return weights


def _attention_received(hidden: Tensor) -> Tensor:
    """Token weights [n] of one sequence [n, d]; a block of rows at a time, whose softmax is exact by itself."""
    length, num_features = hidden.shape
    if length <= 1:
        return hidden.new_ones(length) + 0.0 * hidden.sum(dim=1)
    # torch.std takes twenty times as long, as long as the scores
    centred = hidden - hidden.mean(dim=1, keepdim=True)
    deviation = torch.linalg.vector_norm(centred, dim=1) * _unbiased(num_features)
    # the scale goes to the scores, which are fewer than the features
    scale = num_features**-0.25 / (deviation + STD_EPSILON)
    received = hidden.new_zeros(length)
    num_rows = max(1, _BLOCK_SCORES // length)
    for first in range(0, length, num_rows):
        rows = slice(first, first + num_rows)
        scores = torch.mm(hidden[rows], hidden.T).mul_(scale[rows, None]).mul_(scale)
        scores.diagonal(offset=first).fill_(-torch.inf)
        received += torch.softmax(scores, 1, out=scores).sum(dim=0)
    return received / length


def _unbiased(num_features: int) -> float:
    """Factor from the norm of the centred features to their Bessel-corrected deviation, which one feature has not."""
    return (num_features - 1) ** -0.5 if num_features > 1 else float("nan")
