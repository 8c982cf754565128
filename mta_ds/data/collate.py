"""A batch: padded inputs for the models, ragged tokens and spans for the losses.

Letters: B sequences, T padded length, n valid tokens of all sequences, K spans.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
GRANULARITIES = ("word", "phrase")


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized record."""

    record_id: str
    input_ids: np.ndarray
    """int32 [n]"""
    labels: np.ndarray
    """int32 [n], not shifted; -100 = ignored."""
    spans: dict[str, np.ndarray]
    """"word", "phrase": int32 [K, 2], half-open token ranges."""
    prompt_length: int
    """Tokens that a rollout continues: up to the last response that begins within the length; 0 where there is none."""
    is_rejected: bool = False
    """The rejected half of a preference pair; the chosen one comes right before it."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Spans of one granularity in a ragged batch."""

    ranges: Tensor
    """int64 [K, 2], half-open ranges of the batch's valid tokens."""
    cu_spans: Tensor
    """int64 [B + 1], bounds of each sequence's spans."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the normalisers of the losses need (METHOD §6)."""

    tokens: int
    """Positions with a target."""
    valid_tokens: int
    """All tokens but padding."""
    sequences: int
    covered: dict[str, int]
    """Sequences with a covered token, so with a span that is not empty, by granularity."""
    comparable: dict[str, int]
    """Sequences with at least two spans that are not empty, by granularity."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one rank."""

    record_ids: tuple[str, ...]
    rejected: tuple[bool, ...]
    """Of each sequence: the rejected half of a pair."""
    input_ids: Tensor
    """int64 [B, T], padded on the right."""
    attention_mask: Tensor
    """int64 [B, T]"""
    valid: Tensor
    """int64 [n], indices of the valid tokens in the flattened [B · T]."""
    cu_seqlens: Tensor
    """int64 [B + 1], sequence bounds in the n valid tokens."""
    targets: Tensor
    """int64 [n], the label of the next token of the same sequence; -100 = not counted."""
    spans: dict[str, Spans]
    counts: Counts

    def to(self, device: torch.device) -> Batch:
        """With what the models read on another device; the copy overlaps with what the device is doing.

        The layout of the losses (``cu_seqlens``, ``targets``, ``spans``) stays host data: nobody waits for a GPU to
        read it.
        """
        return replace(
            self,
            input_ids=_move(self.input_ids, device),
            attention_mask=_move(self.attention_mask, device),
            valid=_move(self.valid, device),
        )


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad the inputs to the longest example and concatenate everything else."""
    lengths = np.array([len(e.input_ids) for e in examples])
    width = int(lengths.max())
    input_ids = np.full((len(examples), width), pad_id, dtype=np.int64)
    mask = np.arange(width) < lengths[:, None]
    input_ids[mask] = np.concatenate([e.input_ids for e in examples])
    cu_seqlens = np.concatenate([[0], lengths.cumsum()])
    targets = np.full(int(cu_seqlens[-1]), IGNORED, dtype=np.int64)
    for example, start in zip(examples, cu_seqlens[:-1], strict=True):
        targets[start : start + len(example.labels) - 1] = example.labels[1:]
    per_sequence = {g: np.array([_num_covering(e.spans[g]) for e in examples]) for g in GRANULARITIES}
    return Batch(
        record_ids=tuple(e.record_id for e in examples),
        rejected=tuple(e.is_rejected for e in examples),
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        valid=torch.from_numpy(np.flatnonzero(mask)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        targets=torch.from_numpy(targets),
        spans={g: _ragged([e.spans[g] for e in examples], cu_seqlens) for g in GRANULARITIES},
        counts=Counts(
            tokens=int((targets != IGNORED).sum()),
            valid_tokens=len(targets),
            sequences=len(examples),
            covered={g: int((per_sequence[g] >= 1).sum()) for g in GRANULARITIES},
            comparable={g: int((per_sequence[g] >= 2).sum()) for g in GRANULARITIES},
        ),
    )


def total(counts: Iterable[Counts]) -> Counts:
    """The sum of several batches' counts."""
    every = list(counts)
    return Counts(
        tokens=sum(c.tokens for c in every),
        valid_tokens=sum(c.valid_tokens for c in every),
        sequences=sum(c.sequences for c in every),
        covered={g: sum(c.covered[g] for c in every) for g in GRANULARITIES},
        comparable={g: sum(c.comparable[g] for c in every) for g in GRANULARITIES},
    )


def _num_covering(spans: np.ndarray) -> int:
    """Spans [K, 2] that are not empty."""
    return int((np.diff(spans.reshape(-1, 2)) > 0).sum())


def _ragged(spans: Sequence[np.ndarray], cu_seqlens: np.ndarray) -> Spans:
    shifted = [ranges.astype(np.int64) + start for ranges, start in zip(spans, cu_seqlens[:-1], strict=True)]
    cu_spans = np.concatenate([[0], np.cumsum([len(ranges) for ranges in spans])])
    return Spans(torch.from_numpy(np.concatenate(shifted).reshape(-1, 2)), torch.from_numpy(cu_spans.astype(np.int64)))


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    # only from pinned memory does a copy not wait
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
