from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mta_ds.evaluation.validation import Scores, Validation, model_scorer, validate


def as_score(row):
    loss, kl, count = row
    return Scores(torch.tensor(loss), None if kl is None else torch.tensor(kl), count)


def test_means_are_global_not_means_of_batches():
    rows = [(6.0, 3.0, 2), (4.0, 1.0, torch.tensor(8))]
    assert validate(as_score, rows) == Validation(loss=1.0, kl=pytest.approx(0.4), tokens=10)


def test_without_a_teacher_there_is_no_kl():
    assert validate(as_score, [(6.0, None, 3)]) == Validation(loss=2.0, kl=None, tokens=3)


def test_ranks_are_summed_even_where_one_has_nothing():
    other = torch.tensor([4.0, 1.0, 8.0, 8.0], dtype=torch.float64)
    result = validate(as_score, [(6.0, 3.0, 2)], all_reduce=lambda mine: mine + other)
    assert result == validate(as_score, [(6.0, 3.0, 2), (4.0, 1.0, 8)])
    assert validate(as_score, [], all_reduce=lambda mine: mine + other) == Validation(0.5, 0.125, 8)


def test_score_runs_without_gradients():
    weight = torch.ones((), requires_grad=True)

    def score(_batch):
        assert not torch.is_grad_enabled()
        return Scores(weight * 2, None, 1)

    assert validate(score, [None]).loss == 2.0


def test_nothing_to_validate():
    with pytest.raises(ValueError, match="no token has a label"):
        validate(as_score, [])


@pytest.mark.parametrize("with_teacher", [True, False])
def test_model_scorer_equals_full_logits(make_model, tokenizer, with_teacher):
    """Two sequences of other lengths, heads padded beyond the vocabulary, one label ignored."""
    student = make_model(0, extra_rows=16)
    teacher = make_model(1, hidden=48, tied=False) if with_teacher else None
    ids = torch.randint(3, len(tokenizer), (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    valid = mask.flatten().nonzero().flatten()
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    shifted[1, 3] = shifted[0, 0] = -100
    targets = shifted.flatten()[valid]
    batch = SimpleNamespace(input_ids=ids, attention_mask=mask, valid=valid, targets=targets)

    with torch.no_grad():
        scores = model_scorer(student, teacher, len(tokenizer))(batch)

    def log_probabilities(model):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[..., : len(tokenizer)]
        return logits.double().log_softmax(-1).flatten(0, 1)[valid][targets != -100]

    q, kept = log_probabilities(student), targets[targets != -100]
    assert int(scores.count) == len(kept) == 8
    torch.testing.assert_close(scores.cross_entropy.double(), -q.gather(1, kept[:, None]).sum(), rtol=1e-5, atol=1e-5)
    if teacher is None:
        assert scores.divergence is None
    else:
        p = log_probabilities(teacher)
        torch.testing.assert_close(scores.divergence.double(), (p.exp() * (p - q)).sum(), rtol=1e-5, atol=1e-5)
