"""Matrix products with fp32 results, and the dtype that ops accumulate in."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def accumulating(x: Tensor) -> Tensor:
    """``x`` in the dtype of sums: fp32, or float64 if it is in that."""
    return x if x.dtype == torch.float64 else x.float()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a · b [m, n] in fp32 (float64 stays), whatever the factors' common dtype.

    A GPU adds up half-precision factors in fp32 and gives those sums; a CPU with such instructions rounds them to the
    factors' dtype at the end; any other CPU would take over a hundred times longer than in fp32, so it gets fp32.
    """
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype == torch.bfloat16 and _cpu_multiplies_bf16():
        return torch.mm(a, b).float()
    return torch.mm(a.float(), b.float())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b, in ``total``'s dtype whatever the factors'."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(product(a, b))


@cache
def _cpu_multiplies_bf16() -> bool:
    # what the processor has, not what a measurement says: results must not change from run to run
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
