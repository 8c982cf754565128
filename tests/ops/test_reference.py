"""Every structural op against loops in float64 that follow the formulas letter by letter."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from mta_ds.ops import reference
from mta_ds.ops.reference import (
    covered_tokens,
    dsa,
    hid,
    normalise_within,
    span_pool,
    span_weights,
    token_weights,
)

LENGTHS = (6, 1, 0, 9, 3)
# by sequence: overlapping and nested spans, a single span, none, an empty one
SPANS = (((0, 3), (1, 3), (1, 6), (5, 6)), ((0, 1),), (), ((0, 9), (2, 5), (4, 4), (3, 7)), ())


def bounds(lengths):
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])


CU_SEQLENS = bounds(LENGTHS)
CU_SPANS = bounds([len(spans) for spans in SPANS])
RANGES = torch.tensor(
    [[start + o, end + o] for spans, o in zip(SPANS, CU_SEQLENS, strict=False) for start, end in spans]
)
NUM_TOKENS = sum(LENGTHS)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(output, inputs, seed=9):
    upstream = random(*output.shape, seed=seed)
    return torch.autograd.grad(output, inputs, upstream)


def cosine(a, b):
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def weights_by_loops(hidden):
    n, d = hidden.shape
    scaled = [[float(v) / (float(row.std()) + 1e-5) for v in row] for row in hidden]
    weights = [0.0] * n
    for s in range(n):
        exps = {
            t: math.exp(sum(a * b for a, b in zip(scaled[s], scaled[t], strict=True)) / d**0.5)
            for t in range(n)
            if t != s
        }
        for t, value in exps.items():
            weights[t] += value / sum(exps.values()) / n
    return weights if n > 1 else [1.0] * n


@pytest.mark.parametrize("block", [1, 20, 1 << 22])
def test_token_weights(monkeypatch, block):
    monkeypatch.setattr(reference, "_BLOCK_SCORES", block)
    hidden = random(NUM_TOKENS, 5)
    expected = [w for a, b in pairwise(CU_SEQLENS) for w in weights_by_loops(hidden[a:b])]
    torch.testing.assert_close(token_weights(hidden, CU_SEQLENS), torch.tensor(expected, dtype=torch.float64))
    # sequences never attend to each other: alone, each has the same weights
    alone = [token_weights(part, bounds([len(part)])) for part in hidden.split(LENGTHS)]
    torch.testing.assert_close(torch.cat(alone), token_weights(hidden, CU_SEQLENS))


def test_token_weights_have_no_gradient_and_are_fp32():
    weights = token_weights(random(NUM_TOKENS, 5, dtype=torch.bfloat16).requires_grad_(), CU_SEQLENS)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    torch.testing.assert_close(normalise_within(weights, CU_SEQLENS), weights)  # each sequence sums to 1


def test_span_pool_and_its_gradient():
    hidden, weights = random(NUM_TOKENS, 5).requires_grad_(), random(NUM_TOKENS, seed=1).abs()
    rows = []
    for start, end in RANGES.tolist():
        total = sum(weights[start:end], torch.zeros((), dtype=torch.float64))
        members = [weights[t] * hidden[t] for t in range(start, end)]
        rows.append(sum(members) / total if members else torch.zeros(5, dtype=torch.float64))
    expected, pooled = torch.stack(rows), span_pool(hidden, weights, RANGES)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(gradients(pooled, hidden), gradients(expected, hidden))


def test_span_weights():
    weights = random(NUM_TOKENS, seed=1).abs()
    raw = [float(weights[a:b].sum()) for a, b in RANGES.tolist()]
    expected = [raw[i] / sum(raw[a:b]) for a, b in pairwise(CU_SPANS.tolist()) for i in range(a, b)]
    torch.testing.assert_close(span_weights(weights, RANGES, CU_SPANS), torch.tensor(expected, dtype=torch.float64))


def test_covered_tokens():
    expected = sorted({t for a, b in RANGES.tolist() for t in range(a, b)})
    assert covered_tokens(RANGES, NUM_TOKENS).tolist() == expected
    assert covered_tokens(RANGES[:0], NUM_TOKENS).tolist() == []


def test_dsa_and_its_gradient():
    num_spans = len(RANGES)
    student, teacher = random(num_spans, 4).requires_grad_(), random(num_spans, 7, seed=1)
    omega = random(num_spans, seed=2).abs()
    numerators, normalisers = [], []
    for a, b in pairwise(CU_SPANS.tolist()):
        x, z = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for i in range(a, b):
            for j in range(a, b):
                if i != j:
                    gap = cosine(student[i], student[j]) - cosine(teacher[i], teacher[j])
                    x, z = x + omega[i] * omega[j] * gap**2, z + omega[i] * omega[j]
        numerators.append(x)
        normalisers.append(z)
    x, z = dsa(student, teacher, omega, CU_SPANS)
    torch.testing.assert_close(x, torch.stack(numerators))
    torch.testing.assert_close(z, torch.stack(normalisers))
    torch.testing.assert_close(gradients(x, student), gradients(torch.stack(numerators), student))


def test_dsa_keeps_its_digits_in_fp32_when_student_and_teacher_nearly_agree():
    teacher = random(40, 64)
    student, omega, cu = teacher + 1e-4 * random(40, 64, seed=1), torch.full((40,), 1 / 40).double(), bounds([40])
    exact, _ = dsa(student, teacher, omega, cu)
    single, _ = dsa(student.float(), teacher.float(), omega.float(), cu)
    torch.testing.assert_close(single.double(), exact, rtol=1e-2, atol=0)


def test_hid_and_its_gradients_by_name():
    inputs = {"student": random(8, 4).requires_grad_(), "projection": random(6, 4, seed=1).requires_grad_()}
    teacher, weights = random(8, 6, seed=2), random(8, seed=3).abs()
    student, projection = inputs.values()
    expected = sum(weights[t] * (1 - cosine(projection @ student[t], teacher[t])) for t in range(8))
    value = hid(student, projection, teacher, weights)
    torch.testing.assert_close(value, expected)
    got, want = gradients(value, (student, projection)), gradients(expected, (student, projection))
    for name, ours, theirs in zip(inputs, got, want, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_accumulated_in_fp32(dtype):
    hidden, teacher = random(NUM_TOKENS, 16, dtype=dtype), random(NUM_TOKENS, 24, seed=1, dtype=dtype)
    projection = random(24, 16, seed=2, dtype=dtype)

    def run(cast):
        ours, theirs = cast(hidden), cast(teacher)
        weights = token_weights(theirs, CU_SEQLENS)
        omega = span_weights(weights, RANGES, CU_SPANS)
        x, z = dsa(span_pool(ours, weights, RANGES), span_pool(theirs, weights, RANGES), omega, CU_SPANS)
        return torch.cat([weights, omega, x, z, hid(ours, cast(projection), theirs, weights)[None]])

    result = run(lambda tensor: tensor)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), run(torch.Tensor.double), rtol=2e-5, atol=1e-6)


def test_zero_vectors_give_zeros_not_nan():
    student = torch.zeros(3, 4, requires_grad=True)
    projection = torch.ones(5, 4, requires_grad=True)
    teacher, weights = torch.ones(3, 5), torch.full((3,), 1 / 3)
    value = hid(student, projection, teacher, weights)
    assert value.item() == pytest.approx(1.0)  # the cosine of a zero vector is 0
    assert all((g == 0).all() for g in torch.autograd.grad(value, (student, projection)))
    x, _ = dsa(student, torch.zeros(3, 5), weights, bounds([3]))
    assert x.item() == 0 and (torch.autograd.grad(x.sum(), student)[0] == 0).all()
    assert token_weights(torch.zeros(4, 5), bounds([4])).tolist() == [0.25] * 4


def test_a_span_without_weight_pools_to_zeros():
    hidden = torch.ones(4, 3, requires_grad=True)
    weights, spans = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([[0, 2], [2, 4]])
    pooled = span_pool(hidden, weights, spans)
    assert pooled.tolist() == [[0.0] * 3, [1.0] * 3]
    assert torch.autograd.grad(pooled.sum(), hidden)[0][:2].eq(0).all()
    assert span_weights(weights, spans, bounds([1, 1])).tolist() == [0.0, 1.0]


def test_spans_that_are_all_empty():
    hidden, weights = random(3, 4).requires_grad_(), torch.full((3,), 1 / 3).double()
    spans = torch.tensor([[1, 1], [3, 3]])
    pooled = span_pool(hidden, weights, spans)
    assert pooled.eq(0).all() and torch.autograd.grad(pooled.sum(), hidden)[0].eq(0).all()
    assert covered_tokens(spans, 3).tolist() == []
    assert span_weights(weights, spans, bounds([2])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("num_spans", [0, 1])
def test_a_sequence_with_fewer_than_two_spans_has_an_exact_zero(num_spans):
    student = random(num_spans, 4).requires_grad_()
    x, z = dsa(student, random(num_spans, 5), torch.ones(num_spans, dtype=torch.float64), bounds([num_spans]))
    assert x.tolist() == z.tolist() == [0.0]
    assert torch.autograd.grad(x.sum(), student)[0].eq(0).all()


def test_an_empty_batch_stays_in_the_graph():
    hidden, none, cu = (
        torch.zeros(0, 4, requires_grad=True),
        torch.zeros(0, 2, dtype=torch.int64),
        torch.zeros(1).long(),
    )
    weights = token_weights(hidden, cu)
    pooled = span_pool(hidden, weights, none)
    x, z = dsa(pooled, torch.zeros(0, 5), span_weights(weights, none, cu), cu)
    assert x.shape == z.shape == (0,)
    assert x.requires_grad
    value = hid(hidden, torch.ones(5, 4), torch.zeros(0, 5), weights)
    assert value.item() == 0 and value.requires_grad


H, W, C = torch.zeros(4, 3), torch.zeros(4), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_weights(H[0], C), "hidden: want a floating matrix"),
        (lambda: token_weights(H, C.int()), "cu_seqlens: want int64"),
        (lambda: token_weights(H, torch.tensor([0, 3])), "cu_seqlens: want bounds from 0 to 4, got 0 to 3"),
        (lambda: token_weights(H, torch.tensor([0, 5, 4])), "cu_seqlens: bounds must not fall"),
        (lambda: span_pool(H, W[:3], torch.tensor([[0, 1]])), r"weights: want floating \[4\]"),
        (lambda: span_pool(H, W, torch.tensor([[0, 5]])), "spans: want 0 <= start <= end <= 4"),
        (lambda: span_pool(H, W, torch.tensor([[2, 1]])), "spans: want 0 <= start <= end <= 4"),
        (lambda: covered_tokens(torch.tensor([0, 1]), 4), r"spans: want int64 \[K, 2\]"),
        (lambda: dsa(H, H[:3], W, C), "teacher: want 4 rows, got 3"),
        (lambda: dsa(H, H.clone().requires_grad_(), W, C), "teacher: must not require grad"),
        (lambda: hid(H, torch.zeros(5, 3), H, W), r"projection: want \[3, 3\], got \[5, 3\]"),
        (lambda: hid(H, torch.zeros(3, 3), H, W.long()), "token_weights: want floating"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
