from __future__ import annotations

import pytest
import torch

from mta_ds.evaluation.validation import Scores, Validation, validate


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
