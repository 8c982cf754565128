"""Text from a model, and scores of a student: loss, distance from the teacher, ROUGE-L; and a run's report."""

from mta_ds.evaluation.compare import write_comparison
from mta_ds.evaluation.evaluate import EvaluationConfig, evaluate
from mta_ds.evaluation.generate import GenerateConfig, Response, answer_shard, respond, write_responses
from mta_ds.evaluation.generated import GeneratedManifest, ResponseCounts, finish
from mta_ds.evaluation.generation import (
    DecodingConfig,
    GenerationConfig,
    Generator,
    end_tokens,
    generate,
    response_text,
)
from mta_ds.evaluation.report import write_report
from mta_ds.evaluation.rouge import RougeL, rouge_l
from mta_ds.evaluation.tree import ParsedExample
from mta_ds.evaluation.validation import Scores, Validation, model_scorer, validate

__all__ = [
    "DecodingConfig",
    "EvaluationConfig",
    "GenerateConfig",
    "GeneratedManifest",
    "GenerationConfig",
    "Generator",
    "ParsedExample",
    "Response",
    "ResponseCounts",
    "RougeL",
    "Scores",
    "Validation",
    "answer_shard",
    "end_tokens",
    "evaluate",
    "finish",
    "generate",
    "model_scorer",
    "respond",
    "response_text",
    "rouge_l",
    "validate",
    "write_comparison",
    "write_report",
    "write_responses",
]
