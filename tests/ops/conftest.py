"""Triton kernels run on CPU tensors here: its interpreter is chosen before a kernel's module is first imported."""

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
    with force(chosen):
        yield chosen
