"""What surrounds the ops' forwards and backwards: no autocast, and no second derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(compute: Callable[P, R]) -> Callable[P, R]:
    """A function that multiplies as it says: autocast would round the factors and the sums of its products.

    Its device is that of the first tensor among its arguments.
    """

    @functools.wraps(compute)
    def computed(*args: P.args, **options: P.kwargs) -> R:
        device = next(each.device.type for each in args if isinstance(each, Tensor))
        if not torch.is_autocast_enabled(device):
            return compute(*args, **options)
        with torch.autocast(device, enabled=False):
            return compute(*args, **options)

    return computed


def graph_is_kept() -> bool:
    """Within a backward: whether it may run again, so that what it stored must stay as it is."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # also what torch.compile asks
    return kept is None or bool(kept())


def differentiable_once(backward: Callable[..., R]) -> Callable[..., R]:
    """The backward of a Function whose stored gradients are constants: to differentiate it again raises.

    :func:`once_differentiable` raises only where what arrives from above has a graph of its own. Beside another loss
    with a second derivative, this one's would be missing without a word, so with ``create_graph`` it always has one.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *upstream: Tensor | None) -> R:
        if torch.is_grad_enabled():  # create_graph
            upstream = tuple(None if each is None else each.detach().requires_grad_() for each in upstream)
        return once(ctx, *upstream)

    return run
