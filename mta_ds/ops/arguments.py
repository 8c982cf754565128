"""What the public ops ask of their arguments. Contents are read only on the CPU: a GPU would be waited for."""

from __future__ import annotations

import torch
from torch import Tensor


def check_rows(name: str, values: Tensor, num_rows: int | None = None) -> None:
    """A floating matrix, with ``num_rows`` rows if given.

    Raises:
        ValueError: it is not.
    """
    if values.ndim != 2 or not values.is_floating_point():
        raise ValueError(f"{name}: want a floating matrix, got {values.dtype} {list(values.shape)}")
    if num_rows is not None and len(values) != num_rows:
        raise ValueError(f"{name}: want {num_rows} rows, got {len(values)}")


def check_vector(name: str, values: Tensor, length: int) -> None:
    """A floating vector of this length.

    Raises:
        ValueError: it is not.
    """
    if values.shape != (length,) or not values.is_floating_point():
        raise ValueError(f"{name}: want floating [{length}], got {values.dtype} {list(values.shape)}")


def check_bounds(name: str, cu: Tensor, total: int) -> None:
    """Bounds of consecutive segments of ``total`` items: int64 [B + 1], from 0 to ``total``, never falling.

    Raises:
        ValueError: they are not.
    """
    if cu.ndim != 1 or len(cu) == 0 or cu.dtype != torch.int64:
        raise ValueError(f"{name}: want int64 [B + 1], got {cu.dtype} {list(cu.shape)}")
    if cu.device.type != "cpu":
        return
    if int(cu[0]) != 0 or int(cu[-1]) != total:
        raise ValueError(f"{name}: want bounds from 0 to {total}, got {int(cu[0])} to {int(cu[-1])}")
    if bool((cu.diff() < 0).any()):
        raise ValueError(f"{name}: bounds must not fall")


def check_spans(spans: Tensor, num_tokens: int) -> None:
    """Half-open token ranges: int64 [K, 2], 0 <= start <= end <= ``num_tokens``.

    Raises:
        ValueError: they are not.
    """
    if spans.ndim != 2 or spans.shape[1] != 2 or spans.dtype != torch.int64:
        raise ValueError(f"spans: want int64 [K, 2], got {spans.dtype} {list(spans.shape)}")
    if spans.device.type != "cpu" or len(spans) == 0:
        return
    if bool((spans[:, 0] > spans[:, 1]).any()) or int(spans.min()) < 0 or int(spans.max()) > num_tokens:
        raise ValueError(f"spans: want 0 <= start <= end <= {num_tokens} in every row")


def check_teacher(name: str, values: Tensor) -> None:
    """The teacher is never trained; a graph behind it would be kept alive for nothing.

    Raises:
        ValueError: it requires grad.
    """
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: must not require grad; detach it")
