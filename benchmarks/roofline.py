"""Roofline of the structural ops and the divergence on GPUs: computed from shapes, not measured.

    python benchmarks/roofline.py [--json rows.json]

For every op: what it multiplies (FLOPs), what it must move to and from main memory (bytes), and the time below which a
GPU cannot go, the longer of both at its peak rates. Beside it the teacher's forward. Bytes count a hidden state once
for each pass over it that the op makes, though most second reads come from cache; DSA multiplies fp32 states,
three tensor-core products each.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from common import Row, bounded, report

from mta_ds.ops.heads import chunk_shape

NUM_SEQUENCES, LENGTH = 8, 2048
NUM_TOKENS = NUM_SEQUENCES * LENGTH
KEY_LAYERS = 5  # one of words, four of phrases
# spans of a sequence, in the proportion of instruction data: 195 words and 75 phrases to 256 tokens
SPANS = {"word": LENGTH * 195 // 256, "phrase": LENGTH * 75 // 256}
BF16, FP32 = 2, 4


class GPU(NamedTuple):
    """Peak rates of the data sheet, dense."""

    name: str
    half: float
    """FLOP/s in bf16."""
    single: float
    """FLOP/s in fp32 as three TF32 products."""
    bandwidth: float
    """Bytes/s of main memory."""


class Pair(NamedTuple):
    """Teacher and student."""

    name: str
    teacher_parameters: float
    teacher_layers: int
    teacher_width: int
    student_width: int
    vocabulary: int


class Cost(NamedTuple):
    """Of one op over a micro-batch of one rank, all its key layers."""

    op: str
    half: float
    """FLOPs in bf16 with fp32 sums."""
    single: float
    """FLOPs in fp32."""
    moved: float
    """Bytes."""

    def seconds(self, gpu: GPU) -> float:
        """The time that the GPU cannot go below."""
        return max(self.half / gpu.half + self.single / gpu.single, self.moved / gpu.bandwidth)

    def bound(self, gpu: GPU) -> str:
        """What keeps it there."""
        return "memory" if self.moved / gpu.bandwidth > self.half / gpu.half + self.single / gpu.single else "compute"


GPUS = (GPU("A100 80 GB", 312e12, 156e12 / 3, 2.04e12), GPU("H100 SXM", 989e12, 494e12 / 3, 3.35e12))
PAIRS = (
    Pair("GPT-2 1.5B → 120M", 1.5e9, 48, 1600, 768, 50_257),
    Pair("8B → 1B", 8.0e9, 32, 4096, 2048, 128_256),
    Pair("70B → 8B", 70.6e9, 80, 8192, 4096, 128_256),
)


def structural_costs(pair: Pair) -> Iterator[Cost]:
    """The ops of the key layers; every token of a sequence is covered, which is the most that can be."""
    both = pair.teacher_width + pair.student_width
    # row scales, row sums, column sums: three passes; the scores twice
    scores = 2 * 2 * NUM_SEQUENCES * LENGTH**2 * both
    yield Cost("token_weights", KEY_LAYERS * scores, 0, KEY_LAYERS * 3 * NUM_TOKENS * both * BF16)
    num_spans = [SPANS["word"]] + [SPANS["phrase"]] * (KEY_LAYERS - 1)
    # both sides read their tokens and write fp32 spans; backward reads the student's and writes its covered tokens
    pooled = sum(NUM_SEQUENCES * k * (both + pair.student_width) * FP32 for k in num_spans)
    states = KEY_LAYERS * NUM_TOKENS * (both + pair.student_width) * BF16
    yield Cost("span_pool", 0, 2 * KEY_LAYERS * NUM_TOKENS * (both + pair.student_width), states + pooled)
    # both Grams and the gradient's product; the gradient is added up in main memory, once a tile of 64 columns
    grams = sum(2 * NUM_SEQUENCES * k**2 * (both + pair.student_width) for k in num_spans)
    tiles = sum(NUM_SEQUENCES * k * (both + 2 * (k / 64) * pair.student_width) * FP32 for k in num_spans)
    yield Cost("dsa", 0, grams, tiles)
    weights = pair.teacher_width * pair.student_width
    # projected up; its gradient back down and to the projection. The projected chunk is written and read in fp32 and
    # its gradient in bf16, twice; the projection's gradient is added to in fp32 once a chunk of 4,096 tokens
    products = 3 * 2 * NUM_TOKENS * weights
    moved = NUM_TOKENS * (3 * pair.student_width * BF16 + pair.teacher_width * (2 * BF16 + 3 * FP32 + 3 * BF16))
    moved += NUM_TOKENS / 4096 * weights * (2 * BF16 + 2 * FP32)
    yield Cost("hid", KEY_LAYERS * products, 0, KEY_LAYERS * moved)


def divergence_cost(pair: Pair) -> Cost:
    """Both heads over the whole vocabulary, and the student's two gradients; logits of a chunk are moved in fp32."""
    forward = 2 * NUM_TOKENS * pair.vocabulary * (pair.teacher_width + pair.student_width)
    backward = 4 * NUM_TOKENS * pair.vocabulary * pair.student_width
    # both logits written and read twice, the gradient written and read twice
    logits = NUM_TOKENS * pair.vocabulary * (2 * 3 * FP32 + 3 * BF16)
    # with each chunk of tokens the teacher's head is read once, the student's twice, and its gradient added to in fp32
    chunks = -(-NUM_TOKENS // chunk_shape(pair.vocabulary, torch.bfloat16, is_cuda=True)[0])
    each = (pair.teacher_width + 2 * pair.student_width) * BF16 + 2 * pair.student_width * FP32
    heads = chunks * pair.vocabulary * each
    return Cost("linear_divergence", forward + backward, 0, logits + heads)


def teacher_cost(pair: Pair) -> Cost:
    """The forward: two FLOPs a parameter and token, and causal attention; every parameter is read once."""
    body = 2 * pair.teacher_parameters * NUM_TOKENS
    attention = 2 * NUM_SEQUENCES * LENGTH**2 * pair.teacher_width * pair.teacher_layers
    return Cost("teacher's forward", body + attention, 0, pair.teacher_parameters * BF16)


def rows_of(pair: Pair) -> Iterator[Row]:
    """The table of one pair on both GPUs."""
    teacher, structural = teacher_cost(pair), list(structural_costs(pair))
    for cost in (*structural, divergence_cost(pair), teacher):
        flops = cost.half + cost.single
        times = "; ".join(f"{gpu.name} ≥ {cost.seconds(gpu) * 1e3:.3g} ms ({cost.bound(gpu)})" for gpu in GPUS)
        share = f"{flops / (teacher.half + teacher.single):.2%} of the teacher's FLOPs"
        yield Row(f"{pair.name} {cost.op}", f"{flops / 1e12:.3g} TFLOP, {cost.moved / 1e9:.3g} GB, {times}; {share}")
    share = sum(cost.half + cost.single for cost in structural) / (teacher.half + teacher.single)
    is_promised = pair.name == "70B → 8B"
    label = f"{pair.name} structural ops / teacher's forward"
    yield bounded(f"{label}, FLOPs", 100 * share, "<=", 2.0 if is_promised else None, "%")
    for gpu in GPUS:
        share = sum(cost.seconds(gpu) for cost in structural) / teacher.seconds(gpu)
        yield Row(f"{label}, time at the roofline, {gpu.name}", 100 * share, "%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    spans = f"{SPANS['word']} words and {SPANS['phrase']} phrases a sequence"
    shape = f"{NUM_SEQUENCES}x{LENGTH} tokens a rank, {KEY_LAYERS} key layers, bf16, {spans}"
    rows = [Row("computed, not measured", shape)]
    for pair in PAIRS:
        rows += rows_of(pair)
    report("Roofline, computed from shapes and data sheets", rows, options.json)


if __name__ == "__main__":
    main()
