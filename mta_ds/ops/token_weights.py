"""Token weights (MTA eqs. 5-7): how much each token is attended to by the tokens of its own sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from mta_ds.ops.arguments import check_bounds, check_rows
from mta_ds.ops.backend import backend_of
from mta_ds.ops.layout import row_blocks, runs
from mta_ds.ops.products import accumulating
from mta_ds.ops.reference import STD_EPSILON

# Scores of a CPU at once, 1 MB in fp32, and tokens whose deviations are found at once.
_BLOCK_SCORES = 1 << 18
_BLOCK_TOKENS = 1024


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
    if not len(hidden):
        return hidden.new_empty(0, dtype=accumulating(hidden).dtype)
    scales = torch.cat([_scales(accumulating(hidden[block])) for block in row_blocks(len(hidden), _BLOCK_TOKENS)])
    weights = torch.empty_like(scales)
    for _, run in runs(cu_seqlens, _BLOCK_SCORES):
        received = _attention_received(accumulating(run.of(hidden)), run.of(scales))
        weights[run.rows] = received.view(-1)
    return weights


def _scales(hidden: Tensor) -> Tensor:
    """d^-¼ / (std(H_t) + 1e-5) of each token [n]; two of them scale a score, which are fewer than features."""
    num_features = hidden.shape[1]
    # torch.std takes twenty times as long, as long as the scores; a single feature has no deviation
    centred = hidden - hidden.mean(dim=1, keepdim=True)
    unbiased = (num_features - 1) ** -0.5 if num_features > 1 else float("nan")
    deviation = torch.linalg.vector_norm(centred, dim=1) * unbiased
    scales: Tensor = (deviation + STD_EPSILON).reciprocal_().mul_(num_features**-0.25)
    return scales


def _attention_received(hidden: Tensor, scales: Tensor) -> Tensor:
    """Token weights [c, n] of c sequences [c, n, d]; a block of rows at a time, whose softmax is exact by itself."""
    count, length, _ = hidden.shape
    if length <= 1:
        return torch.ones_like(scales) + 0.0 * scales
    received = torch.zeros_like(scales)
    for rows in row_blocks(length, _BLOCK_SCORES // (count * length)):
        scores = torch.bmm(hidden[:, rows], hidden.mT).mul_(scales[:, rows, None]).mul_(scales[:, None])
        scores.diagonal(offset=rows.start, dim1=1, dim2=2).fill_(-torch.inf)
        # torch's own softmax hands out eight rows at a time, which wakes all cores for the smallest block
        shares = scores.sub_(scores.amax(dim=2, keepdim=True)).exp_()
        received += shares.div_(shares.sum(dim=2, keepdim=True)).sum(dim=1)
    return received / length
