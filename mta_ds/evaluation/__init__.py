"""Scores of a student: validation loss, distance from the teacher, ROUGE-L of what it writes; and a run's report."""

from mta_ds.evaluation.generation import DecodingConfig, GenerationConfig, Generator, end_tokens, generate
from mta_ds.evaluation.rouge import RougeL, rouge_l
from mta_ds.evaluation.validation import Scores, Validation, validate

__all__ = [
    "DecodingConfig",
    "GenerationConfig",
    "Generator",
    "RougeL",
    "Scores",
    "Validation",
    "end_tokens",
    "generate",
    "rouge_l",
    "validate",
]
