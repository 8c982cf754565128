"""MTA's losses against loops in float64, against the published formulation, and under every split of a batch."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from mta_cases import (
    CONFIGS,
    D_STUDENT,
    D_TEACHER,
    REDUCTIONS,
    Batch,
    Spans,
    assert_same,
    bounds,
    grads,
    layer_by_loops,
    layer_gradients,
    random,
    random_batch,
    split,
)

from mta_ds.config import validate
from mta_ds.errors import UsageError
from mta_ds.losses import (
    GlobalCounts,
    MTAConfig,
    MTALoss,
    attach,
    count_sequences,
    dsa_scale,
    entropy_weights,
    hid_scale,
    layer_weights,
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.reduction}-{c.student_weights}")
@pytest.mark.parametrize("seed", range(4))
def test_layer_terms_and_gradients_by_name(config, seed):
    batch = random_batch(seed, (7, 1, 4, 12, 2))
    inputs = {"student": batch.student.requires_grad_(), "projection": random(D_TEACHER, D_STUDENT, seed=8)}
    inputs["projection"].requires_grad_()
    expected = layer_by_loops(batch, inputs["projection"], config)
    terms = attach(*inputs.values(), layer_gradients(batch, inputs["projection"], config))
    for got, want in zip(terms[:3], expected, strict=True):
        torch.testing.assert_close(got, torch.as_tensor(want), rtol=1e-9, atol=1e-12)
    got = grads([terms.dsa, terms.hid], inputs)
    assert_same(got, grads([expected[0], expected[2]], inputs), rtol=1e-8, atol=1e-11)


def test_bf16_gradients_come_in_the_dtype_of_their_inputs():
    batch = random_batch(5, (7, 3, 9))
    student, teacher = batch.student.bfloat16().requires_grad_(), batch.teacher.bfloat16()
    projection = random(D_TEACHER, D_STUDENT, seed=8).float().requires_grad_()
    low = batch._replace(student=student, teacher=teacher)
    stored = layer_gradients(low, projection, MTAConfig())
    assert stored.terms.dsa.dtype == torch.float32 and stored.dsa_spans.dtype == torch.bfloat16
    assert not any(t.requires_grad for t in (*stored.terms, *stored[2:]))
    terms = attach(student, projection, stored)
    (terms.dsa + terms.hid).backward()
    assert student.grad.dtype == torch.bfloat16 and projection.grad.dtype == torch.float32
    exact = layer_gradients(
        batch._replace(student=student.double(), teacher=teacher.double()), projection.double(), MTAConfig()
    )
    torch.testing.assert_close(stored.hid_projection.double(), exact.hid_projection, rtol=1e-5, atol=1e-7)


def published(student, teacher, projection, mask, config):
    """The published formulation: one matrix over all spans of an equal-length batch with a same-sequence mask.

    ``student`` [B, n, d_S], ``teacher`` [B, n, d_T], ``mask`` [B, K, n] of span members.
    """

    def token_weights(hidden):
        scaled = hidden / (hidden.std(-1, keepdim=True) + 1e-5)
        scores = scaled @ scaled.mT / hidden.shape[-1] ** 0.5
        scores.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        return scores.softmax(-1).mean(1)

    weights, own = token_weights(teacher), token_weights(student.detach())

    def similarity(hidden, weights):
        pooled = (mask * weights[:, None]) @ hidden / (mask * weights[:, None]).sum(-1, keepdim=True)
        unit = torch.nn.functional.normalize(pooled.flatten(0, 1), dim=-1)
        return unit @ unit.T

    omega = (mask * weights[:, None]).sum(-1)
    omega = (omega / omega.sum(1, keepdim=True)).flatten()
    sequence = torch.arange(len(mask)).repeat_interleave(mask.shape[1])
    pairs = (sequence[:, None] == sequence) & ~torch.eye(len(sequence), dtype=torch.bool)
    pairs = torch.outer(omega, omega) * pairs
    dsa = (pairs * (similarity(student, own) - similarity(teacher, weights)).square()).sum() / pairs.sum()
    covered = weights * (mask.sum(1) > 0)
    covered = covered / covered.sum(1, keepdim=True)
    cosines = torch.cosine_similarity(student @ projection.T, teacher, dim=-1)
    hid = (covered * (1 - cosines)).sum() / covered.sum()
    return config.lambda_dsa * dsa + config.lambda_hid * hid


def test_weighted_mean_is_the_published_formulation():
    num_sequences, n, num_spans = 3, 10, 4
    generator = torch.Generator().manual_seed(2)
    starts = torch.randint(0, n - 3, (num_sequences, num_spans), generator=generator)
    ends = starts + torch.randint(1, 4, starts.shape, generator=generator)
    positions = torch.arange(n)
    mask = ((positions >= starts[..., None]) & (positions < ends[..., None])).double()
    student = random(num_sequences, n, D_STUDENT).requires_grad_()
    teacher = random(num_sequences, n, D_TEACHER, seed=1)
    config = MTAConfig(reduction="weighted_mean")
    loss = MTALoss(D_STUDENT, D_TEACHER, ["word"], config).double()
    inputs = {"student": student, "projection": loss.projections[0].weight}
    expected = published(student, teacher, inputs["projection"], mask, config)
    offsets = torch.arange(num_sequences)[:, None] * n
    spans = Spans((torch.stack([starts, ends], -1) + offsets[..., None]).flatten(0, 1), bounds([num_spans] * 3))
    got, _ = loss([student.flatten(0, 1)], [teacher.flatten(0, 1)], bounds([n] * 3), {"word": spans})
    torch.testing.assert_close(got, expected)
    assert_same(grads([got], inputs), grads([expected], inputs))


def counts_of(parts, micro):
    """What an all-reduce of counts gives: the whole step's, and those of the micro-step ``micro`` belongs to."""
    whole, here = ([count_sequences({"phrase": p.spans}) for p in each] for each in (parts, micro))

    def total(counts, field):
        return {"phrase": sum(getattr(c, field)["phrase"] for c in counts)}

    return GlobalCounts(
        sequences=sum(c.sequences for c in whole),
        covered=total(whole, "covered"),
        comparable=total(whole, "comparable"),
        micro_comparable=total(here, "comparable"),
    )


def distributed_loss(micro_steps, projection, config, num_layers=2):
    """One key layer's loss as ranks and accumulation steps compute it: DeepSpeed's mean of what each returns."""
    parts = [part for micro in micro_steps for part in micro]
    scale = len(parts)  # world_size · gradient_accumulation_steps
    dsa_weight, hid_weight = layer_weights(config, num_layers)
    returned = []
    for micro in micro_steps:
        counts = counts_of(parts, micro)
        stored = [layer_gradients(p, projection, config) for p in micro]
        normaliser = sum(s.terms.dsa_normaliser for s in stored)
        for part, gradients in zip(micro, stored, strict=True):
            dsa = dsa_weight * scale * dsa_scale(config, counts, "phrase", normaliser)
            hid = hid_weight * scale * hid_scale(config, counts, "phrase")
            terms = attach(part.student, projection, gradients)
            returned.append(dsa * terms.dsa + hid * terms.hid)
    return sum(returned) / scale


@pytest.mark.parametrize(
    ("reduction", "sizes"),
    [
        *((r, s) for r in ("sequence_mean", "paper") for s in ([[2], [2], [2], [2]], [[1, 3], [3, 1]], [[5, 1, 2]])),
        *(("weighted_mean", s) for s in ([[4, 4]], [[1, 7]], [[5, 1, 2]])),
    ],
    ids=str,
)
def test_the_loss_does_not_depend_on_the_split(reduction, sizes):
    config = MTAConfig(reduction=reduction)
    batch = random_batch(11, (6, 1, 9, 4, 12, 3, 5, 8))
    inputs = {"student": batch.student.requires_grad_(), "projection": random(D_TEACHER, D_STUDENT, seed=8)}
    inputs["projection"].requires_grad_()
    whole = distributed_loss([[batch]], inputs["projection"], config)
    parts = iter(split(batch, [size for micro in sizes for size in micro]))
    micro_steps = [[next(parts) for _ in micro] for micro in sizes]
    got = distributed_loss(micro_steps, inputs["projection"], config)
    torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-12)
    assert_same(grads([got], inputs), grads([whole], inputs), rtol=1e-8, atol=1e-11)


def test_weighted_mean_over_accumulation_is_near_but_not_equal():
    config = MTAConfig(reduction="weighted_mean", lambda_hid=0)
    batch, projection = random_batch(11, (6, 1, 9, 4, 12, 3, 5, 8)), random(D_TEACHER, D_STUDENT, seed=8)
    whole = distributed_loss([[batch]], projection, config)
    got = distributed_loss([[part] for part in split(batch, [4, 4])], projection, config)
    assert got != whole
    torch.testing.assert_close(got, whole, rtol=0.1, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_rank_without_spans_returns_a_zero_that_depends_on_the_parameters(reduction):
    config = MTAConfig(reduction=reduction)
    none = Spans(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    student, projection = (
        torch.ones(6, D_STUDENT, requires_grad=True),
        torch.ones(D_TEACHER, D_STUDENT).requires_grad_(),
    )
    stored = layer_gradients(Batch(student, torch.ones(6, D_TEACHER), bounds([4, 2]), none), projection, config)
    counts = count_sequences({"word": none})
    dsa = dsa_scale(config, counts, "word", stored.terms.dsa_normaliser)
    terms = attach(student, projection, stored)
    total = dsa * terms.dsa + hid_scale(config, counts, "word") * terms.hid
    assert total.item() == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(total, (student, projection)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mta_loss_combines_layers(reduction):
    config = MTAConfig(lambda_dsa=3.0, lambda_hid=0.3, reduction=reduction)
    names = ["word", "phrase", "phrase"]
    loss = MTALoss(D_STUDENT, D_TEACHER, names, config).double()
    assert list(loss.state_dict()) == [f"projections.{i}.weight" for i in range(3)]
    base = random_batch(21, (7, 4, 9))
    spans = {"word": base.spans, "phrase": random_batch(22, (7, 4, 9)).spans}
    student = [random(20, D_STUDENT, seed=30 + i).requires_grad_() for i in range(3)]
    teacher = [random(20, D_TEACHER, seed=40 + i) for i in range(3)]
    total, values = loss(student, teacher, base.cu_seqlens, spans)
    dsa_means, hid_means = [], []
    for i, name in enumerate(names):
        batch = Batch(student[i], teacher[i], base.cu_seqlens, spans[name])
        dsa, normaliser, hid = layer_by_loops(batch, loss.projections[i].weight, config)
        per_sequence = spans[name].cu_spans.diff()
        covered, comparable = int((per_sequence >= 1).sum()), int((per_sequence >= 2).sum())
        dsa_means.append(dsa / {"sequence_mean": comparable, "weighted_mean": normaliser, "paper": 3}[reduction])
        hid_means.append(hid / (3 if reduction == "paper" else covered))
        torch.testing.assert_close(values[f"dsa/{i}"], dsa_means[i].detach())
        torch.testing.assert_close(values[f"hid/{i}"], hid_means[i].detach())
    expected = 3.0 * sum(dsa_means) / 3 + 0.3 * sum(hid_means) / (1 if reduction == "paper" else 3)
    torch.testing.assert_close(total, expected)
    inputs = {f"student.{i}": s for i, s in enumerate(student)} | dict(loss.named_parameters())
    assert_same(grads([total], inputs), grads([expected], inputs))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.reduction}-{c.student_weights}")
def test_mta_loss_with_the_teachers_entropy(config):
    config = config.model_copy(update={"teacher_weights": "entropy"})
    batch = random_batch(23, (7, 1, 4))
    entropies = math.log(50) * torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sure = [1 - h / math.log(50) for h in entropies.tolist()]
    weights = [w / sum(sure[a:z]) for a, z in pairwise(batch.cu_seqlens.tolist()) for w in sure[a:z]]
    loss = MTALoss(D_STUDENT, D_TEACHER, ["word"], config).double()
    inputs = {"student": batch.student.requires_grad_()} | dict(loss.named_parameters())
    given = entropy_weights(entropies, 50, batch.cu_seqlens)
    arguments = [batch.student], [batch.teacher], batch.cu_seqlens, {"word": batch.spans}
    total, _ = loss(*arguments, teacher_weights=given)
    dsa, normaliser, hid = layer_by_loops(batch, loss.projections[0].weight, config, torch.tensor(weights).double())
    per_sequence = batch.spans.cu_spans.diff()
    covered, comparable = int((per_sequence >= 1).sum()), int((per_sequence >= 2).sum())
    dsa = dsa / {"sequence_mean": comparable, "weighted_mean": normaliser, "paper": 3}[config.reduction]
    expected = 2.0 * dsa + 0.2 * hid / (3 if config.reduction == "paper" else covered)
    assert_same(grads([total], inputs), grads([expected], inputs), rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="teacher_weights: want entropy_weights"):
        loss(*arguments)


def test_mta_loss_of_a_part_is_its_share():
    batch = random_batch(11, (6, 1, 9, 4, 12, 3, 5, 8))
    parts = split(batch, [3, 5])
    loss = MTALoss(D_STUDENT, D_TEACHER, ["phrase"]).double()

    def run(part, counts=None):
        return loss([part.student], [part.teacher], part.cu_seqlens, {"phrase": part.spans}, counts)[0]

    shares = [run(part, counts_of(parts, [part])) for part in parts]
    torch.testing.assert_close(sum(shares), run(batch))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_spans_count_for_nothing(reduction):
    """A sequence all of whose spans are empty has no covered token, and nothing to compare."""
    loss = MTALoss(D_STUDENT, D_TEACHER, ["word"], MTAConfig(reduction=reduction)).double()
    student, teacher, cu = random(11, D_STUDENT), random(11, D_TEACHER, seed=1), bounds([5, 6])
    without = Spans(torch.tensor([[5, 8], [7, 10]]), bounds([0, 2]))
    empty = Spans(torch.tensor([[1, 1], [2, 2], [5, 8], [7, 10], [9, 9]]), bounds([2, 3]))
    assert count_sequences({"word": empty}) == count_sequences({"word": without})
    one = Spans(torch.tensor([[1, 1], [2, 3], [5, 8]]), bounds([2, 1]))
    assert count_sequences({"word": one}).covered == {"word": 2}
    assert count_sequences({"word": one}).comparable == {"word": 0}
    values = [loss([student], [teacher], cu, {"word": spans}) for spans in (empty, without)]
    torch.testing.assert_close(*(value for value, _ in values))
    torch.testing.assert_close(values[0][1]["hid/0"], values[1][1]["hid/0"])


def test_finite_states_give_a_finite_loss_whatever_a_token_weighs():
    """The last token's weight is subnormal in fp32, and a span of its own."""
    hidden = torch.cat([random(6, 64) * 1e-3 + random(1, 64, seed=1) + 4, random(1, 64, seed=2) + 1.4]).float()
    spans = Spans(torch.tensor([[6, 7], [0, 2], [2, 4]]), bounds([3]))
    loss = MTALoss(64, 64, ["word"])
    student = (hidden + 0.1 * random(7, 64, seed=3).float()).requires_grad_()
    total, alarms = loss([student], [hidden], bounds([7]), {"word": spans})
    assert total.isfinite() and torch.autograd.grad(total, student)[0].isfinite().all()
    assert alarms["non_finite/student/0"] == alarms["non_finite/teacher/0"] == 0


def test_a_student_that_is_not_finite_where_nothing_covers_it_is_told():
    loss = MTALoss(D_STUDENT, D_TEACHER, ["word"], MTAConfig(student_weights="teacher")).double()
    student = random(5, D_STUDENT)
    student[4, 0] = torch.nan
    spans = Spans(torch.tensor([[0, 2], [1, 3]]), bounds([2]))
    with pytest.raises(ValueError, match="student: NaN or Inf in the hidden state of key layer 0"):
        loss([student], [random(5, D_TEACHER, seed=1)], bounds([5]), {"word": spans})


def test_wrong_arguments_are_named():
    batch = random_batch(0, (4, 4))
    loss = MTALoss(D_STUDENT, D_TEACHER, ["word"]).double()
    with pytest.raises(ValueError, match="want one for each of the 1 key layers"):
        loss([], [batch.teacher], batch.cu_seqlens, {"word": batch.spans})
    with pytest.raises(ValueError, match="spans: want those of word too"):
        loss([batch.student], [batch.teacher], batch.cu_seqlens, {"phrase": batch.spans})
    with pytest.raises(ValueError, match="teacher: must not require grad"):
        loss([batch.student], [batch.teacher.requires_grad_()], batch.cu_seqlens, {"word": batch.spans})
    with pytest.raises(ValueError, match="projection: want"):
        layer_gradients(batch._replace(teacher=batch.teacher.detach()), random(3, 3), MTAConfig())
    with pytest.raises(ValueError, match="granularities: want one for each key layer"):
        MTALoss(D_STUDENT, D_TEACHER, [])
    with pytest.raises(ValueError, match="weighted_mean divides by"):
        dsa_scale(MTAConfig(reduction="weighted_mean"), count_sequences({"word": batch.spans}), "word")


RANGES = torch.tensor([[0, 2], [1, 3], [4, 6]])


@pytest.mark.parametrize(
    ("ranges", "cu_spans", "message"),
    [
        (RANGES, torch.tensor([0, 2, 9]), "cu_spans: want bounds from 0 to 3, got 0 to 9"),
        (RANGES, torch.tensor([0, 2, -1]), "cu_spans: want bounds from 0 to 3, got 0 to -1"),
        (RANGES, torch.tensor([0, 4, 3]), "cu_spans: bounds must not fall"),
        (RANGES, torch.tensor([0.0, 2.0, 3.0]), r"cu_spans: want int64 \[B \+ 1\], got torch.float32"),
        (RANGES, torch.tensor([0, 3]), "cu_spans: want 3 bounds as cu_seqlens has, got 2"),
        (RANGES, torch.zeros(3, dtype=torch.int64, device="meta"), "cu_spans: layouts are host data"),
        (RANGES[0], torch.tensor([0, 1, 2]), r"spans: want int64 \[K, 2\], got torch.int64 \[2\]"),
        (RANGES.float(), torch.tensor([0, 2, 3]), r"spans: want int64 \[K, 2\], got torch.float32"),
        (RANGES + 3, torch.tensor([0, 2, 3]), "spans: want 0 <= start <= end <= 8 in every row"),
    ],
)
def test_spans_that_do_not_fit_are_named_before_they_are_counted(ranges, cu_spans, message):
    loss = MTALoss(D_STUDENT, D_TEACHER, ["word"]).double()
    with pytest.raises(ValueError, match=message):
        loss([random(8, D_STUDENT)], [random(8, D_TEACHER)], bounds([4, 4]), {"word": Spans(ranges, cu_spans)})


@pytest.mark.parametrize(
    "values", [{"reduction": "mean"}, {"lambda_dsa": -1}, {"num_layers": 0}, {"student_weights": 1}]
)
def test_wrong_configuration(values):
    with pytest.raises(UsageError, match=f"mta.yaml: {next(iter(values))}: "):
        validate(values, MTAConfig, where="mta.yaml")
