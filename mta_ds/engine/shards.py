"""This rank's shard of what is trained: fp32 weights and Adam's moments, in whatever way ZeRO has cut them.

A shard is made of pieces, each a run of one flattened parameter. ZeRO-3 cuts every parameter into one run a rank;
ZeRO-1 and 2 lay a group's parameters end to end and cut that. Files that name parameters and runs instead of ranks and
groups are read by any number of ranks under any stage, each rank what it needs and no more.

DeepSpeed's own checkpoints fit their own world size only, and their conversion to "universal" ones writes everything
twice more and loses the groups' hyper-parameters; so the few of its attributes that are read here are the lesser evil.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mta_ds.errors import UserError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """A run of a flattened parameter and of its moments."""

    start: int
    """Its first element's place in the flattened parameter."""
    size: int
    """Elements of the whole parameter."""
    values: dict[str, Tensor]
    """fp32 [n] by kind, ``weight`` and MOMENTS: where the optimizer itself keeps them. Moments exist after a step."""


class Shard(NamedTuple):
    """All pieces of a rank, by the parameter's name in the engine's module."""

    pieces: dict[str, Piece]
    steps: int
    """Updates that Adam has made, for its bias correction."""

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return sum(value.nbytes for piece in self.pieces.values() for value in piece.values.values())


def own_shard(engine: Any) -> Shard:
    """The shard of this rank, not copied.

    Raises:
        UserError: the optimizer's state is on NVMe, which nothing here reads.
    """
    zero, optimizer = engine.optimizer, engine.optimizer.optimizer
    if getattr(zero, "swap_optimizer", False):
        raise UserError(
            "student: its optimizer is offloaded to NVMe, which no checkpoint can hold; offload it to cpu",
            on_every_rank=True,
        )
    pieces = {name: _piece(engine, parameter) for name, parameter in _trained(engine)}
    states = [optimizer.state[flat] for flat in _flat_weights(engine) if flat in optimizer.state]
    steps = {int(state["step"]) for state in states}
    assert len(steps) <= 1, f"groups have made {sorted(steps)} steps"
    return Shard({name: piece for name, piece in pieces.items() if piece is not None}, steps.pop() if steps else 0)


def copy_of(shard: Shard) -> Shard:
    """The shard as it is now, in CPU memory, for a thread that writes it while training goes on."""
    pieces = {
        name: piece._replace(values={kind: value.detach().to("cpu", copy=True) for kind, value in piece.values.items()})
        for name, piece in shard.pieces.items()
    }
    return Shard(pieces, shard.steps)


def write_shard(shard: Shard, path: Path) -> None:
    """Write a rank's file."""
    tensors = {
        f"{kind}/{name}": value.detach().cpu()
        for name, piece in shard.pieces.items()
        for kind, value in piece.values.items()
    }
    places = {name: [piece.start, piece.size] for name, piece in shard.pieces.items()}
    save_file(tensors, path, {"steps": str(shard.steps), "pieces": json.dumps(places)})


class ShardFiles:
    """The files of all ranks that saved, read a run at a time.

    Args:
        paths: this rank's own first, if there is one: with the same cut no other is opened.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._unopened = list(paths)
        self._opened: list[tuple[Any, dict[str, list[int]]]] = []
        self.steps = int(_header(safe_open(paths[0], "pt"))["steps"])

    def read(self, kind: str, name: str, start: int, out: Tensor, size: int) -> None:
        """Fill ``out`` [n] with the elements from ``start`` of a parameter of ``size`` elements.

        Raises:
            UserError: the files do not hold them.
        """
        missing = [(start, start + len(out))]
        for file, pieces in self._files():
            if not missing:
                return
            if name not in pieces:
                continue
            first, whole = pieces[name]
            if whole != size:
                raise UserError(f"checkpoint: {name} has {whole} elements there, {size} in this model")
            values = file.get_slice(f"{kind}/{name}")
            missing = [rest for want in missing for rest in _fill(out, start, want, values, first)]
        if missing:
            raise UserError(f"checkpoint: it holds no {kind} of {name} from element {missing[0][0]}; another model's?")

    def _files(self) -> Iterator[tuple[Any, dict[str, list[int]]]]:
        yield from self._opened
        while self._unopened:
            file = safe_open(self._unopened.pop(0), "pt")
            self._opened.append((file, json.loads(_header(file)["pieces"])))
            yield self._opened[-1]


def _header(file: Any) -> dict[str, str]:
    header: dict[str, str] = file.metadata()
    return header


def restore_shard(engine: Any, files: ShardFiles) -> None:
    """Fill this rank's shard, and make the model's own weights of it; every rank must call it."""
    if files.steps:
        for flat in _flat_weights(engine):
            moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            step = torch.tensor(float(files.steps), device=flat.device if _steps_on_device(engine) else "cpu")
            engine.optimizer.optimizer.state[flat] = {"step": step} | moments
    for name, parameter in _trained(engine):
        piece = _piece(engine, parameter)
        if piece is None:
            continue
        for kind, value in piece.values.items():
            room = value if value.device.type == "cpu" else torch.empty_like(value, device="cpu")
            files.read(kind, name, piece.start, room, piece.size)
            value.copy_(room)
    _refresh_model(engine)


def _fill(out: Tensor, start: int, want: tuple[int, int], values: Any, first: int) -> list[tuple[int, int]]:
    """Copy what a file's run, from ``first``, has of the wanted elements; returns what is still wanted."""
    last = first + values.get_shape()[0]
    low, high = max(want[0], first), min(want[1], last)
    if low >= high:
        return [want]
    out[low - start : high - start] = values[low - first : high - first]
    return [(a, b) for a, b in ((want[0], low), (high, want[1])) if a < b]


def _trained(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _steps_on_device(engine: Any) -> bool:
    """Where AdamW wants its count of steps: a fused one beside the weights."""
    return any(group.get("fused") or group.get("capturable") for group in engine.optimizer.optimizer.param_groups)


def _flat_weights(engine: Any) -> list[Tensor]:
    """The flat fp32 tensors that AdamW steps on: its state's keys."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in engine.optimizer.optimizer.param_groups for flat in group["params"]]


def _piece(engine: Any, parameter: torch.nn.Parameter) -> Piece | None:
    """This rank's run of a parameter; None where it has none of it."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        flat, size = zero.fp32_partitioned_groups_flat[group], parameter.ds_numel  # type: ignore[attr-defined]
        start = min(size, padded * torch.distributed.get_rank(zero.dp_process_group))
        length = min(padded, size - start)  # the last ranks' runs are filled up
    else:
        mapping, size = parameter._hp_mapping, parameter.numel()  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = _flat_weights(engine)[mapping.param_group_index]
        start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
        length = mapping.hp_fragment_address.numel
    if not length:
        return None
    state = zero.optimizer.state.get(flat, {})
    flats = {WEIGHT: flat} | {kind: state[kind] for kind in MOMENTS if kind in state}
    return Piece(start, size, {kind: values.detach().narrow(0, offset, length) for kind, values in flats.items()})


@torch.no_grad()
def _refresh_model(engine: Any) -> None:
    """The model's own weights, in its dtype, from the fp32 ones."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() != 3:
        zero.update_lp_params()
        return
    if zero.persistent_parameters:  # whole on every rank: cut again, and gathered below
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
    for _, parameter in _trained(engine):
        group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        run = zero.fp32_partitioned_groups_flat[group].narrow(0, offset, padded)
        parameter.ds_tensor.data.copy_(run)  # type: ignore[attr-defined]
    zero.checkpoint_event_epilogue()
