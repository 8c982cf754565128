"""Where sequences and spans lie in a ragged batch: host data, read once, so that no op ever waits for a GPU.

Layouts come from the tokenizer, so they start on the CPU, and stay there: checks, loop bounds and launch grids are
made from them on the host, and what kernels read is copied beside the tensors without waiting.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mta_ds.ops.arguments import check_bounds, check_spans, check_spans_within

TILE_ROWS = 64


class HostData:
    """Integers on the CPU, of which ops read copies beside their tensors; each is made once a device."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def on(self, name: str, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        """The attribute ``name`` on a device, copied there once."""
        key = (name, device, dtype)
        if key not in self._copies:
            self._copies[key] = beside(getattr(self, name).to(dtype), device)
        return self._copies[key]


class Segments(HostData):
    """N values that belong to consecutive segments, maybe empty ones.

    Args:
        cu: their bounds, int64 [B + 1] on the CPU, from 0 to N, never falling.
    """

    def __init__(self, cu: Tensor) -> None:
        super().__init__()
        self.cu = cu

    @cached_property
    def owners(self) -> Tensor:
        """The segment of each value, int64 [N]."""
        return torch.repeat_interleave(torch.arange(len(self.cu) - 1), self.cu.diff())

    @cached_property
    def tiles(self) -> Tensor:
        """The launch grid over rows, 64 at a time: int32 [tiles, 3] of (first row, segment's start, segment's end)."""
        rows = [(first, start, end) for start, end in pairs(self.cu) for first in range(start, end, TILE_ROWS)]
        return torch.tensor(rows, dtype=torch.int32).reshape(-1, 3)


class Membership(HostData):
    """Which tokens are in which span: the pairs (span, token), ordered by span and, for gradients, by token.

    Args:
        spans: half-open token ranges int64 [K, 2] on the CPU, in any order, overlapping or empty.
        num_tokens: n.

    Raises:
        ValueError: spans that are no such ranges.
    """

    def __init__(self, spans: Tensor, num_tokens: int) -> None:
        super().__init__()
        check_spans(spans, num_tokens)
        self.spans = spans
        self.num_tokens = num_tokens

    @cached_property
    def pairs(self) -> Segments:
        """The pairs, span by span."""
        return Segments(_offsets(self.spans[:, 1] - self.spans[:, 0]))

    @cached_property
    def span_offsets(self) -> Tensor:
        """int64 [K + 1]: where each span's pairs begin."""
        return self.pairs.cu

    @cached_property
    def span_tokens(self) -> Tensor:
        """int64 [pairs]: the token of each pair, span by span."""
        spans = self.pairs.owners
        return torch.arange(len(spans)) + (self.spans[:, 0] - self.span_offsets[:-1])[spans]

    @cached_property
    def token_pairs(self) -> Tensor:
        """int64 [pairs]: the pairs, of which ``span_tokens`` are the tokens, token by token."""
        return self.span_tokens.argsort(stable=True)

    @cached_property
    def token_spans(self) -> Tensor:
        """int64 [pairs]: the span of each pair, token by token."""
        return self.pairs.owners[self.token_pairs]

    @cached_property
    def _spans_of_token(self) -> Tensor:
        return torch.bincount(self.span_tokens, minlength=self.num_tokens)

    @cached_property
    def covered(self) -> Tensor:
        """int64 [m]: the tokens that are in any span, sorted."""
        return self._spans_of_token.nonzero()[:, 0]

    @cached_property
    def covered_offsets(self) -> Tensor:
        """int64 [m + 1]: where each covered token's pairs begin in ``token_spans``."""
        return _offsets(self._spans_of_token[self.covered])


class SpanLayout:
    """The spans of one granularity in a batch: shared by all key layers that align it.

    Args:
        cu_seqlens: bounds of the sequences, int64 [B + 1].
        spans: token ranges int64 [K, 2], sequence by sequence.
        cu_spans: bounds of each sequence's spans, int64 [B + 1].

    Raises:
        ValueError: bounds that fall or end elsewhere, or a span outside its own sequence.
    """

    def __init__(self, cu_seqlens: Tensor, spans: Tensor, cu_spans: Tensor) -> None:
        num_tokens = check_bounds("cu_seqlens", cu_seqlens, None)
        self.members = Membership(spans, num_tokens)
        check_bounds("cu_spans", cu_spans, len(spans))
        if len(cu_spans) != len(cu_seqlens):
            raise ValueError(f"cu_spans: want {len(cu_seqlens)} bounds as cu_seqlens has, got {len(cu_spans)}")
        self.tokens = Segments(cu_seqlens)
        self.spans = Segments(cu_spans)
        check_spans_within(spans, self.spans.owners, cu_seqlens)
        self._groups: dict[int, list[Group]] = {}

    @property
    def num_tokens(self) -> int:
        """n"""
        return self.members.num_tokens

    @property
    def cu_seqlens(self) -> Tensor:
        """Bounds of each sequence's tokens, int64 [B + 1]."""
        return self.tokens.cu

    @property
    def cu_spans(self) -> Tensor:
        """Bounds of each sequence's spans, int64 [B + 1]."""
        return self.spans.cu

    @cached_property
    def covered(self) -> Segments:
        """The covered tokens, sequence by sequence."""
        return Segments(torch.searchsorted(self.members.covered, self.cu_seqlens))

    def groups(self, num_tokens: int) -> list[Group]:
        """The batch as runs of whole sequences of about ``num_tokens``: what is worked on at once."""
        num_sequences = len(self.cu_seqlens) - 1
        if num_sequences == 1 or (num_sequences > 1 and self.num_tokens <= num_tokens):
            sizes = (self.num_tokens, len(self.members.spans), len(self.members.span_tokens), len(self.members.covered))
            tokens, spans, pairs, covered = (slice(0, size) for size in sizes)
            return [Group(tokens, spans, pairs, covered, self)]  # not kept: it would keep itself
        if num_tokens not in self._groups:
            self._groups[num_tokens] = list(self._cut(num_tokens))
        return self._groups[num_tokens]

    def _cut(self, num_tokens: int) -> Iterator[Group]:
        bounds, cu_spans, cu_covered = (cu.tolist() for cu in (self.cu_seqlens, self.cu_spans, self.covered.cu))
        cu_pairs = self.members.span_offsets
        first = 0
        for last in range(1, len(bounds)):
            if last + 1 < len(bounds) and bounds[last + 1] - bounds[first] <= num_tokens:
                continue
            tokens, spans = slice(bounds[first], bounds[last]), slice(cu_spans[first], cu_spans[last])
            covered = slice(cu_covered[first], cu_covered[last])
            inner = SpanLayout(
                self.cu_seqlens[first : last + 1] - tokens.start,
                self.members.spans[spans] - tokens.start,
                self.cu_spans[first : last + 1] - spans.start,
            )
            members = slice(int(cu_pairs[spans.start]), int(cu_pairs[spans.stop]))
            yield Group(tokens, spans, members, covered, inner)
            first = last


class Group(NamedTuple):
    """Some whole sequences of a batch: slices into the batch's values, and their own layout."""

    tokens: slice
    spans: slice
    pairs: slice
    """Of (span, token), span by span."""
    covered: slice
    layout: SpanLayout


def pairs(cu: Tensor) -> list[tuple[int, int]]:
    """[B + 1] bounds as B (start, end)."""
    return list(itertools.pairwise(cu.tolist()))


class Run(NamedTuple):
    """Consecutive segments of one length, which products take as one batch."""

    rows: slice
    num_segments: int
    length: int

    def of(self, values: Tensor) -> Tensor:
        """The run's rows of ``values`` [N, ...], as [segments, length, ...]."""
        return values[self.rows].view(self.num_segments, self.length, *values.shape[1:])


def runs(cu: Tensor, most_pairs: int) -> Iterator[tuple[int, Run]]:
    """Segments of one length together, with the first's number; as many as have ``most_pairs`` pairs, or one."""
    bounds = pairs(cu)
    first = 0
    while first < len(bounds):
        start, end = bounds[first]
        most = max(1, most_pairs // max(1, (end - start) ** 2))
        last = first + 1
        while last < len(bounds) and last - first < most and bounds[last][1] - bounds[last][0] == end - start:
            last += 1
        yield first, Run(slice(start, bounds[last - 1][1]), last - first, end - start)
        first = last


def row_blocks(num_rows: int, size: int) -> Iterator[slice]:
    """``num_rows`` rows, ``size`` (at least one) at a time."""
    size = max(1, size)
    for first in range(0, num_rows, size):
        yield slice(first, min(first + size, num_rows))


def beside(values: Tensor, device: torch.device) -> Tensor:
    """Host data where other tensors are; through pinned memory the copy does not wait for the GPU's queue.

    What is there already stays as it is.
    """
    if values.device == device:
        return values
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
