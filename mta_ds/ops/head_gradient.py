"""One gradient of the student's head for all ops of a micro-step that go through it.

Each op would hand out a matrix of the head's size, in fp32, and autograd would add them up: at 50k × 4k that is 800 MB
for every key layer. Here all ops add to one buffer in their forwards, and one node of the graph hands it out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mta_ds.ops.autograd import differentiable_once
from mta_ds.ops.products import total_dtype


class HeadGradient:
    """The buffer, made at its first use.

    What the ops add is their loss's gradient already, by their own factors: every op's loss must enter the total with
    coefficient 1. Whatever multiplies that total (a loss scale) arrives at :meth:`attach`'s node.
    """

    def __init__(self, head: Tensor) -> None:
        """``head`` [V, d]; nothing is collected if it needs no gradient, or under no_grad."""
        self._head = head
        self._is_collected = head.requires_grad and torch.is_grad_enabled()
        self._buffer: Tensor | None = None
        self._ran = False

    def buffer(self, head: Tensor) -> Tensor | None:
        """[V, d] in fp32 (float64 stays) for an op to add to; None where nothing is collected.

        Raises:
            ValueError: ``head`` is not like the head whose gradient this is.
        """
        ours = self._head
        if head.shape != ours.shape or head.device != ours.device or head.dtype != ours.dtype:
            found = f"{head.dtype} {list(head.shape)} on {head.device}"
            raise ValueError(
                f"head_gradient: is of a head {ours.dtype} {list(ours.shape)} on {ours.device}, got {found}"
            )
        if not self._is_collected:
            return None
        assert not self._ran, "head_gradient: an op after backward; one micro-step, one HeadGradient"
        if self._buffer is None:
            self._buffer = torch.zeros_like(head, dtype=total_dtype(head.dtype))
        return self._buffer

    def attach(self) -> Tensor:
        """A zero to add to the loss: its backward gives the head what was collected, once."""
        if not self._is_collected:
            return self._head.new_zeros((), dtype=total_dtype(self._head.dtype))
        return _Attach.apply(self._head, self)  # type: ignore[no-untyped-call,no-any-return]

    def take(self) -> Tensor:
        """What was collected, for good: it can be gigabytes, so that it is given away and not copied.

        Raises:
            RuntimeError: it was taken before.
        """
        if self._ran:
            raise RuntimeError("head_gradient: backward ran already; its gradient exists once, run the ops again")
        collected, self._buffer, self._ran = self._buffer, None, True
        return torch.zeros_like(self._head) if collected is None else collected


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Tensor, collected: HeadGradient) -> Tensor:
        ctx.collected, ctx.dtype = collected, head.dtype
        return head.new_zeros((), dtype=total_dtype(head.dtype))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        gradient = ctx.collected.take()
        return gradient.mul_(upstream.to(gradient.dtype)).to(ctx.dtype), None
