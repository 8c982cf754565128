"""Ragged batches of odd shapes, and how an op is held to its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# around every block size, and the shortest
LENGTHS = (65, 1, 257, 2, 64, 63)
TOLERANCE = {torch.float64: (1e-10, 1e-12), torch.float32: (2e-5, 2e-6), torch.bfloat16: (1.6e-2, 1e-3)}


def bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_spans(lengths: Sequence[int], counts: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """``counts`` overlapping, nested, equal or empty spans of each sequence: ranges [K, 2] and cu_spans."""
    generator = torch.Generator().manual_seed(seed)
    rows, offset = [], 0
    for length, count in zip(lengths, counts, strict=True):
        starts = torch.randint(0, length + 1, (count,), generator=generator)
        sizes = torch.randint(0, 7, (count,), generator=generator)
        rows.append(torch.stack([starts, (starts + sizes).clamp_max(length)], dim=1) + offset)
        offset += length
    return torch.cat(rows), bounds(counts)


def assert_matches(
    fused: Callable[..., Sequence[Tensor]],
    reference: Callable[..., Sequence[Tensor]],
    inputs: dict[str, Tensor],
    trained: Sequence[str],
    tolerance: tuple[float, float] | None = None,
) -> None:
    """Values, and gradients by name under one random upstream gradient, against the reference in float64.

    The reference gets the same inputs, rounded as they are: what is compared is the arithmetic. Twice the same call
    gives the same bits.
    """
    dtype = next(iter(inputs.values())).dtype
    rtol, atol = tolerance or TOLERANCE[dtype]
    leaves = {name: value.clone().requires_grad_(name in trained) for name, value in inputs.items()}
    exact = {name: value.detach().double().requires_grad_(name in trained) for name, value in inputs.items()}
    got, again, want = fused(**leaves), fused(**leaves), reference(**exact)
    upstream = [random(*value.shape, seed=90 + i) for i, value in enumerate(want)]
    grads = [_gradients(values, upstream, source, trained) for values, source in ((got, leaves), (again, leaves))]
    expected = _gradients(want, upstream, exact, trained)
    for i, (value, twice, other) in enumerate(zip(got, again, want, strict=True)):
        _close(f"value {i}", value, other, rtol, atol)
        assert torch.equal(value, twice), f"value {i} differs from run to run"
    for name in trained:
        _close(name, grads[0][name], expected[name], rtol, atol)
        assert torch.equal(grads[0][name], grads[1][name]), f"{name} differs from run to run"
        assert grads[0][name].dtype == inputs[name].dtype


def _gradients(values, upstream, leaves, trained):
    pairs = [(value, up.to(value.dtype)) for value, up in zip(values, upstream, strict=True) if value.requires_grad]
    if not trained:
        return {}
    total = sum((value * up).sum() for value, up in pairs)
    found = torch.autograd.grad(total, [leaves[name] for name in trained], retain_graph=True)
    return dict(zip(trained, found, strict=True))


def _close(name: str, got: Tensor, want: Tensor, rtol: float, atol: float) -> None:
    scale = max(1.0, float(want.detach().abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(
        got.detach().double(), want.detach().double(), rtol=rtol, atol=atol * scale, msg=lambda text: f"{name}: {text}"
    )


class Largest(TorchDispatchMode):
    """The most elements that any result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result
