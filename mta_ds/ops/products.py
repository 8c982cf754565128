"""Matrix products with fp32 results, and the dtype that ops accumulate in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mta_ds.ops.layout import row_blocks

# Rows of a Gram matrix at once: fewer are slower by more than symmetry saves.
_STRIP_ROWS = 64
# Rows of a product come in multiples of it where they can: oneDNN compiles one for each number of rows, and keeps it.
ROW_STEP = 64


def total_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of ``dtype``: fp32, or float64 of float64."""
    return dtype if dtype == torch.float64 else torch.float32


def accumulating(x: Tensor) -> Tensor:
    """``x`` in the dtype of its sums."""
    return x.to(total_dtype(x.dtype))


def product(a: Tensor, b: Tensor, buffer: Callable[[], Tensor | None] = lambda: None) -> Tensor:
    """a · b [m, n] in fp32 (float64 stays), whatever the factors' common dtype.

    A GPU adds up half-precision factors in fp32 and gives those sums; a CPU with such instructions rounds them to the
    factors' dtype at the end; any other CPU would take over a hundred times longer than in fp32, so it gets fp32.

    Args:
        buffer: makes fp32 [m, n] for the result to lie in, where that saves a CPU fresh memory, which costs as much as
            a tenth of a product.
    """
    if (multiply := _onednn(a)) is not None:
        return multiply(a, b)
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=buffer())
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    room = buffer()
    result = torch.mm(a, b) if _is_native(a) else torch.mm(a.float(), b.float(), out=room)
    return result.float() if room is None or result is room else room.copy_(result)


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a · b, added up in fp32 and rounded once, all in one dtype."""
    if (multiply := _onednn(a)) is not None:
        out.copy_(multiply(a, b))
    elif _is_native(a):
        torch.mm(a, b, out=out)
    else:
        out.copy_(product(a, b))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b, in ``total``'s dtype whatever the factors'; on a GPU no second matrix of its size exists."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b) if _is_native(a) else product(a, b))


def gram(x: Tensor) -> Tensor:
    """x xᵀ [c, n, n] of each [n, d] of a batch; symmetric, so each strip of rows is multiplied from its diagonal on."""
    length = x.shape[1]
    num_strips = length // _STRIP_ROWS
    if num_strips < 2:
        return torch.bmm(x, x.mT)
    whole = x.new_empty(len(x), length, length)
    for rows in row_blocks(length, -(-length // num_strips)):
        whole[:, rows, rows.start :] = torch.bmm(x[:, rows], x[:, rows.start :].mT)
        whole[:, rows.stop :, rows] = whole[:, rows, rows.stop :].mT
    return whole


def _onednn(a: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What multiplies ``a`` by another matrix faster than torch.mm: oneDNN in fp32, where that goes to MKL.

    MKL is the slower of both, by a fifth where the result is wide (on an AMD CPU; Intel's were not tried). Only numbers
    of rows that come again are compiled for, see :data:`ROW_STEP`.
    """
    if a.dtype != torch.float32 or a.is_cuda or not len(a) or len(a) % ROW_STEP or not torch.backends.mkldnn.enabled:
        return None
    return _fp32_by_onednn()


@cache
def _fp32_by_onednn() -> Callable[[Tensor, Tensor], Tensor] | None:
    """a · b through oneDNN's linear layer, which torch's own compiler calls; None where torch has none, or no MKL."""
    if not all(library.is_available() for library in (torch.backends.mkl, torch.backends.mkldnn)):
        return None
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return linear and (lambda a, b: linear(a, b.T, None, "none", [], ""))


def _is_native(x: Tensor) -> bool:
    """Whether a plain product of this dtype is added up in fp32, and at full rate.

    A GPU's in half precision may be made of partial sums that are rounded to it.
    """
    if x.dtype == torch.bfloat16:
        return not x.is_cuda and has_fast_bfloat16()
    return x.dtype in (torch.float32, torch.float64)


@cache
def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware; without, torch is over 100 times slower than in fp32."""
    # what the processor has, not what a measurement says: results must not change from run to run
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
