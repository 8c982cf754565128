"""What the public ops ask of their arguments. Layouts are host data, so checking them waits for no GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def check_rows(name: str, values: Tensor, num_rows: int | None = None) -> None:
    """A floating matrix of at least one feature, with ``num_rows`` rows if given.

    Raises:
        ValueError: it is not.
    """
    if values.ndim != 2 or not values.is_floating_point():
        raise ValueError(f"{name}: want a floating matrix, got {values.dtype} {list(values.shape)}")
    if values.shape[1] == 0:
        raise ValueError(f"{name}: want at least one feature, got {list(values.shape)}")
    if num_rows is not None and len(values) != num_rows:
        raise ValueError(f"{name}: want {num_rows} rows, got {len(values)}")


def check_vector(name: str, values: Tensor, length: int) -> None:
    """A floating vector of this length.

    Raises:
        ValueError: it is not.
    """
    if values.shape != (length,) or not values.is_floating_point():
        raise ValueError(f"{name}: want floating [{length}], got {values.dtype} {list(values.shape)}")


def check_together(**tensors: Tensor) -> None:
    """All on one device.

    Raises:
        ValueError: they are not.
    """
    (first, tensor), *rest = tensors.items()
    for name, other in rest:
        if other.device != tensor.device:
            raise ValueError(f"{name}: want it on {tensor.device} as {first} is, got {other.device}")


def check_dtypes(**tensors: Tensor) -> None:
    """Float64 with float64 only: everything else is summed in fp32, and a float64 beside it would promise digits that
    nothing has.

    Raises:
        ValueError: some are, some are not.
    """
    (first, tensor), *rest = tensors.items()
    for name, other in rest:
        if (other.dtype == torch.float64) != (tensor.dtype == torch.float64):
            dtypes = f"{other.dtype} beside {first}'s {tensor.dtype}"
            raise ValueError(f"{name}: float64 goes with float64 only, got {dtypes}")


def check_trained(**tensors: Tensor) -> None:
    """Gradients that are made before the loss's scale is known can be kept in this dtype.

    Raises:
        ValueError: float16, in which those of a token in a long batch are zero.
    """
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float16:
            raise ValueError(f"{name}: gradients underflow in float16; want bfloat16, float32 or float64")


def check_projection(projection: Tensor, student: Tensor, teacher: Tensor) -> None:
    """W [d_T, d_S] of these states.

    Raises:
        ValueError: it is not.
    """
    check_rows("projection", projection)
    if projection.shape != (teacher.shape[1], student.shape[1]):
        raise ValueError(f"projection: want [{teacher.shape[1]}, {student.shape[1]}], got {list(projection.shape)}")


def check_bounds(name: str, cu: Tensor, total: int | None) -> int:
    """Bounds of consecutive segments of ``total`` items: int64 [B + 1] on the CPU, from 0 to ``total``, never falling.

    Returns:
        The total.

    Raises:
        ValueError: they are not.
    """
    if cu.ndim != 1 or len(cu) == 0 or cu.dtype != torch.int64:
        raise ValueError(f"{name}: want int64 [B + 1], got {cu.dtype} {list(cu.shape)}")
    _check_host(name, cu)
    if int(cu[0]) != 0 or (total is not None and int(cu[-1]) != total):
        last = "n" if total is None else total
        raise ValueError(f"{name}: want bounds from 0 to {last}, got {int(cu[0])} to {int(cu[-1])}")
    if bool((cu.diff() < 0).any()):
        raise ValueError(f"{name}: bounds must not fall")
    return int(cu[-1])


def check_spans(spans: Tensor, num_tokens: int) -> None:
    """Half-open token ranges: int64 [K, 2] on the CPU, 0 <= start <= end <= ``num_tokens``.

    Raises:
        ValueError: they are not.
    """
    if spans.ndim != 2 or spans.shape[1] != 2 or spans.dtype != torch.int64:
        raise ValueError(f"spans: want int64 [K, 2], got {spans.dtype} {list(spans.shape)}")
    _check_host("spans", spans)
    if len(spans) and (
        bool((spans[:, 0] > spans[:, 1]).any()) or int(spans.min()) < 0 or int(spans.max()) > num_tokens
    ):
        raise ValueError(f"spans: want 0 <= start <= end <= {num_tokens} in every row")


def check_spans_within(spans: Tensor, owner: Tensor, cu_seqlens: Tensor) -> None:
    """Every span lies in the sequence, int64 [K], that owns it.

    Raises:
        ValueError: one does not.
    """
    outside = (spans[:, 0] < cu_seqlens[owner]) | (spans[:, 1] > cu_seqlens[owner + 1])
    if bool(outside.any()):
        i = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"spans: row {i} {spans[i].tolist()} is outside its sequence {int(owner[i])}, "
            f"tokens {int(cu_seqlens[owner[i]])} to {int(cu_seqlens[owner[i] + 1])}"
        )


def check_teacher(name: str, values: Tensor) -> None:
    """The teacher is never trained; a graph behind it would be kept alive for nothing. Under ``no_grad`` none would.

    Raises:
        ValueError: it requires grad.
    """
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: must not require grad; detach it")


def _check_host(name: str, values: Tensor) -> None:
    if values.device.type != "cpu":
        raise ValueError(f"{name}: layouts are host data, read without waiting for a GPU; want it on the CPU")
