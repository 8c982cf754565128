"""What tests do with the engines of tests/engine/conftest.py."""

from __future__ import annotations

from typing import Any

import torch


def train_step(engine: Any, seed: int, factor: float = 1.0) -> torch.Tensor:
    """One update on random data; returns the loss."""
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).to(next(engine.module.parameters()).dtype)
    loss = engine(inputs).float().square().mean()
    engine.backward(loss * factor)
    engine.step()
    return loss.detach()


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of the whole weights by name."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: value.detach().clone() for name, value in engine.module.named_parameters()}
