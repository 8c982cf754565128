"""Fixtures that several parts of the suite share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton's kernels run on CPU tensors by its interpreter, which has to be chosen before anything imports Triton:
    # its own functions are made for it, or for a GPU, at that moment
    os.environ["TRITON_INTERPRET"] = "1"

from support import make_pair

# How long an example takes says how busy the machine is, not whether what is tested holds
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher and student with records and their spans; read only."""
    return make_pair(tmp_path_factory.mktemp("pair"))
