"""Token weights (MTA eqs. 5-7): how much each token is attended to by the tokens of its own sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mta_ds.ops.arguments import check_bounds, check_rows, check_vector
from mta_ds.ops.backend import backend_of
from mta_ds.ops.layout import row_blocks, runs
from mta_ds.ops.products import accumulating, gram
from mta_ds.ops.reference import STD_EPSILON
from mta_ds.ops.span_pool import normalise_within

# Scores of a CPU at once, 2 MB in fp32, and tokens that are centred at once.
_BLOCK_SCORES = 1 << 19
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
    weights = hidden.new_empty(len(hidden), dtype=accumulating(hidden[:0]).dtype)
    for _, run in runs(cu_seqlens, _BLOCK_SCORES):
        weights[run.rows] = _attention_received(accumulating(run.of(hidden))).view(-1)
    return weights


@torch.no_grad()
def entropy_weights(entropies: Tensor, vocab_size: int, cu_seqlens: Tensor) -> Tensor:
    """Token weights of how sure the teacher is: 1 - H(p_t) / log|V|, renormalised in each sequence (METHOD §6).

    Args:
        entropies: H(p_t) in nats of each token's next-token distribution [n], of the teacher.
        vocab_size: |V|, over which the distributions are.
        cu_seqlens: int64 [B + 1] on the CPU.

    Returns:
        [n] in fp32 (float64 stays), summing to 1 in each sequence; zeros where all its distributions are uniform.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a vocabulary of less than two.
    """
    check_vector("entropies", entropies, len(entropies))
    check_bounds("cu_seqlens", cu_seqlens, len(entropies))
    if vocab_size < 2:
        raise ValueError(f"vocab_size: want at least 2, got {vocab_size}")
    sure = (1 - accumulating(entropies) / math.log(vocab_size)).clamp_min_(0)
    return normalise_within(sure, cu_seqlens)


def _attention_received(hidden: Tensor) -> Tensor:
    """Token weights [c, n] of c sequences [c, n, d]; a block of rows at a time, whose softmax is exact by itself."""
    count, length, _ = hidden.shape
    whole = gram(hidden) if count * length**2 <= _BLOCK_SCORES else None
    squares = torch.linalg.vector_norm(hidden, dim=2).square_() if whole is None else whole.diagonal(dim1=1, dim2=2)
    scales = _scales(hidden, squares)
    if length <= 1:
        return torch.ones_like(scales) + 0.0 * scales
    received = torch.zeros_like(scales)
    for rows in row_blocks(length, _BLOCK_SCORES // (count * length)):
        scores = torch.bmm(hidden[:, rows], hidden.mT) if whole is None else whole
        scores.mul_(scales[:, rows, None]).mul_(scales[:, None])
        scores.diagonal(offset=rows.start, dim1=1, dim2=2).fill_(-torch.inf)
        received += torch.softmax(scores, dim=2, out=scores).sum(dim=1)
    return received / length


def _scales(hidden: Tensor, squares: Tensor) -> Tensor:
    """d^-¼ / (std(H_t) + 1e-5) of each token [c, n]; two of them scale a score, which are fewer than features."""
    num_features = hidden.shape[2]
    means = hidden.mean(dim=2)
    of_means = means.square().mul_(num_features)
    # where this subtraction costs a bit at most, it saves a centred copy; torch.std takes as long as the scores
    if hidden.dtype != torch.float64 and bool((of_means <= 0.5 * squares).all()):
        norms = (squares - of_means).sqrt_()
    else:
        norms = _centred_norms(hidden.flatten(0, 1), means.view(-1, 1)).view_as(means)
    # a single feature has no deviation
    unbiased = (num_features - 1) ** -0.5 if num_features > 1 else float("nan")
    scales: Tensor = norms.mul_(unbiased).add_(STD_EPSILON).reciprocal_().mul_(num_features**-0.25)
    return scales


def _centred_norms(hidden: Tensor, means: Tensor) -> Tensor:
    """||H_t - mean(H_t)|| of each token [n]."""
    blocks = row_blocks(len(hidden), _BLOCK_TOKENS)
    norms = [torch.linalg.vector_norm(hidden[rows] - means[rows], dim=1) for rows in blocks]
    return torch.cat(norms) if norms else means[:, 0]
