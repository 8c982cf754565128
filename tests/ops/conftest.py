"""Each op on every backend: Triton's kernels by its interpreter, which ``tests/conftest.py`` has chosen.

On a machine with a GPU they are compiled, and run there on copies of a test's tensors; nobody has done that yet. What
is whole on a GPU is in test_gpu.py.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from op_cases import random
from torch.utils._pytree import tree_map_only

from mta_ds.ops.backend import Backend, force

HOST_FUNCTIONS = {
    "token_weights": ("log_token_weights",),
    "segments": ("softmax_within", "sums_within"),
    "span_pool": ("pool", "pool_gradient"),
    "dsa": ("align",),
    "hid": ("distances",),
    "divergence": ("divergence_rows",),
    "trajectory": ("trajectory_rows",),
}


def on_copies(launch, device):
    """A host function on copies of its tensors on ``device``; what it writes and returns comes back."""

    def launched(*args, **options):
        if args[0].is_cuda:
            return launch(*args, **options)
        copies = {}

        def there(tensor):
            # the gradient may be asked for in the place of the logits
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if key not in copies:
                copies[key] = (tensor, tensor.to(device, copy=True))
            return copies[key][1]

        args, options = tree_map_only(torch.Tensor, there, (args, options))
        found = launch(*args, **options)
        for tensor, copy in copies.values():
            tensor.data.copy_(copy)  # behind the back of autograd, as a kernel writes
        return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), found)

    return launched


@pytest.fixture(autouse=True)
def kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """Where there is a GPU, compiled kernels see every test of an op."""
    if torch.cuda.is_available():
        for module, names in HOST_FUNCTIONS.items():
            kernels = importlib.import_module(f"mta_ds.ops.kernels.{module}")
            for name in names:
                monkeypatch.setattr(kernels, name, on_copies(getattr(kernels, name), "cuda"))


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
    with force(chosen):
        yield chosen
