"""Triton kernels run on CPU tensors here, by its interpreter, chosen before a kernel's module is first imported.

On a machine with a GPU they are compiled, and run for real in test_gpu.py.
"""

from __future__ import annotations

import os

import pytest
import torch

from mta_ds.ops.backend import Backend, force

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest):
    """The test runs once on each backend."""
    chosen: Backend = request.param
    if chosen == "triton" and torch.cuda.is_available():
        pytest.skip("these tensors are on the CPU; with a GPU, kernels run in test_gpu.py")
    with force(chosen):
        yield chosen
