"""Token weights (MTA eqs. 5-7): how much each token is attended to by the tokens of its own sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mta_ds.ops.arguments import check_bounds, check_rows, check_vector
from mta_ds.ops.autograd import without_autocast
from mta_ds.ops.backend import backend_of
from mta_ds.ops.layout import Segments, row_blocks, runs
from mta_ds.ops.products import accumulating, gram, total_dtype
from mta_ds.ops.reference import STD_EPSILON
from mta_ds.ops.span_pool import normalise_within

# Scores of a CPU at once, 2 MB in fp32, and tokens that are centred at once.
_BLOCK_SCORES = 1 << 19
_BLOCK_TOKENS = 1024
# Of the smallest normal number: below, what is added to a weight has lost digits of its own.
_SAFE = 1e8


@torch.no_grad()
def token_weights(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Column means of softmax(Ĥ Ĥᵀ / √d) without its diagonal, Ĥ_t = H_t / (std(H_t) + 1e-5); no gradient.

    Args:
        hidden: [n, d], the valid tokens of B sequences one after another.
        cu_seqlens: int64 [B + 1] on the CPU.

    Returns:
        [n] in fp32 (float64 stays), not negative, summing to 1 in each sequence; a sequence of one token has weight 1.
        A NaN or Inf in a sequence makes all its weights NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_rows("hidden", hidden)
    check_bounds("cu_seqlens", cu_seqlens, len(hidden))
    return log_token_weights(hidden, Segments(cu_seqlens)).exp_().to(total_dtype(hidden.dtype))


@torch.no_grad()
@without_autocast
def log_token_weights(hidden: Tensor, sequences: Segments) -> Tensor:
    """Logarithms of :func:`token_weights`, float64 [n]: finite however little a token is attended to."""
    # kernels make NaN of a single feature's deviation, also where a token alone needs none
    if hidden.shape[1] > 1 and backend_of(hidden) == "triton":
        import mta_ds.ops.kernels.token_weights as kernels

        return kernels.log_token_weights(hidden, sequences)
    logs = hidden.new_empty(len(hidden), dtype=torch.float64)
    for _, run in runs(sequences.cu, _BLOCK_SCORES):
        logs[run.rows] = _log_attention_received(accumulating(run.of(hidden))).view(-1)
    return logs


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


def _log_attention_received(hidden: Tensor) -> Tensor:
    """Logarithms of the token weights [c, n] of c sequences [c, n, d].

    Sums of softmaxes are what a CPU does fastest; the rare sequence in which one underflows goes by logarithms again.
    """
    count, length, _ = hidden.shape
    if length <= 1:  # its weight is 1, or NaN with its state
        return (0.0 * hidden).sum(dim=2).double()
    whole = gram(hidden) if count * length**2 <= _BLOCK_SCORES else None
    squares = torch.linalg.vector_norm(hidden, dim=2).square_() if whole is None else whole.diagonal(dim1=1, dim2=2)
    scales = _scales(hidden, squares)
    if hidden.is_cuda:  # nobody waits to see whether one underflows
        return _log_sums(hidden, scales) - math.log(length)
    received = torch.zeros_like(scales)
    for rows in row_blocks(length, _BLOCK_SCORES // (count * length)):
        scores = _scores(hidden, scales, rows, whole)
        received += torch.softmax(scores, dim=2, out=scores).sum(dim=1)
    logs = received.double().log_()
    lost = received < _SAFE * torch.finfo(received.dtype).tiny
    if bool(lost.any()):
        again = lost.any(dim=1)
        logs[again] = torch.where(lost[again], _log_sums(hidden[again], scales[again]), logs[again])
    return logs.sub_(math.log(length))


def _log_sums(hidden: Tensor, scales: Tensor) -> Tensor:
    """Logarithms of what the tokens of c sequences receive, float64 [c, n]; no number on the way leaves its range."""
    count, length, _ = hidden.shape
    logs = torch.full_like(scales, -torch.inf, dtype=torch.float64)
    for rows in row_blocks(length, _BLOCK_SCORES // (count * length)):
        shares = _scores(hidden, scales, rows).log_softmax(dim=2)
        logs = torch.logaddexp(logs, shares.logsumexp(dim=1).double())
    return logs


def _scores(hidden: Tensor, scales: Tensor, rows: slice, whole: Tensor | None = None) -> Tensor:
    """S [c, rows, n] of some tokens with all of their sequence, in place of ``whole`` products where they exist."""
    scores = torch.bmm(hidden[:, rows], hidden.mT) if whole is None else whole
    scores.mul_(scales[:, rows, None]).mul_(scales[:, None])
    scores.diagonal(offset=rows.start, dim1=1, dim2=2).fill_(-torch.inf)
    return scores


def _scales(hidden: Tensor, squares: Tensor) -> Tensor:
    """d^-¼ / (std(H_t) + 1e-5) of each token [c, n]; two of them scale a score, which are fewer than features."""
    num_features = hidden.shape[2]
    means = hidden.mean(dim=2)
    of_means = means.square().mul_(num_features)
    # where this subtraction costs a bit at most, it saves a centred copy; torch.std takes as long as the scores
    by_means = hidden.dtype != torch.float64 and not hidden.is_cuda  # where nobody waits for what the sums are
    if by_means and bool((of_means <= 0.5 * squares).all()):
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
