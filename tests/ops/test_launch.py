"""Where kernels are launched."""

from __future__ import annotations

import importlib

import pytest
import torch
from op_cases import bounds, random, random_spans
from triton.runtime.jit import KernelInterface

from mta_ds.ops import Divergence, SpanLayout, align_layer, align_trajectory, attach, linear_divergence
from mta_ds.ops.backend import force

MODULES = ("token_weights", "segments", "span_pool", "dsa", "hid", "divergence", "trajectory")


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch):
    """Triton takes the current device's stream: tensors of another GPU would be read before they are written."""
    within, launched = [], set()

    class DeviceOf:
        def __init__(self, tensor: torch.Tensor):
            self.tensor = tensor

        def __enter__(self):
            within.append(self.tensor)

        def __exit__(self, *_):
            within.pop()

    plain = KernelInterface.__getitem__

    def launch(kernel, grid):
        assert within, f"{kernel.__name__} is launched on the current device"
        launched.add(kernel.__name__)
        return plain(kernel, grid)

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(KernelInterface, "__getitem__", launch)
    lengths = (9, 4)
    student, teacher = random(13, 8).requires_grad_(), random(13, 12, seed=1)
    projection, head, teacher_head = (random(*shape, seed=2) for shape in ((12, 8), (30, 8), (30, 12)))
    layout = SpanLayout(bounds(lengths), *random_spans(lengths, (5, 3)))
    with force("triton"):
        terms = attach(student, projection, align_layer(student, teacher, projection, layout))
        (terms.dsa + terms.hid).backward()
        linear_divergence(student, head, teacher, teacher_head, torch.arange(13), Divergence("fkl"))
        factors = {"temperature": 2.0, "kl_factor": 1.0, "derivative_factor": 1.0}
        align_trajectory(student, teacher, None, head, teacher_head, **factors)
    modules = [importlib.import_module(f"mta_ds.ops.kernels.{name}") for name in MODULES]
    assert launched == {form.kernel.__name__ for module in modules for form in module.specialisations(64)}
