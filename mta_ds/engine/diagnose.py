"""Where a NaN or Inf comes from: the step that had it is run again, with eyes on every layer.

Looking in every step would have the host wait for the device at each layer. This is done once, before a run ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from mta_ds.data import Batch
from mta_ds.engine import distributed
from mta_ds.engine.distiller import Counts
from mta_ds.engine.health import Found
from mta_ds.models import StreamingTeacher, decoder_layers

logger = logging.getLogger(__name__)


def find_non_finite(
    engine: Any, teacher: StreamingTeacher | None, batches: Sequence[Batch], counts: Sequence[Counts]
) -> Found:
    """Run a step's micro-batches forward and backward again; every rank must call it. The engine is of no use then."""
    logger.warning("NaN or Inf: running the step again to see where")
    layers = {"student": decoder_layers(engine.module.student.model)}
    if teacher is not None:
        layers["teacher"] = decoder_layers(teacher.model)
    states = []
    for batch, count in zip(batches, counts, strict=True):
        with watched(layers) as seen:
            loss, _ = engine(batch.to(distributed.device()), teacher, count)
            engine.backward(loss)
        states.append(seen[0] if seen else "")
        if batch is not batches[-1]:
            engine.step()
    return Found(states, non_finite_gradients(engine.module))


@contextmanager
def watched(models: dict[str, nn.ModuleList]) -> Iterator[list[str]]:
    """Yield what layers' states, and gradients with respect to them, are not finite, in the order they are met."""
    seen: list[str] = []

    def note(what: str, values: Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            seen.append(what)

    def look(what: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            state: Any = output[0] if isinstance(output, tuple) else output
            note(what, state)
            if state.requires_grad:
                state.register_hook(partial(note, f"the gradient of {what}"))

        return hook

    hooks = [
        layer.register_forward_hook(look(f"the hidden state of layer {number} of the {model}"))
        for model, layers in models.items()
        for number, layer in enumerate(layers, 1)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def non_finite_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradients are not finite, in the model's order; every rank must call it."""
    names = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = safe_get_full_grad(parameter)
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                names.append(name)
    return names
