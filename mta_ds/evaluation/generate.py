"""``mta-ds generate``: a model's responses to the prompts of a record file, written as records to train on.

Trained on as they are, a teacher's responses are SeqKD; joined with a student's (``--pair-with``) they are DistiLLM-2's
preferences. Shards need no coordination, and a task may be killed at any instruction and run again: it makes only the
parts that are missing, and makes them the same, since what is drawn depends on the seed and a record's id alone.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from mta_ds.data import (
    DataConfig,
    Record,
    Reject,
    answered,
    local_files,
    parse_row,
    part_name,
    read_rows,
    reject_log,
    to_line,
    whole_prompt,
)
from mta_ds.errors import UsageError, UserError
from mta_ds.evaluation.evaluate import model_hashes
from mta_ds.evaluation.generated import GeneratedManifest, GeneratedPart, ResponseCounts, claim, complete_part, finish
from mta_ds.evaluation.generation import GenerationConfig, PromptConfig, end_tokens, generate, response_text
from mta_ds.files import atomic_path, sha256, write_atomic
from mta_ds.models import Dtype, check_positions, load_config, load_tokenizer
from mta_ds.models.loading import Quantization
from mta_ds.models.placement import load_whole

logger = logging.getLogger(__name__)

_FORMAT = 1
_PACKAGES = ("mta-ds", "torch", "transformers", "tokenizers")


class GenerateConfig(GenerationConfig, PromptConfig):
    """Which model answers which prompts, and how; sampling by default, as in METHOD §8 and §9.

    Prompts beyond ``max_prompt_length`` are cut or left out, as ``data.long_prompts`` says.
    """

    inputs: tuple[str, ...] = ()
    """Records whose prompts are answered (files, folders, globs, ``datasets`` names); ``data.train`` if empty."""
    output: Path | None = None
    """Folder of the answered records; ``<run_dir>/generated/<model>`` unless given."""
    model: str = "teacher"
    """"teacher"; "student", the run's export or, before there is one, the model that it starts from; or a folder."""
    num_shards: int = Field(default=8, ge=1)
    """Parts of the output: what a job array shares out, and what a killed task need not make again."""
    do_sample: bool = True


class Response(NamedTuple):
    """What a model wrote."""

    ids: list[int]
    text: str
    ended: bool
    """Whether it ends with EOS; otherwise the length limit cut it off."""


def respond(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    record_ids: Sequence[str],
    config: GenerationConfig,
    on_batch: Callable[[int], None] | None = None,
) -> list[Response]:
    """One response to each prompt; what is drawn depends on the seed and the record's id alone.

    Raises:
        ValueError: a prompt is empty or leaves no room for a response.
    """
    keys = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) for name in record_ids]
    ends = end_tokens(model, tokenizer)
    responses = generate(model, tokenizer, prompts, config, keys=keys, on_batch=on_batch)
    return [Response(ids, response_text(tokenizer, ids, ends), ids[-1] in ends) for ids in responses]


def write_responses(
    model_dir: Path,
    inputs: Sequence[str],
    output: Path,
    *,
    config: GenerateConfig,
    data: DataConfig,
    dtype: Dtype = "float32",
    shard_index: int | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> GeneratedManifest | None:
    """Answer the shards that are missing, or only ``shard_index``; write the manifest if that completes the folder.

    Args:
        model_dir: the model that answers, with its tokenizer.
        data: template, and what happens to long prompts.
        device: unless given, :func:`mta_ds.models.placement.load_whole` decides.

    Returns:
        The manifest, or None while other shards are missing.

    Raises:
        UserError: bad input, a folder of other texts in ``output``, a damaged part, no prompt, or no response that
            says anything.
    """
    if shard_index is not None and not 0 <= shard_index < config.num_shards:
        raise UsageError(
            f"--shard-index {shard_index}: want 0 to {config.num_shards - 1} for {config.num_shards} shards"
        )
    if not inputs:
        raise UsageError("generation.inputs: no prompts; name record files there or in data.train")
    _refuse_output_in_input(output, inputs)
    check_positions(load_config(model_dir, trust_remote_code), model_dir, {"generation.max_length": config.max_length})
    tokenizer = load_tokenizer(model_dir, trust_remote_code)
    precision = dtype if quantization is None else f"{dtype}, {quantization}"
    claim(output, _identity(model_dir, inputs, config, data, precision))
    wanted = range(config.num_shards) if shard_index is None else (shard_index,)
    missing = [i for i in wanted if complete_part(output, i, config.num_shards) is None]
    if missing:
        model = load_whole(
            model_dir, dtype, device=device, trust_remote_code=trust_remote_code, quantization=quantization
        )
        for index in missing:
            _write_part(model, tokenizer, inputs, output, config, data, index)
    return finish(output)


def answer_shard(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    name: str,
    inputs: Sequence[str],
    output: Path,
    *,
    config: GenerateConfig,
    data: DataConfig,
    shard_index: int,
    on_batch: Callable[[int], None] = lambda number: None,
) -> None:
    """Answer one shard with a model that is in memory, unless it is complete; :func:`finish` completes the folder.

    Args:
        name: says in the folder which model it was; another name in the same folder is refused.
        on_batch: told the number of prompts after each batch.
    """
    identity = _identity(None, inputs, config, data, str(model.dtype).removeprefix("torch."))
    claim(output, identity | {"model": {"path": name, "sha256": {"name": name}}})
    if complete_part(output, shard_index, config.num_shards) is None:
        _write_part(model, tokenizer, inputs, output, config, data, shard_index, on_batch)


def _write_part(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    inputs: Sequence[str],
    output: Path,
    config: GenerateConfig,
    data: DataConfig,
    index: int,
    told: Callable[[int], None] = lambda number: None,
) -> None:
    name = part_name(index, config.num_shards)
    path = output / f"{name}.jsonl"
    tally = Counter[str]()
    try:
        with reject_log(output / f"rejects-{name.removeprefix('part-')}.jsonl") as leave_out:
            questions = list(_questions(tokenizer, inputs, config, data, index, tally, leave_out))
            prompts, record_ids = [q.prompt for q in questions], [q.record.id for q in questions]
            with _progress(f"{index + 1}/{config.num_shards}", len(questions), told) as on_batch:
                responses = respond(model, tokenizer, prompts, record_ids, config, on_batch)
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                for question, response in zip(questions, responses, strict=True):
                    if not response.text.strip():
                        tally["empty"] += 1
                        leave_out(Reject(question.record.where, "an empty response", question.record.id))
                        continue
                    file.write(to_line(answered(question.row, question.record.id, response.text, response.ended)))
                    tally.update(written=1, cut_responses=not response.ended, tokens=len(response.ids))
        part = GeneratedPart(file=path.name, sha256=sha256(path), counts=ResponseCounts(**tally))
        write_atomic(path.with_suffix(".json"), part.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None


class _Question(NamedTuple):
    row: dict[str, Any]
    record: Record
    prompt: list[int]


def _questions(
    tokenizer: Tokenizer,
    inputs: Sequence[str],
    config: GenerateConfig,
    data: DataConfig,
    index: int,
    tally: Counter[str],
    leave_out: Callable[[Reject], None],
) -> Iterator[_Question]:
    """The records of a shard that can be asked, with the prompts that training would give them."""
    limit = config.max_prompt_length
    for where, row in read_rows(inputs, num_shards=config.num_shards, shard_index=index):
        record = parse_row(row, where)
        if isinstance(record, Reject):
            raise UserError(f"{where}: {record.reason}; mend or remove the row")
        tally["records"] += 1
        prompt = whole_prompt(record, data, tokenizer)
        if not prompt:
            tally["no_prompt"] += 1
            leave_out(Reject(where, "no prompt to answer", record.id))
        elif len(prompt) > limit and data.long_prompts == "drop":
            tally["long_prompt"] += 1
            leave_out(Reject(where, f"a prompt of {len(prompt)} tokens; at most {limit}", record.id))
        else:
            tally["cut_prompts"] += len(prompt) > limit
            yield _Question(row, record, prompt[:limit])


def _refuse_output_in_input(output: Path, inputs: Sequence[str]) -> None:
    for source in inputs:
        if Path(source).is_dir() and output.resolve().is_relative_to(Path(source).resolve()):
            raise UsageError(f"{output}: lies in the input folder {source}, and would be read as records")


def _identity(
    model_dir: Path | None, inputs: Sequence[str], config: GenerateConfig, data: DataConfig, dtype: str
) -> dict[str, Any]:
    """All that decides what is written; a batch's size does not, so a task may go on with a smaller one.

    (In bf16 its rounding reaches a draw here and there, which is then another sample of the same distribution.)
    """
    elsewhere = {"inputs", "output", "model", "num_shards", "batch_size"}
    return {
        "format": _FORMAT,
        "model": {"path": str(model_dir), "sha256": model_hashes(model_dir) if model_dir is not None else {}},
        "inputs": {
            source: [f"{file.name} {sha256(file)}" for file in local_files(source)] or [source] for source in inputs
        },
        "settings": config.model_dump(mode="json", exclude=elsewhere)
        | {"template": data.template, "long_prompts": data.long_prompts, "dtype": dtype},
        "num_shards": config.num_shards,
        "versions": {name: version(name) for name in _PACKAGES},
    }


@contextmanager
def _progress(shard: str, total: int, told: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """Yield what is called with the number of prompts of each batch: it shows what is done, and tells ``told``.

    A bar on a terminal, else a line every ten seconds.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(f"generate {shard}", total=total)

            def advance(number: int) -> None:
                bar.advance(task, number)
                told(number)

            yield advance
        return
    began = shown = time.monotonic()
    done = 0

    def on_batch(number: int) -> None:
        nonlocal done, shown
        told(number)
        done += number
        now = time.monotonic()
        if now - shown > 10 or done == total:
            shown = now
            logger.info("shard %s: %d of %d responses, %.1f/s", shard, done, total, done / max(now - began, 1e-9))

    yield on_batch
