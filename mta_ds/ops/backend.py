"""Which implementation runs an op: Triton on a GPU that has it, torch everywhere else; decided in this one place.

Float64 is always torch's: kernels sum in fp32.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton"]

_forced: Backend | None = None


def backend_of(tensor: Tensor) -> Backend:
    """The backend of the ops whose sums have the dtype of ``tensor``'s, where it lives."""
    if tensor.dtype == torch.float64:
        return "torch"
    if _forced is not None:
        return _forced
    return "triton" if tensor.is_cuda and _has_triton() else "torch"


@contextmanager
def force(backend: Backend) -> Iterator[None]:
    """Run the block's ops on this backend: tests hold both to the reference, Triton on a CPU by its interpreter."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:  # once: it is cached
        warnings.warn("Triton is not installed: the structural ops and losses are slower on this GPU", stacklevel=3)
    return found
