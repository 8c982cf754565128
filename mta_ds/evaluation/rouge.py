"""ROUGE-L of generated text as the distillation papers report it (METHOD §9, after MiniLLM)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


class RougeL(NamedTuple):
    """Scores times 100."""

    mean: float
    per_item: tuple[float, ...]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> RougeL:
    """F-measure of the longest common subsequence of words, Porter-stemmed; the best over each item's references.

    The package ``rouge-score`` defines what a word is: a run of a-z and 0-9. Text in another script scores 0.

    Args:
        predictions: generated texts, special tokens and surrounding white space already removed.
        references: for each prediction one or more acceptable texts.

    Raises:
        ValueError: nothing to score, lengths differ, or an item has no reference.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"predictions: {len(predictions)} for {len(references)} references; must be equal and not 0")
    if missing := [index for index, texts in enumerate(references) if not texts]:
        raise ValueError(f"references[{missing[0]}] is empty; every prediction needs a reference")
    scores = [_best(prediction, texts) for prediction, texts in zip(predictions, references, strict=True)]
    return RougeL(sum(scores) / len(scores), tuple(scores))


def _best(prediction: str, references: Sequence[str]) -> float:
    best = _scorer().score_multi(list(references), prediction)["rougeL"]
    return 100.0 * float(best.fmeasure)


@cache
def _scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    # Handing over the package's own tokenizer changes nothing but the line it would log.
    return RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))
