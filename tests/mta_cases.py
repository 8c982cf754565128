"""Batches of MTA's losses, and the losses by loops in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mta_ds.losses import MTAConfig, SpanLayout, align_layer

D_STUDENT, D_TEACHER = 5, 7
REDUCTIONS = ["sequence_mean", "weighted_mean", "paper"]
CONFIGS = [MTAConfig(reduction=r, student_weights=w) for r in REDUCTIONS for w in ("own", "teacher")]


class Spans(NamedTuple):
    ranges: Tensor
    cu_spans: Tensor


class Batch(NamedTuple):
    student: Tensor
    teacher: Tensor
    cu_seqlens: Tensor
    spans: Spans


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_batch(seed, lengths, most_spans=5):
    """Overlapping spans at random; some sequences have one or none."""
    generator = torch.Generator().manual_seed(seed)

    def integer(below):
        return int(torch.randint(0, below, (), generator=generator))

    ranges, counts, offset = [], [], 0
    for length in lengths:
        chosen = set()
        for _ in range(integer(most_spans + 1)):
            start = integer(length)
            chosen.add((offset + start, offset + start + 1 + integer(length - start)))
        ranges += sorted(chosen)
        counts.append(len(chosen))
        offset += length
    spans = Spans(torch.tensor(ranges, dtype=torch.int64).reshape(-1, 2), bounds(counts))
    return Batch(random(offset, D_STUDENT, seed=seed), random(offset, D_TEACHER, seed=seed + 1), bounds(lengths), spans)


def split(batch, sizes):
    """The same sequences as several batches."""
    parts, first = [], 0
    for size in sizes:
        cu, cu_spans = (b[first : first + size + 1] for b in (batch.cu_seqlens, batch.spans.cu_spans))
        tokens, spans = slice(int(cu[0]), int(cu[-1])), slice(int(cu_spans[0]), int(cu_spans[-1]))
        part = Spans(batch.spans.ranges[spans] - cu[0], cu_spans - cu_spans[0])
        parts.append(Batch(batch.student[tokens], batch.teacher[tokens], cu - cu[0], part))
        first += size
    return parts


def cosine(a, b):
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def weights_by_loops(hidden):
    """Eqs. 5-7 for one sequence."""
    n, d = hidden.shape
    if n == 1:
        return [1.0]
    scaled = hidden / (hidden.std(dim=1, keepdim=True) + 1e-5)
    weights = [0.0] * n
    for s in range(n):
        exps = {t: float(((scaled[s] @ scaled[t]) / d**0.5).exp()) for t in range(n) if t != s}
        for t, value in exps.items():
            weights[t] += value / sum(exps.values()) / n
    return weights


def layer_by_loops(batch, projection, config, given=None):
    """(L_DSA numerator, Σ Z, L_Hid numerator) of the batch, sequence by sequence, span pair by span pair."""
    dsa = hid = normaliser = 0.0 * batch.student.sum()
    for b, (first, last) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        ours, theirs = batch.student[first:last], batch.teacher[first:last]
        teacher_weights = weights_by_loops(theirs) if given is None else given[first:last].tolist()
        own = teacher_weights if config.student_weights == "teacher" else weights_by_loops(ours.detach())
        spans = (batch.spans.ranges[batch.spans.cu_spans[b] : batch.spans.cu_spans[b + 1]] - first).tolist()

        def pool(hidden, weights, spans=spans):
            return [sum(weights[t] * hidden[t] for t in range(a, z)) / sum(weights[a:z]) for a, z in spans]

        raw = [sum(teacher_weights[a:z]) for a, z in spans]
        omega = [w / sum(raw) for w in raw]
        student_spans, teacher_spans = pool(ours, own), pool(theirs, teacher_weights)
        pairs = [(i, j) for i in range(len(spans)) for j in range(len(spans)) if i != j]
        x = sum(
            omega[i] * omega[j]
            * (cosine(student_spans[i], student_spans[j]) - cosine(teacher_spans[i], teacher_spans[j])) ** 2
            for i, j in pairs
        )  # fmt: skip
        z = sum(omega[i] * omega[j] for i, j in pairs)
        normaliser = normaliser + z
        if pairs:
            dsa = dsa + (x / z if config.reduction == "sequence_mean" else x)
        covered = sorted({t for a, e in spans for t in range(a, e)})
        total = 1.0 if config.reduction == "paper" else sum(teacher_weights[t] for t in covered)
        for t in covered:
            hid = hid + teacher_weights[t] / total * (1 - cosine(projection @ ours[t], theirs[t]))
    return dsa, normaliser, hid


def layout(batch):
    return SpanLayout(batch.cu_seqlens, batch.spans.ranges, batch.spans.cu_spans)


def layer_gradients(batch, projection, config):
    return align_layer(
        batch.student, batch.teacher, projection, layout(batch), config.reduction, config.student_weights
    )


def grads(outputs, inputs, seed=3):
    """Gradients of the outputs under a random upstream gradient."""
    upstream = random(len(outputs), seed=seed)
    total = sum(u * output for u, output in zip(upstream, outputs, strict=True))
    return dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True))


def assert_same(got, want, **tolerance):
    for name in want:
        torch.testing.assert_close(got[name], want[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
