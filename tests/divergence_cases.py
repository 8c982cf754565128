"""Inputs of the divergence through both heads, the same from whole logits, and how gradients are compared."""

from __future__ import annotations

import importlib

import torch
from op_cases import random

from mta_ds.ops import divergence_values, heads

N, VOCAB, PADDED, D_STUDENT, D_TEACHER = 11, 37, 40, 6, 8


def padded(dtype):
    """Heads with padding rows, positions that are not counted."""
    targets = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(5))
    targets[[0, 3, 10]] = -100
    return {
        "student": random(N, D_STUDENT, seed=0, dtype=dtype).requires_grad_(),
        "student_head": random(PADDED, D_STUDENT, seed=1, dtype=dtype).requires_grad_(),
        "teacher": random(N, D_TEACHER, seed=2, dtype=dtype),
        "teacher_head": random(VOCAB + 1, D_TEACHER, seed=3, dtype=dtype),
        "targets": targets,
        "weights": random(N, seed=4, dtype=dtype).abs(),
    }


def small_chunks(monkeypatch, backend):
    """Three tokens at a time, and several blocks of the vocabulary in a row."""
    monkeypatch.setattr(heads, "_MIN_TOKENS", 3)
    if backend == "triton":
        monkeypatch.setattr(importlib.import_module("mta_ds.ops.kernels.divergence"), "BLOCK", 16)
    else:
        monkeypatch.setattr(importlib.import_module("mta_ds.ops.divergence"), "_BLOCK_BYTES", 2 * VOCAB * 4)
    return {"chunk_bytes": 1}


def whole(inputs, divergence, weighted=True, vocab=VOCAB, alphas=None):
    """Loss, divergence and cross-entropy sums from whole logits."""
    log_q, log_p = (
        (inputs[side] @ inputs[f"{side}_head"][:vocab].T).log_softmax(-1) for side in ("student", "teacher")
    )
    keep = inputs["targets"] != -100
    cross_entropy = -log_q.gather(1, inputs["targets"].clamp_min(0)[:, None])[:, 0]
    values = torch.zeros_like(cross_entropy)
    if divergence.name != "sft":
        values = divergence_values(log_q, log_p, divergence, alphas)
    ratio = 0.0 if divergence.name == "sft" else divergence.kd_ratio
    weights = inputs["weights"] if weighted else torch.ones_like(values)
    total = (1 - ratio) * cross_entropy + ratio * values
    return [(weights * each)[keep].sum() for each in (total, values, cross_entropy)]


def assert_same_gradients(got_loss, expected_loss, trained, exact=None, **tolerance):
    """Under one random upstream gradient, by name; each in its parameter's dtype."""
    upstream = random(1, seed=17)[0].to(got_loss.device)
    got = torch.autograd.grad(got_loss, list(trained.values()), upstream.to(got_loss.dtype))
    exact = list((exact or trained).values())
    want = torch.autograd.grad(expected_loss, exact, upstream.to(expected_loss.dtype))
    for key, ours, theirs in zip(trained, got, want, strict=True):
        assert ours.dtype == trained[key].dtype
        message = lambda text, key=key: f"{key}: {text}"  # noqa: E731
        torch.testing.assert_close(ours.double(), theirs.double(), **tolerance, msg=message)


def trained(inputs):
    return {key: inputs[key] for key in ("student", "student_head")}


def in_float64(inputs):
    """The same numbers; student and head as leaves."""
    exact = {key: v.detach().double() if v.is_floating_point() else v for key, v in inputs.items()}
    return exact | {key: exact[key].requires_grad_() for key in ("student", "student_head")}


def sized(n, vocab, dtype=torch.float32):
    """Inputs of ``n`` counted positions."""
    return {
        "student": random(n, D_STUDENT, seed=0, dtype=dtype).requires_grad_(),
        "student_head": random(vocab, D_STUDENT, seed=1, dtype=dtype).requires_grad_(),
        "teacher": random(n, D_TEACHER, seed=2, dtype=dtype),
        "teacher_head": random(vocab, D_TEACHER, seed=3, dtype=dtype),
        "targets": torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(5)),
        "weights": random(n, seed=4, dtype=dtype).abs(),
    }
