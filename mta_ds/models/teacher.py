"""The streaming teacher: a frozen model that hands out each key layer's state and keeps none.

It lives in ZeRO-3 partitions. One that is quantised, which ZeRO-3 cannot cut, is whole on every rank, and so is that of
a run on one rank, where ZeRO-3's hooks would only cost time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mta_ds.models.body import CausalBody, count_parameters, decoder_layers, final_norm, truncate
from mta_ds.models.loading import Dtype, TeacherConfig, load_pretrained
from mta_ds.models.partitions import gathered, whole
from mta_ds.models.verify import verify_weights
from mta_ds.models.zero import DEEPSPEED_PREFETCH, is_fetched_whole, teacher_config


class PaddedBatch(Protocol):
    """What a model needs of a batch."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def attention_mask(self) -> Tensor: ...

    @property
    def valid(self) -> Tensor:
        """Indices of the valid tokens in the flattened [B * T]."""


class StreamingTeacher:
    """A forward pass of the teacher that calls back at each key layer.

    Not a module on purpose: registered inside the student's engine, its parameters would be optimised, saved and
    partitioned a second time.
    """

    def __init__(self, engine: Any, body: CausalBody) -> None:
        """``engine`` runs ``body``: DeepSpeed's, or the body itself if it is whole."""
        self._engine = engine
        self._body = body
        self._head: Tensor | None = None
        self._norm: nn.Module | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The teacher as it lives in its partitions, if it does."""
        return self._body.model

    @torch.no_grad()
    def run(self, batch: PaddedBatch, on_key_layer: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Run the batch; returns the final hidden state [n, d_T] of the n valid tokens.

        Args:
            on_key_layer: called with (layer number, hidden state [n, d_T]) as each key layer emits, lowest first.
        """

        def hand_out(layer: int, hidden: Tensor) -> None:
            if on_key_layer is not None:
                on_key_layer(layer, ragged(hidden, batch.valid))

        final = self._engine(batch.input_ids, batch.attention_mask, on_layer=hand_out)
        return ragged(final, batch.valid)

    def head(self) -> Tensor:
        """The LM head's weight [vocabulary, d_T], whole; every rank must ask. Gathered once, until :meth:`release`."""
        if self._head is None:
            with gathered([self._body.head]):
                self._head = whole(self._body.head)
        return self._head

    def norm(self) -> nn.Module:
        """The final norm with whole weights, for states of lower layers; like :meth:`head`.

        A twin of the model's own, which ZeRO-3 would fetch and release in the middle of the forward it is used in.
        """
        if self._norm is None:
            own = final_norm(self._body.model)
            self._norm = copy.copy(own)
            vars(self._norm).update(vars(nn.Module()), training=False, _buffers=own._buffers, _modules=own._modules)
            with gathered(list(own.parameters())):
                self._norm._parameters = {
                    name: None if parameter is None else nn.Parameter(whole(parameter), requires_grad=False)
                    for name, parameter in own._parameters.items()
                }
        return self._norm

    def release(self) -> None:
        """Give back what :meth:`head` and :meth:`norm` hold: at the end of an optimizer step."""
        self._head = self._norm = None


def ragged(hidden: Tensor, valid: Tensor) -> Tensor:
    """[B, T, d] -> [n, d]: the valid tokens of a padded batch, sequence after sequence."""
    return hidden.flatten(0, 1).index_select(0, valid)


def load_teacher(
    folder: Path,
    config: TeacherConfig,
    dtype: Dtype,
    micro_batch_size: int,
    key_layers: Sequence[int],
    needs_final: bool,
    verify: bool = False,
) -> StreamingTeacher:
    """Load the teacher into ZeRO-3 partitions and wrap it in its engine; torch.distributed must be initialised.

    A teacher that is quantised, or has one rank and is not offloaded, is loaded whole, and has no engine.

    Args:
        folder: the teacher's plain model folder, any adapter already merged.
        key_layers: teacher layers that are handed out, in transformers' numbering.
        needs_final: whether the final state (for the divergence) is needed; if not, the teacher is cut after the last
            key layer.
        verify: compare every loaded weight with its file.
    """
    engine_config = None
    if config.quantization is None:
        engine_config = _unless_whole(teacher_config(config.deepspeed, dtype, micro_batch_size))
    here = {"": torch.cuda.current_device()} if engine_config is None and torch.cuda.is_available() else None
    model = load_pretrained(folder, dtype, engine_config, config.trust_remote_code, config.quantization, here)
    if verify:
        verify_weights(model, folder)
    model.requires_grad_(False)
    model.eval()
    num_layers = len(decoder_layers(model))
    if not needs_final:
        truncate(model, max(key_layers))
    body = CausalBody(model, key_layers, num_layers).eval()
    engine: Any = body
    if engine_config is not None:
        _fetch_as_one(model, engine_config["zero_optimization"])
        engine, *_ = deepspeed.initialize(model=body, config=engine_config)
        engine.eval()
    body.register_taps()
    return StreamingTeacher(engine, body)


def _unless_whole(engine_config: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration, if ZeRO-3 has anything to do: ranks that share the weights, or other memory to hold them."""
    offload = engine_config["zero_optimization"].get("offload_param") or {}
    alone = torch.distributed.get_world_size() == 1 and offload.get("device", "none") == "none"
    return None if alone else engine_config


def _fetch_as_one(model: nn.Module, zero: dict[str, Any]) -> None:
    """Tell ZeRO-3 of which blocks it should gather all parameters at once, before the engine is made.

    A mixture-of-experts block, because ranks route to different experts and would deadlock. And a whole decoder layer,
    where no fetch ahead is lost by it: for each module inside DeepSpeed would run four hooks a forward, two of them for
    a backward that never comes, and hold some 20 kB. A larger layer goes matrix by matrix, so that the next ones travel
    while it computes; and so does one on NVMe, whose few buffers take a matrix each.
    """
    blocks = {type(m) for m in model.modules() if isinstance(getattr(m, "experts", None), nn.ModuleList)}
    if (zero.get("offload_param") or {}).get("device") != "nvme":
        layers = decoder_layers(model)
        largest = max(count_parameters(layer) for layer in layers)
        if is_fetched_whole(largest, zero.get("stage3_prefetch_bucket_size", DEEPSPEED_PREFETCH)):
            blocks |= {type(layer) for layer in layers}
    if blocks:
        deepspeed.utils.set_z3_leaf_modules(model, list(blocks))
