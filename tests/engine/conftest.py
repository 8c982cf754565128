"""Small real engines of DeepSpeed in this process, as one rank"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def one_rank_group() -> Iterator[None]:
    """This process as a group of one rank, for as long as the session lasts."""
    from mta_ds.engine import distributed

    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        distributed.initialise()
        for name in os.environ.keys() - before.keys() - {"LOCAL_RANK"}:  # else every command that a test runs is a rank
            del os.environ[name]
        yield
        distributed.shutdown()
    os.environ.pop("LOCAL_RANK", None)


@pytest.fixture
def make_engine(one_rank_group: None) -> Callable[..., Any]:
    """An engine around a small random model, with AdamW's two groups."""

    def make(stage: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        import deepspeed

        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).to(dtype)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 3,  # one weight whole on every rank, three cut
                "reduce_bucket_size": 10_000,  # by default 2 GB an engine
            },
        }
        optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    return make
