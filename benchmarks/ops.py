"""Structural ops and divergence: time and memory against the published formulation, against the bare matrix products
that nothing can avoid, and against the ops' own references.

    python benchmarks/ops.py                                    # everything, some ten minutes on two cores
    python benchmarks/ops.py --cases structural --dtype bfloat16 --json rows.json
    python benchmarks/ops.py --small                            # a smoke test

Before anything is measured, value and gradients of the published formulation and of :class:`mta_ds.losses.MTALoss`
must agree. Times include forward and backward; memory is what a call needs over its inputs, gradients included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from common import (
    Measured,
    Row,
    Work,
    bounded,
    has_fast_bfloat16,
    machine_row,
    measure,
    options,
    pin_threads,
    report,
    time_ratio,
)
from inputs import GRANULARITIES, Size, make_inputs
from published import pad_spans, published_loss
from torch import Tensor

from mta_ds import ops
from mta_ds.losses import MTAConfig, MTALoss
from mta_ds.losses.mta import Reduction
from mta_ds.ops import Divergence, divergence_values, linear_divergence, reference
from mta_ds.ops.products import ROW_STEP, product

TOLERANCE = 1e-4


Gradients = tuple[Tensor, ...]


def make_published(size: Size, dtype: torch.dtype, in_fp32: bool = False) -> Work:
    """Forward and backward of the published formulation; returns loss and gradients.

    In bf16 it rounds scores and similarities as its code does, or, with ``in_fp32``, computes on the same inputs in
    fp32: that is the accuracy that ours has.
    """
    inputs = make_inputs(size, dtype)
    shape = (size.num_sequences, size.length)
    mask = torch.ones(shape, dtype=torch.bool)
    padded = {name: pad_spans(*spans, *shape) for name, spans in inputs.spans.items()}
    spans = [padded[name] for name in GRANULARITIES]

    def run() -> tuple[Tensor, Gradients]:
        student, teacher = ([x.unflatten(0, shape) for x in side] for side in (inputs.student, inputs.teacher))
        projections = inputs.projections
        if in_fp32:
            student, teacher, projections = ([x.float() for x in each] for each in (student, teacher, projections))
        loss = published_loss(student, teacher, projections, mask, spans)
        return loss.detach(), torch.autograd.grad(loss, [*inputs.student, *inputs.projections])

    return run


def make_ours(size: Size, dtype: torch.dtype, reduction: Reduction) -> Work:
    """The same of :class:`MTALoss`."""
    inputs = make_inputs(size, dtype)
    module = MTALoss(size.student_width, size.teacher_width, GRANULARITIES, MTAConfig(reduction=reduction)).to(dtype)
    for layer, projection in zip(module.projections, inputs.projections, strict=True):
        layer.weight.data = projection.detach()

    def run() -> tuple[Tensor, Gradients]:
        loss, _ = module(inputs.student, inputs.teacher, inputs.cu_seqlens, inputs.spans)
        return loss.detach(), torch.autograd.grad(loss, [*inputs.student, *module.parameters()])

    return run


def make_floor(size: Size, dtype: torch.dtype, as_ours: bool = False) -> Work:
    """The matrix products of both token weights, DSA and Hid, with their gradients' and nothing else, into outputs
    that exist. Gram matrices are whole: that half of one would do is a choice of ours, not the method's.

    All by torch.matmul, or ``as_ours``: in fp32 oneDNN multiplies tokens by W and by Wᵀ.
    """
    inputs = make_inputs(size, dtype)
    products = []
    for student, teacher, projection, name in zip(*inputs[:3], GRANULARITIES, strict=True):
        sequences = (size.num_sequences, size.length)
        student, teacher, projection = student.detach(), teacher, projection.detach()
        scored = [x.unflatten(0, sequences) for x in (student, teacher)]
        num_spans = len(inputs.spans[name].ranges) // size.num_sequences
        pooled = [x[:, :num_spans].contiguous() for x in scored]
        for x in (*scored, *pooled):
            products.append((x, x.transpose(1, 2)))
        gram = torch.randn(size.num_sequences, num_spans, num_spans).to(dtype)
        products.append((gram, pooled[0]))
        num_covered = len(reference.covered_tokens(inputs.spans[name].ranges, len(student)))
        if as_ours and num_covered > ROW_STEP:  # ours are chunks of such sizes
            num_covered -= num_covered % ROW_STEP
        hidden, target = student[:num_covered], teacher[:num_covered]
        products += [(hidden, projection.T), (target, projection), (target.T, hidden)]
    with_outputs = [(a, b, a @ b) for a, b in products]

    def run() -> None:
        for a, b, output in with_outputs:
            if as_ours and a.dim() == 2 and a.is_contiguous():
                product(a, b, lambda output=output: output)
            else:
                torch.matmul(a, b, out=output)

    return run


def check_equality(size: Size) -> Row:
    """Published and ours must be one loss: value and every gradient, in fp32."""
    value, gradients = make_published(size, torch.float32)()
    our_value, our_gradients = make_ours(size, torch.float32, "weighted_mean")()
    worst = 0.0
    for expected, got in zip((value, *gradients), (our_value, *our_gradients), strict=True):
        worst = max(worst, float((got - expected).norm() / expected.norm()))
    assert worst <= TOLERANCE, f"published formulation and ours differ by {worst:.1e} of their norm"
    return bounded("published and ours: worst relative difference of value and gradients", worst, "<=", TOLERANCE, "")


def rounding(size: Size) -> list[Row]:
    """What bf16 costs in digits: both against the same inputs in fp32, relative to value and gradients' norms."""
    value, gradients = make_published(size, torch.bfloat16, True)()
    rows = []
    for name, work in (
        ("published", make_published(size, torch.bfloat16)),
        ("ours", make_ours(size, torch.bfloat16, "weighted_mean")),
    ):
        got, found = work()
        errors = [
            float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, gradients, strict=True)
        ]
        rows += [
            Row(f"bf16 {size} {name}: error of the value", abs(float(got - value) / float(value)), ""),
            Row(f"bf16 {size} {name}: worst error of a gradient", max(errors), ""),
        ]
    return rows


def structural(dtype: torch.dtype, repeats: int, small: bool) -> list[Row]:
    """The whole structural loss of three key layers against published formulation and floor."""
    if small:
        sizes = [Size(2, 32, 24, 40, 25, 9), Size(4, 32, 24, 40, 25, 9)]
        eighth = Size(1, 32, 24, 40, 25, 9)
    else:
        sizes, eighth = [Size(16), Size(64)], Size(8)
    rows = [check_equality(sizes[0] if small else Size(4))]
    if dtype == torch.bfloat16:
        rows += rounding(sizes[0] if small else Size(4))
    bounds = {16: (2.5, 1 / 3), 64: (6.0, 1 / 6)}
    for size in sizes:
        contestants = {
            "published": (make_published, size, dtype),
            "weighted_mean": (make_ours, size, dtype, "weighted_mean"),
            "sequence_mean": (make_ours, size, dtype, "sequence_mean"),
            "floor": (make_floor, size, dtype),
        }
        if dtype == torch.float32:
            contestants["floor as ours"] = (make_floor, size, dtype, True)
        if dtype == torch.bfloat16:
            contestants["published in fp32"] = (make_published, size, dtype, True)
        if size is sizes[-1]:
            contestants["eighth"] = (make_ours, eighth, dtype, "sequence_mean")
        results = measure(contestants, repeats)
        faster, smaller = (None, None) if small else bounds[size.num_sequences]
        rows += structural_rows(f"{name_of(dtype)} {size}", results, dtype, faster, smaller)
        if size is sizes[-1]:
            rows += linearity_rows(f"{name_of(dtype)} {eighth} -> {size}", results, None if small else 8.8)
    return rows


def structural_rows(
    label: str, results: dict[str, Measured], dtype: torch.dtype, faster: float | None, smaller: float | None
) -> list[Row]:
    """Figures of one size; without bounds (None) for sizes that nothing is promised for.

    In fp32 the bare products alone bound what is possible, so there the promise is about them.
    """
    if dtype != torch.bfloat16 or not has_fast_bfloat16():
        faster, above_floor = None, faster and 1.25
    else:
        above_floor = None
    published, floor = results["published"], results["floor"]
    rows = [
        Row(f"{label} published", published.median_seconds, "s"),
        Row(f"{label} floor (bare products)", floor.median_seconds, "s"),
        Row(f"{label} published: extra memory", published.extra_bytes / 1e6, "MB"),
    ]
    for name in ("weighted_mean", "sequence_mean"):
        ours = results[name]
        memory_ratio = ours.extra_bytes / published.extra_bytes
        rows += [
            Row(f"{label} ours, {name}", ours.median_seconds, "s"),
            Row(f"{label} ours, {name}: extra memory", ours.extra_bytes / 1e6, "MB"),
            bounded(f"{label} time published / ours, {name}", time_ratio(published, ours), ">=", faster),
            bounded(f"{label} time ours, {name} / floor", time_ratio(ours, floor), "<=", above_floor),
            bounded(f"{label} extra memory ours, {name} / published", memory_ratio, "<=", smaller),
        ]
        if same := results.get("floor as ours"):
            rows.append(Row(f"{label} time ours, {name} / floor by the libraries of ours", time_ratio(ours, same), "×"))
        if exact := results.get("published in fp32"):
            ratio = time_ratio(exact, ours)
            rows.append(bounded(f"{label} time published in fp32 / ours in bf16, {name}", ratio, ">=", faster))
    return rows


def linearity_rows(label: str, results: dict[str, Measured], bound: float | None) -> list[Row]:
    """Eight times the batch must need no more than eight times as much, and 10 %."""
    whole, eighth = results["sequence_mean"], results["eighth"]
    return [
        bounded(f"{label} time of ours", time_ratio(whole, eighth), "<=", bound),
        bounded(f"{label} extra memory of ours", whole.extra_bytes / max(1, eighth.extra_bytes), "<=", bound),
    ]


def make_op(name: str, module_name: str, size: Size, dtype: torch.dtype) -> Work:
    """One op's forward and backward, from ``mta_ds.ops`` ("ours") or ``mta_ds.ops.reference``."""
    module = ops if module_name == "ours" else reference
    inputs = make_inputs(size, dtype)
    student, teacher, projection = inputs.student[0], inputs.teacher[0], inputs.projections[0]
    ranges, cu_spans = inputs.spans["word"]
    weights = reference.token_weights(teacher, inputs.cu_seqlens)
    if name == "token_weights":
        return lambda: module.token_weights(teacher, inputs.cu_seqlens)
    if name == "span_pool":
        upstream = torch.randn(len(ranges), size.student_width)
        return lambda: torch.autograd.grad(module.span_pool(student, weights, ranges), student, upstream)
    if name == "dsa":
        theirs = reference.span_pool(teacher, weights, ranges)
        ours = reference.span_pool(student.detach(), weights, ranges).requires_grad_()
        omega = reference.span_weights(weights, ranges, cu_spans)
        return lambda: torch.autograd.grad(module.dsa(ours, theirs, omega, cu_spans)[0].sum(), ours)
    assert name == "hid", name
    return lambda: torch.autograd.grad(module.hid(student, projection, teacher, weights), (student, projection))


def single_ops(dtype: torch.dtype, repeats: int, small: bool) -> list[Row]:
    """Each op alone against the reference that defines it."""
    size = Size(2, 32, 24, 40, 25, 9) if small else Size(16)
    rows = []
    for name in ("token_weights", "span_pool", "dsa", "hid"):
        both = {module: (make_op, name, module, size, dtype) for module in ("ours", "reference")}
        results = measure(both, repeats)
        label = f"{name_of(dtype)} {size} {name}"
        rows += [
            Row(f"{label}", results["ours"].median_seconds * 1e3, "ms"),
            Row(f"{label}: time ours / reference", time_ratio(results["ours"], results["reference"]), "×"),
            Row(f"{label}: extra memory", results["ours"].extra_bytes / 1e6, "MB"),
            Row(f"{label}: extra memory of the reference", results["reference"].extra_bytes / 1e6, "MB"),
        ]
    return rows


class VocabularySize(NamedTuple):
    """Sizes of a divergence case."""

    tokens: int
    width: int
    vocabulary: int


def make_divergence(way: str, name: str, size: VocabularySize, dtype: torch.dtype) -> Work:
    """Divergence from hidden states through both heads: by ours, or by "full" logits, multiplied in fp32.

    "rounded" logits are multiplied in ``dtype`` before they are made fp32: in bf16 that costs a probability percents.
    """
    torch.manual_seed(0)
    student, teacher = (torch.randn(size.tokens, size.width).to(dtype) for _ in range(2))
    heads = [torch.randn(size.vocabulary, size.width).mul_(size.width**-0.5).to(dtype) for _ in range(2)]
    targets = torch.randint(size.vocabulary, (size.tokens,))
    student.requires_grad_()
    heads[0].requires_grad_()
    divergence = Divergence(name)  # type: ignore[arg-type]

    def full() -> Tensor:
        multiplied_in = torch.float32 if way == "full" else dtype
        sides = [[x.to(multiplied_in) for x in pair] for pair in zip((student, teacher), heads, strict=True)]
        log_q = (sides[0][0] @ sides[0][1].T).float().log_softmax(-1)
        with torch.no_grad():
            log_p = (sides[1][0] @ sides[1][1].T).float().log_softmax(-1)
        return divergence_values(log_q, log_p, divergence).sum()

    def ours() -> Tensor:
        return linear_divergence(student, heads[0], teacher, heads[1], targets, divergence).loss

    return lambda: torch.autograd.grad(ours() if way == "ours" else full(), (student, heads[0]))


def divergence(dtype: torch.dtype, repeats: int, small: bool) -> list[Row]:
    """``linear_divergence`` against both models' logits held whole."""
    size = VocabularySize(64, 16, 512) if small else VocabularySize(2048, 576, 49152)
    rows = []
    for name in ("fkl", "srkl"):
        ways = ("full", "ours", "rounded") if dtype == torch.bfloat16 else ("full", "ours")
        results = measure({way: (make_divergence, way, name, size, dtype) for way in ways}, repeats)
        ours, full = results["ours"], results["full"]
        label = f"{name_of(dtype)} {size.tokens} tokens x {size.vocabulary} {name}"
        rows += [
            Row(f"{label} full logits", full.median_seconds, "s"),
            Row(f"{label} full logits: extra memory", full.extra_bytes / 1e6, "MB"),
            Row(f"{label} ours", ours.median_seconds, "s"),
            Row(f"{label} ours: extra memory", ours.extra_bytes / 1e6, "MB"),
            bounded(f"{label} time ours / full", time_ratio(ours, full), "<=", None if small else 1.1),
            *(
                Row(f"{label} time ours / logits rounded to bf16", time_ratio(ours, results[way]), "×")
                for way in ways[2:]
            ),
            bounded(
                f"{label} extra memory ours / full",
                ours.extra_bytes / max(1, full.extra_bytes),
                "<=",
                None if small else 1 / 8,
            ),
        ]
    return rows


def make_fdd(num_key_layers: int, size: VocabularySize, dtype: torch.dtype) -> Work:
    """Divergence and, before it, FDD's terms at so many key layers; its backward ends at the states and the head."""
    torch.manual_seed(0)
    states = [[torch.randn(size.tokens, size.width).to(dtype) for _ in range(num_key_layers + 1)] for _ in range(2)]
    heads = [torch.randn(size.vocabulary, size.width).mul_(size.width**-0.5).to(dtype) for _ in range(2)]
    targets = torch.randint(size.vocabulary, (size.tokens,))
    trained = [x.requires_grad_() for x in (*states[0], heads[0])]

    def run() -> Gradients:
        head_gradient = ops.HeadGradient(heads[0])
        loss = torch.zeros(())
        for layer in range(num_key_layers):
            before = (states[0][layer - 1], states[1][layer - 1]) if layer else None
            found = ops.align_trajectory(
                states[0][layer],
                states[1][layer],
                before,
                *heads,
                temperature=2.0,
                kl_factor=0.5,
                derivative_factor=0.5,
                head_gradient=head_gradient,
            )
            loss = loss + ops.attach_trajectory(states[0][layer], before and before[0], found)
        final = (states[0][-1], heads[0], states[1][-1], heads[1], targets, Divergence("fkl"))
        loss = loss + linear_divergence(*final, head_gradient=head_gradient).loss + head_gradient.attach()
        return torch.autograd.grad(loss, trained)

    return run


def fdd(dtype: torch.dtype, repeats: int, small: bool) -> list[Row]:
    """FDD at three key layers and the divergence, against the divergence alone."""
    size = VocabularySize(64, 16, 512) if small else VocabularySize(2048, 576, 49152)
    both = {"plain": (make_divergence, "ours", "fkl", size, dtype), "fdd": (make_fdd, 3, size, dtype)}
    results = measure(both, repeats)
    plain, ours = results["plain"], results["fdd"]
    label = f"{name_of(dtype)} {size.tokens} tokens x {size.vocabulary} fdd, 3 key layers"
    memory_ratio = ours.extra_bytes / max(1, plain.extra_bytes)
    return [
        Row(f"{label}: the divergence alone", plain.median_seconds, "s"),
        Row(f"{label}: the divergence alone: extra memory", plain.extra_bytes / 1e6, "MB"),
        Row(f"{label}", ours.median_seconds, "s"),
        Row(f"{label}: extra memory", ours.extra_bytes / 1e6, "MB"),
        Row(f"{label}: time / divergence alone (bare products: 6)", time_ratio(ours, plain), "×"),
        bounded(f"{label}: extra memory / divergence alone", memory_ratio, "<=", None if small else 1.15),
    ]


CASES = {"structural": structural, "single_ops": single_ops, "divergence": divergence, "fdd": fdd}


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def main() -> None:
    dtypes = ["float32", "bfloat16"] if has_fast_bfloat16() else ["float32"]
    parser = options(__doc__.partition("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=dtypes)
    parser.add_argument("--small", action="store_true", help="sizes of a smoke test: seconds, and no bounds")
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    rows = [machine_row(arguments.threads)]
    for dtype in arguments.dtype:
        for case in arguments.cases:
            rows += CASES[case](getattr(torch, dtype), arguments.repeats, arguments.small)
    report("Ops", rows, arguments.json)


if __name__ == "__main__":
    main()
