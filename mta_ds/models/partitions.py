"""Whole parameters out of ZeRO-3 partitions, for as long as somebody reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import deepspeed
from torch import Tensor, nn


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Whole parameters on every rank while the block runs, for reading, whatever the ZeRO stage."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        yield


def whole(parameter: nn.Parameter) -> Tensor:
    """A gathered parameter's value, to keep after its block has ended.

    No copy: releasing a parameter points it at nothing, and the memory that was gathered lives as long as this does.
    """
    return parameter.detach()
