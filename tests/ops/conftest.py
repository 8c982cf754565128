"""Each op on every backend: Triton's kernels by its interpreter, which ``tests/conftest.py`` has chosen.

On a machine with a GPU they are compiled, and run for real in test_gpu.py.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import random

from mta_ds.ops.backend import Backend, force


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch):
    """Floating memory that is not initialised holds NaN: one that is read shows in the result."""

    def poison(make):
        def made(*args, **kwargs):
            result = make(*args, **kwargs)
            return result.fill_(float("nan")) if result.is_floating_point() else result

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def crowd():
    """Seven tokens [7, 64]: six that are nearly alike, and a last one that they attend to e^-gap times as much."""

    def make(gap: float) -> torch.Tensor:
        like, other = random(2, 64, seed=64, dtype=torch.float64)
        like, other = (x - x.mean() for x in (like, other))
        other = other - (other @ like) / (like @ like) * like
        # scores are 8 <h_s, h_t> / 64: 8 (1 + 4²) among the first, 8 · 4 · mean with the last
        mean = (17 - gap / 8) / 4
        alike = like / like.std() + 4 + 1e-3 * random(6, 64, seed=3, dtype=torch.float64)
        return torch.cat([alike, (other / other.std() + mean)[None]]).float()

    return make


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest):
    """The test runs once on each backend."""
    chosen: Backend = request.param
    if chosen == "triton" and torch.cuda.is_available():
        pytest.skip("these tensors are on the CPU; with a GPU, kernels run in test_gpu.py")
    with force(chosen):
        yield chosen
