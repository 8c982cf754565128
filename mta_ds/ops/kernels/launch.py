"""What all launches share: how products are made, block sizes, and how a kernel is described to a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl

P = ParamSpec("P")
R = TypeVar("R")


class Specialisation(NamedTuple):
    """One compiled form of a kernel."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    odd: tuple[str, ...] = ()
    """Sizes that are no multiple of 16 in this form, as GPT-2's vocabulary of 50,257."""


def on_their_device(launch: Callable[P, R]) -> Callable[P, R]:
    """A host function that launches where its tensors are: Triton takes the current device's stream, whatever theirs.

    Its first argument is one of them. On a CPU, where kernels are interpreted, nothing changes.
    """

    @functools.wraps(launch)
    def launched(*args: P.args, **options: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):
            return launch(*args, **options)

    return launched


def precision(dtype: torch.dtype) -> str:
    """How :func:`dot` multiplies: fp32 as three tensor-core products, which keeps its digits; halves as they are."""
    if dtype == torch.float32:
        return "tf32x3"
    # the interpreter (3.9) would multiply the bit patterns of bf16 as integers
    return "upcast" if triton.knobs.runtime.interpret else "ieee"


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a · b, added up in fp32."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def gram_tile(
    states, rows, row_mask, columns, column_mask, stride, num_features,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Inner products [ROWS, COLUMNS] of some rows of ``states`` with others; 0 where a mask is off."""
    features = tl.arange(0, FEATURES)
    tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, num_features, FEATURES):
        inside = first + features < num_features
        ours = tl.load(
            states + rows[:, None].to(tl.int64) * stride + (first + features)[None, :],
            mask=row_mask[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        theirs = tl.load(
            states + columns[None, :].to(tl.int64) * stride + (first + features)[:, None],
            mask=column_mask[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        tile = dot(ours, theirs, tile, PRECISION)
    return tile


def block_size(width: int, most: int) -> int:
    """The block of features a program works on at once: a power of two, 16 at least, ``most`` at most."""
    return max(16, min(most, triton.next_power_of_2(width)))
