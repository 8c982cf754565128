"""Scores of a student: validation loss, distance from the teacher, ROUGE-L of what it writes; and a run's report."""

from mta_ds.evaluation.evaluate import EvaluationConfig, evaluate
from mta_ds.evaluation.generation import DecodingConfig, GenerationConfig, Generator, end_tokens, generate
from mta_ds.evaluation.report import write_report
from mta_ds.evaluation.rouge import RougeL, rouge_l
from mta_ds.evaluation.tree import ParsedExample
from mta_ds.evaluation.validation import Scores, Validation, model_scorer, validate

__all__ = [
    "DecodingConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "Generator",
    "ParsedExample",
    "RougeL",
    "Scores",
    "Validation",
    "end_tokens",
    "evaluate",
    "generate",
    "model_scorer",
    "rouge_l",
    "validate",
    "write_report",
]
