"""The structural ops on a GPU: compiled kernels against the reference, and nobody waits for them."""

from __future__ import annotations

import pytest
import torch
from op_cases import TOLERANCE, bounds, random, random_spans

from mta_ds.ops import SpanLayout, align_layer, attach, reference

LENGTHS, COUNTS = (257, 1, 700, 2, 64, 63), (150, 1, 400, 0, 30, 2)


DEVICES = [
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: kernels run by the interpreter"),
    ),
    "cpu",  # so that this file is checked where there is none
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(768, 1600), (100, 36)], ids=str)
def test_a_key_layer_equals_the_reference_and_is_not_waited_for(device, dtype, widths):
    d_student, d_teacher = widths
    cu_seqlens = bounds(LENGTHS)
    layout = SpanLayout(cu_seqlens, *random_spans(LENGTHS, COUNTS))
    inputs = {
        "student": random(sum(LENGTHS), d_student, dtype=dtype),
        "projection": random(d_teacher, d_student, seed=2, dtype=dtype) * d_student**-0.5,
    }
    teacher = random(sum(LENGTHS), d_teacher, seed=1, dtype=dtype)
    leaves = {name: value.to(device, copy=True).requires_grad_() for name, value in inputs.items()}
    beside = teacher.to(device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        terms = attach(*leaves.values(), align_layer(leaves["student"], beside, leaves["projection"], layout))
        (2.0 * terms.dsa + 0.2 * terms.hid).backward()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    exact = {name: value.double().requires_grad_() for name, value in inputs.items()}
    layout_tensors = layout.cu_seqlens, layout.members.spans, layout.cu_spans
    dsa, _, hid = reference.align_layer(exact["student"], teacher.double(), exact["projection"], *layout_tensors)
    (2.0 * dsa + 0.2 * hid).backward()
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(terms.dsa.cpu().double(), dsa.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(terms.hid.cpu().double(), hid.detach(), rtol=rtol, atol=atol)
    for name, leaf in leaves.items():
        expected = exact[name].grad
        scale = float(expected.abs().max())
        close = {"rtol": rtol, "atol": 4 * atol * scale}  # two gradients, each rounded
        torch.testing.assert_close(
            leaf.grad.cpu().double(), expected, **close, msg=lambda text, name=name: f"{name}: {text}"
        )
