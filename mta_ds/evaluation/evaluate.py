"""``mta-ds evaluate``: validation loss, KL to the teacher and ROUGE-L of one student folder, each with its settings.

The protocol is MiniLLM's (METHOD §9). Published scores move by more than a point with settings that papers leave out,
so everything that shapes a number is written beside it.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from mta_ds.data import (
    Batch,
    DataConfig,
    EncodedDataset,
    Record,
    build_dataset,
    collate,
    encode_prompt,
    input_files,
    read_records,
)
from mta_ds.errors import UsageError, UserError
from mta_ds.evaluation.generation import (
    DecodingConfig,
    GenerationConfig,
    Generator,
    PromptConfig,
    end_tokens,
    generate,
    response_text,
)
from mta_ds.evaluation.rouge import rouge_l
from mta_ds.evaluation.validation import Validation, model_scorer, validate
from mta_ds.files import sha256, write_atomic
from mta_ds.models import Dtype, check_positions, load_config, load_tokenizer, vocabulary_size
from mta_ds.models.loading import Quantization
from mta_ds.models.placement import load_whole

logger = logging.getLogger(__name__)

_PACKAGES = ("mta-ds", "torch", "transformers", "tokenizers", "rouge-score")


class EvaluationConfig(PromptConfig):
    """What is scored and how text is generated; the defaults are the protocol of METHOD §9."""

    records: tuple[str, ...] = ()
    """Records to evaluate on (files, folders, globs); ``data.validation`` if empty."""
    do_sample: bool = True
    seeds: tuple[int, ...] = Field(default=(10, 20, 30, 40, 50), min_length=1)
    """One pass of sampling for each; greedy decoding needs none and makes one pass."""
    generate: bool = True
    """Generate text and score it; off, only the losses are computed."""
    max_records: int | None = Field(default=None, ge=1)
    """Most records to generate for, from the first on; the losses are always over all."""

    def passes(self) -> dict[str, GenerationConfig]:
        """The settings of every pass of generation, under its name: the seed, or "greedy"."""
        shared = self.model_dump(include=set(DecodingConfig.model_fields))
        if not self.do_sample:
            return {"greedy": GenerationConfig(**shared)}
        return {str(seed): GenerationConfig(**shared, seed=seed) for seed in self.seeds}


class Question(NamedTuple):
    """One record to generate for."""

    record: Record
    prompt: list[int]


def evaluate(
    student: Path,
    teacher: Path | None,
    output: Path,
    *,
    config: EvaluationConfig,
    data: DataConfig,
    dtype: Dtype = "float32",
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    teacher_code: bool = False,
    quantization: Quantization | None = None,
) -> dict[str, Any]:
    """Score ``student``; write the result to ``output`` (JSON) and its texts to ``<stem>.generations.jsonl`` beside it.

    Losses are token means in nats over the labels of all records, cut to the lengths of ``data``; ROUGE-L is the mean
    over records, and over seeds.

    Args:
        student, teacher: model folders; without a teacher there is no KL.
        data: template and lengths; spans and units are not used.
        device: of both models; unless given, :func:`mta_ds.models.placement.load_whole` decides.
        trust_remote_code, teacher_code: whether the student's folder, and the teacher's, may run code of their own.
        quantization: the teacher's.

    Returns:
        What was written: ``loss``, ``kl``, ``tokens``, ``rouge_l`` {mean, std, passes, texts}, ``generations`` (a file
        name), ``seconds`` and ``settings``.

    Raises:
        UserError: a folder is no model, a length is beyond its positions, vocabularies differ, no records, or none has
            a reference to compare with.
    """
    began = time.monotonic()
    inputs = config.records or data.validation
    if not inputs:
        raise UsageError("evaluation.records: nothing to evaluate on; name record files there or in data.validation")
    model = load_whole(student, dtype, device=device, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(student, trust_remote_code)
    of_records = {"data.max_length": data.max_length}
    check_positions(model.config, student, {"evaluation.max_length": config.max_length} | of_records)
    load_teacher = None
    if teacher is not None:
        check_positions(load_config(teacher, teacher_code), teacher, of_records)
        _check_vocabularies(tokenizer, load_tokenizer(teacher, teacher_code), teacher)
        load_teacher = partial(
            load_whole, teacher, dtype, device=device, trust_remote_code=teacher_code, quantization=quantization
        )
    losses = _losses(model, tokenizer, load_teacher, inputs, config, data)
    kl = "" if losses.kl is None else f", KL to the teacher {losses.kl:.4f}"
    logger.info("%s: loss %.4f%s over %d tokens", student, losses.loss, kl, losses.tokens)
    result: dict[str, Any] = {"loss": losses.loss, "kl": losses.kl, "tokens": losses.tokens}
    result |= {"rouge_l": None, "generations": None}
    if config.generate:
        path = output.with_name(f"{output.stem}.generations.jsonl")
        questions = _questions(tokenizer, inputs, data, config)
        result["rouge_l"] = _score_texts(model, tokenizer, questions, config, path)
        result["generations"] = path.name
    result["seconds"] = round(time.monotonic() - began, 1)
    result["settings"] = _settings(student, teacher, inputs, config, data, dtype, model.device) | {
        "quantization": quantization
    }
    write_atomic(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _losses(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    load_teacher: Callable[[], PreTrainedModel] | None,
    inputs: Sequence[str],
    config: EvaluationConfig,
    data: DataConfig,
) -> Validation:
    """Loss and KL over all records; the teacher is loaded for this alone, beside the student, and gone before text is
    generated."""
    teacher = None if load_teacher is None else load_teacher()
    score = model_scorer(model, teacher, vocabulary_size(tokenizer))
    with _encoded(inputs, data, tokenizer) as dataset:
        return validate(score, _batches(dataset, config.batch_size, int(tokenizer.pad_token_id), model.device))


def _batches(dataset: EncodedDataset, size: int, pad_id: int, device: torch.device) -> Iterator[Batch]:
    """All examples, the longest first: alike lengths share a batch, and memory runs out early or not at all."""
    order = sorted(range(len(dataset)), key=lambda index: len(dataset[index].input_ids), reverse=True)
    for start in range(0, len(order), size):
        yield collate([dataset[index] for index in order[start : start + size]], pad_id).to(device)


@contextmanager
def _encoded(inputs: Sequence[str], data: DataConfig, tokenizer: Tokenizer) -> Iterator[EncodedDataset]:
    """The records as token ids, without spans; their cache goes when the block ends."""
    with tempfile.TemporaryDirectory() as cache:
        yield build_dataset(inputs, data, tokenizer, None, Path(cache))


def _questions(
    tokenizer: Tokenizer, inputs: Sequence[str], data: DataConfig, config: EvaluationConfig
) -> list[Question]:
    """The first ``max_records`` records that have a reference, with the prompts that training would give them."""
    prompts = data.model_copy(update={"max_prompt_length": config.max_prompt_length})
    records = {r.id: r for r in read_records(inputs) if isinstance(r, Record) and r.references}
    if not records:
        raise UserError(
            f"{', '.join(inputs)}: no record has a response to compare with; set evaluation.generate: false"
        )
    chosen = islice(records.values(), config.max_records)
    return [Question(record, encode_prompt(record, prompts, tokenizer)) for record in chosen]


def _score_texts(
    model: PreTrainedModel, tokenizer: Tokenizer, questions: Sequence[Question], config: EvaluationConfig, path: Path
) -> dict[str, Any]:
    """Generate every pass, write the texts to ``path``; ROUGE-L of each pass with mean and standard deviation."""
    generator: Generator = partial(generate, model, tokenizer)
    ends = end_tokens(model, tokenizer)
    scores: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name, settings in config.passes().items():
        began = time.monotonic()
        responses = generator([question.prompt for question in questions], settings)
        texts = [response_text(tokenizer, ids, ends).strip() for ids in responses]
        rouge = rouge_l(texts, [question.record.references for question in questions])
        scores[name] = rouge.mean
        for question, ids, text, score in zip(questions, responses, texts, rouge.per_item, strict=True):
            rows.append(_row(question.record, name, text, score, ended=ids[-1] in ends))
        seconds = time.monotonic() - began
        logger.info("%s: ROUGE-L %.2f over %d texts, %.0f s", name, rouge.mean, len(texts), seconds)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    values = list(scores.values())
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "passes": scores, "texts": len(questions)}


def _row(record: Record, name: str, text: str, score: float, ended: bool) -> dict[str, Any]:
    """One line of the generations file; ``ended`` tells a text that reached EOS from one cut by the length limit."""
    asked = {field: value for field, value in record.fields.items() if value not in record.references}
    return {
        "record_id": record.id,
        "pass": name,
        "fields": asked,
        "text": text,
        "ended": ended,
        "rouge_l": score,
        "references": list(record.references),
    }


def _check_vocabularies(student: Tokenizer, teacher: Tokenizer, folder: Path) -> None:
    if student.get_vocab() != teacher.get_vocab():
        raise UserError(
            f"{folder}: the teacher's vocabulary ({len(teacher)} tokens) is not the student's ({len(student)}); "
            "KL needs equal ones; evaluate without a teacher"
        )


def _settings(
    student: Path,
    teacher: Path | None,
    inputs: Sequence[str],
    config: EvaluationConfig,
    data: DataConfig,
    dtype: Dtype,
    device: torch.device,
) -> dict[str, Any]:
    """All that shaped the numbers, with hashes of every file that was read."""
    lengths = {"max_length", "max_prompt_length", "long_prompts", "template"}
    return {
        "evaluation": config.model_dump(mode="json"),
        "data": data.model_dump(mode="json", include=lengths),
        "dtype": dtype,
        "device": str(device),
        "rouge": "rouge-score rougeL F-measure, stemmer, best over references, x100",
        "student": {"path": str(student), "sha256": model_hashes(student)},
        "teacher": None if teacher is None else {"path": str(teacher), "sha256": model_hashes(teacher)},
        "records": {name: _record_hashes(name) for name in inputs},
        "versions": {name: version(name) for name in _PACKAGES},
    }


def model_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a model folder that weights, configuration or tokenizer are read from."""
    kinds = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in kinds}


def _record_hashes(name: str) -> dict[str, str]:
    """Hash of each local file behind one entry of ``records``; empty for the name of a ``datasets`` data set."""
    return {str(file): sha256(file) for file in input_files(name)}
