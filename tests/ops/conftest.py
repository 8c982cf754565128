"""Each op on every backend: Triton's kernels by its interpreter, which ``tests/conftest.py`` has chosen.

On a machine with a GPU they are compiled, and run for real in test_gpu.py.
"""

from __future__ import annotations

import pytest
import torch

from mta_ds.ops.backend import Backend, force


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest):
    """The test runs once on each backend."""
    chosen: Backend = request.param
    if chosen == "triton" and torch.cuda.is_available():
        pytest.skip("these tensors are on the CPU; with a GPU, kernels run in test_gpu.py")
    with force(chosen):
        yield chosen
