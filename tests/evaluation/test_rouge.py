from __future__ import annotations

import pytest

from mta_ds.evaluation.rouge import rouge_l


def test_by_hand():
    # words of the longest common subsequence: "the cat on mat" (4) of 5 predicted and 6 reference words
    score = rouge_l(["the cat lies on mat"], [["The cat sat on the mat."]])
    precision, recall = 4 / 5, 4 / 6
    assert score.per_item == pytest.approx([100 * 2 * precision * recall / (precision + recall)])
    assert score.mean == pytest.approx(score.per_item[0])


def test_stems_and_ignores_case_and_punctuation():
    assert rouge_l(["He was RUNNING, quickly!"], [["he was runs quickly"]]).mean == pytest.approx(100)


def test_best_reference_counts():
    assert rouge_l(["a b c"], [["x y z", "a b c", "a"]]).mean == pytest.approx(100)


def test_mean_over_items_and_empty_prediction():
    score = rouge_l(["", "same words"], [["something"], ["same words"]])
    assert score.per_item == pytest.approx((0, 100))
    assert score.mean == pytest.approx(50)


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_wrong_arguments(predictions, references):
    with pytest.raises(ValueError, match=r"predictions|references"):
        rouge_l(predictions, references)
