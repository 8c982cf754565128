"""Seeded inputs of the structural benchmarks: states of three key layers, words and phrases as records have them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GRANULARITIES = ("word", "phrase", "phrase")


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of a structural case; the defaults are those of the promises."""

    num_sequences: int
    length: int = 256
    student_width: int = 768
    teacher_width: int = 1600
    num_words: int = 195
    num_phrases: int = 75

    def __str__(self) -> str:
        return f"{self.num_sequences}x{self.length}"


class RaggedSpans(NamedTuple):
    """What :class:`mta_ds.losses.mta.Spans` asks for."""

    ranges: Tensor
    cu_spans: Tensor


class Inputs(NamedTuple):
    """Seeded states of three key layers."""

    student: list[Tensor]
    """[n, d_S], requiring grad."""
    teacher: list[Tensor]
    """[n, d_T]"""
    projections: list[Tensor]
    """[d_T, d_S], requiring grad."""
    cu_seqlens: Tensor
    spans: dict[str, RaggedSpans]


def make_inputs(size: Size, dtype: torch.dtype) -> Inputs:
    """Random states, and words and phrases as an instruction record has them."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = size.num_sequences * size.length

    def states(rows: int, width: int, requires_grad: bool, scale: float = 1.0) -> list[Tensor]:
        each = [torch.randn(rows, width, generator=generator).mul_(scale).to(dtype) for _ in GRANULARITIES]
        return [x.requires_grad_(requires_grad) for x in each]

    draw = random.Random(0)
    words = [word_spans(size, draw) for _ in range(size.num_sequences)]
    phrases = [phrase_spans(size, draw) for _ in range(size.num_sequences)]
    return Inputs(
        student=states(num_tokens, size.student_width, True),
        teacher=states(num_tokens, size.teacher_width, False),
        projections=states(size.teacher_width, size.student_width, True, scale=size.student_width**-0.5),
        cu_seqlens=torch.arange(0, num_tokens + 1, size.length),
        spans={"word": concatenate(words, size.length), "phrase": concatenate(phrases, size.length)},
    )


def word_spans(size: Size, draw: random.Random) -> list[tuple[int, int]]:
    """Words of one or two tokens that tile the sequence."""
    lengths = [1] * size.num_words
    for longer in draw.sample(range(size.num_words), size.length - size.num_words):
        lengths[longer] = 2
    ends = [sum(lengths[: i + 1]) for i in range(size.num_words)]
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def phrase_spans(size: Size, draw: random.Random) -> list[tuple[int, int]]:
    """Phrases of two to six tokens, some of them inside others."""
    spans: set[tuple[int, int]] = set()
    while len(spans) < size.num_phrases:
        length = draw.randint(2, 6)
        start = draw.randint(0, size.length - length)
        spans.add((start, start + length))
    return sorted(spans, key=lambda span: (span[0], -span[1]))


def concatenate(sequences: list[list[tuple[int, int]]], length: int) -> RaggedSpans:
    """Spans of every sequence, shifted to where it stands in the concatenation."""
    ranges = [(start + i * length, end + i * length) for i, spans in enumerate(sequences) for start, end in spans]
    counts = torch.tensor([0] + [len(spans) for spans in sequences])
    return RaggedSpans(torch.tensor(ranges), counts.cumsum(0))
