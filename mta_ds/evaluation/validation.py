"""Validation: a student's loss on held-out labels and its distance from the teacher, as token means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mta_ds.data import Batch
from mta_ds.losses import Divergence, linear_divergence
from mta_ds.models import CausalBody, ragged


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over one batch's labelled tokens, on the device they were computed on."""

    cross_entropy: Tensor
    """Cross-entropy of the student with the labels, a scalar."""
    divergence: Tensor | None
    """KL(teacher ‖ student) over the vocabulary, a scalar; None without a teacher."""
    count: Tensor | int
    """Number of labelled tokens."""


@dataclass(frozen=True, slots=True)
class Validation:
    """Means over all labelled tokens, in nats."""

    loss: float
    kl: float | None
    tokens: int


def validate(
    score: Callable[[Batch], Scores],
    batches: Iterable[Batch],
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Validation:
    """Score every batch and divide the sums once, by the global number of labelled tokens.

    Args:
        score: sums of one batch; called without gradients.
        all_reduce: adds a float64 tensor [4] over ranks and returns it; each rank then scores its own batches (a rank
            without any passes a CPU tensor of zeros).

    Raises:
        ValueError: no token has a label (on any rank).
    """
    rows: list[Tensor] = []
    for batch in batches:
        with torch.no_grad():
            rows.append(_as_row(score(batch)))
    total = torch.stack(rows).sum(0) if rows else torch.zeros(4, dtype=torch.float64)
    if all_reduce is not None:
        total = all_reduce(total)
    loss, kl, tokens, compared = total.tolist()
    if tokens == 0:
        raise ValueError("batches: no token has a label")
    return Validation(loss / tokens, kl / compared if compared else None, int(tokens))


def model_scorer(
    student: PreTrainedModel, teacher: PreTrainedModel | None, vocab_size: int
) -> Callable[[Batch], Scores]:
    """Score batches with two plain models on one device, under no_grad; logits are never held whole.

    Args:
        vocab_size: number of ids that mean something; padding rows of the heads beyond it are left out.
    """
    divergence = Divergence("sft" if teacher is None else "fkl", vocab_size=vocab_size)
    bodies = [None if model is None else CausalBody(model, ()) for model in (student, teacher)]

    def score(batch: Batch) -> Scores:
        (hidden, head), (teacher_hidden, teacher_head) = (_final_state(body, batch) for body in bodies)
        assert hidden is not None and head is not None
        sums = linear_divergence(hidden, head, teacher_hidden, teacher_head, batch.targets, divergence)
        return Scores(sums.cross_entropy, None if teacher is None else sums.divergence, sums.count)

    return score


def _final_state(body: CausalBody | None, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """Final hidden states of the valid tokens [n, d], and the LM head [vocabulary, d]."""
    if body is None:
        return None, None
    return ragged(body(batch.input_ids, batch.attention_mask), batch.valid), body.head


def _as_row(scores: Scores) -> Tensor:
    """Sums of loss and KL, tokens, tokens with a KL; float64 [4], left on their device: no host sync a batch."""
    loss = scores.cross_entropy.double()
    count = torch.as_tensor(scores.count, dtype=torch.float64, device=loss.device)
    if scores.divergence is None:
        return torch.stack([loss, torch.zeros_like(loss), count, torch.zeros_like(count)])
    return torch.stack([loss, scores.divergence.double(), count, count])
