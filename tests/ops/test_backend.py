"""Which backend is chosen."""

from __future__ import annotations

import warnings

import pytest
import torch

from mta_ds.ops import backend
from mta_ds.ops.backend import backend_of, force


def test_float64_is_always_torchs():
    with force("triton"):
        assert backend_of(torch.zeros(1)) == "triton"
        assert backend_of(torch.zeros(1, dtype=torch.float64)) == "torch"
    assert backend_of(torch.zeros(1)) == "torch"


def test_a_gpu_without_triton_is_told_of_once(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    backend._has_triton.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton is not installed"):
            assert not backend._has_triton()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not backend._has_triton()
    finally:
        backend._has_triton.cache_clear()
