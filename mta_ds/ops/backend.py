"""Which implementation runs an op: Triton on a GPU that has it, torch everywhere else; decided in this one place."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

from torch import Tensor

Backend = Literal["torch", "triton"]

_forced: Backend | None = None


def backend_of(tensor: Tensor) -> Backend:
    """The backend of the ops whose tensors live where ``tensor`` does."""
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
    return importlib.util.find_spec("triton") is not None
