"""One buffer for a head's gradient: collected in forwards, handed out once."""

from __future__ import annotations

import pytest
import torch

from mta_ds.ops import HeadGradient


def make_head(dtype=torch.float32):
    return torch.zeros(3, 2, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_is_added_arrives_scaled_in_the_dtype_of_the_head(dtype):
    head = make_head(dtype)
    collected = HeadGradient(head)
    zero = collected.attach()
    for value in (1.0, 2.0):  # also after it was attached
        collected.buffer(head).add_(value)
    assert zero.item() == 0 and collected.buffer(head).dtype == (dtype if dtype == torch.float64 else torch.float32)
    (2.5 * zero).backward()
    assert torch.equal(head.grad, torch.full_like(head, 7.5))


def test_the_buffer_becomes_the_gradient_without_a_copy():
    head = make_head()
    collected = HeadGradient(head)
    address = collected.buffer(head).data_ptr()
    collected.attach().backward()
    assert head.grad.data_ptr() == address


def test_nothing_collected_is_a_zero_that_depends_on_the_head():
    head = make_head()
    HeadGradient(head).attach().backward()
    assert torch.equal(head.grad, torch.zeros_like(head))


def test_a_frozen_head_and_an_evaluation_collect_nothing():
    head = make_head()
    with torch.no_grad():
        evaluation = HeadGradient(head)
    for collected in (evaluation, HeadGradient(head.detach())):
        assert collected.buffer(head) is None and not collected.attach().requires_grad


def test_it_is_handed_out_once():
    head = make_head()
    collected = HeadGradient(head)
    zero = collected.attach()
    zero.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran already"):
        zero.backward()


@pytest.mark.parametrize(
    "other", [torch.zeros(4, 2), torch.zeros(3, 2).double(), torch.zeros(3, 2, device="meta")], ids=str
)
def test_another_head_is_refused(other):
    with pytest.raises(ValueError, match=r"head_gradient: is of a head torch.float32 \[3, 2\] on cpu, got"):
        HeadGradient(make_head()).buffer(other)
