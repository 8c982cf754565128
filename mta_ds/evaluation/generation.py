"""Generate responses to tokenized prompts, in batches, behind one function type.

Evaluation asks a :data:`Generator`; :func:`generate` with a plain transformers model is the one here, a served model is
another function of the same type. Rollouts and ``mta-ds generate`` call :func:`generate` itself, since they name each
prompt's random stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import numpy as np
import torch
import transformers
from pydantic import Field, model_validator
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from mta_ds.config import Section
from mta_ds.models import positions_in_table, vocabulary_size

Prompts = Sequence[Sequence[int]]

_ONE = 2.0**52  # a probability of 1, of which a sum over any vocabulary stays exact in fp64 and fits in int64


class DecodingConfig(Section):
    """How the next token is chosen, and how many sequences run at once."""

    do_sample: bool = False
    """Sample from the distribution; off, the most probable token is taken (greedy)."""
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens that has this probability; 1 keeps all."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many most probable tokens; 0 keeps all."""
    no_repeat_ngram_size: int | None = Field(default=None, ge=1)
    """Forbid a second occurrence of any n-gram of this size, prompt included; MiniLLM's tests use 6."""
    max_length: int = Field(default=512, ge=2)
    """Most tokens of prompt and response together."""
    batch_size: int = Field(default=16, ge=1)


class PromptConfig(DecodingConfig):
    """Decoding after the prompts of records, which may be too long."""

    max_prompt_length: int = Field(default=256, ge=1)
    """Tokens of a prompt, its first."""

    @model_validator(mode="after")
    def _room_for_a_response(self) -> Self:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be smaller than max_length ({self.max_length})"
            )
        return self


class GenerationConfig(DecodingConfig):
    """One pass of generation over some prompts."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a response; ``max_length`` alone limits it if none."""
    seed: int = Field(default=0, ge=0)

    def budget(self, prompt_length: int) -> int:
        """How many tokens a response may have after a prompt of this length."""
        room = self.max_length - prompt_length
        return room if self.max_new_tokens is None else min(room, self.max_new_tokens)


Generator = Callable[[Prompts, GenerationConfig], list[list[int]]]
"""Token ids of each prompt's response, in the prompts' order, without the prompt, with the EOS that ended it."""


def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Prompts,
    config: GenerationConfig,
    *,
    keys: Sequence[int] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Generate one response to each prompt with a transformers model; a :data:`Generator` once the model is bound.

    The model's own generation settings (temperature, penalties, ...) are ignored, except for its EOS tokens. Sampling
    draws from a stream of (``seed``, key): a sequence's random numbers do not depend on the batch it is in.

    Args:
        prompts: token ids; none empty, each shorter than ``config.max_length``.
        keys: names each prompt's random stream, its position by default (rollouts: the global sequence index).
        on_batch: told the number of prompts after each batch, for progress.

    Returns:
        For each prompt the generated ids up to and including the first EOS, or as many as it was allowed.

    Raises:
        ValueError: a prompt is empty or leaves no room for a response.
    """
    keys = range(len(prompts)) if keys is None else keys
    for index, prompt in enumerate(prompts):
        if not prompt or config.budget(len(prompt)) < 1:
            raise ValueError(
                f"prompts[{index}]: {len(prompt)} tokens; must be 1 to max_length - 1 = {config.max_length - 1}"
            )
    responses: list[list[int]] = [[] for _ in prompts]
    with _bare(model):
        for chosen in _batches(prompts, config, positions_in_table(model)):
            batch = _generate_batch(model, tokenizer, [prompts[i] for i in chosen], [keys[i] for i in chosen], config)
            for index, response in zip(chosen, batch, strict=True):
                responses[index] = response
            if on_batch is not None:
                on_batch(len(chosen))
    return responses


def end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> tuple[int, ...]:
    """All ids that end a response: the tokenizer's EOS and those of the model's generation config, sorted."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({int(i) for i in (*several, tokenizer.eos_token_id) if i is not None}))


def response_text(tokenizer: Tokenizer, ids: Sequence[int], ends: Sequence[int]) -> str:
    """A response as text, without its end token and other special tokens, its white space as it was generated."""
    kept = [i for i in ids if i not in ends]
    return str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _batches(prompts: Prompts, config: GenerationConfig, limit: int | None) -> Iterator[list[int]]:
    """The prompts that run together, by their indices.

    Alike lengths share a batch, so padding is small; the longest come first, so memory runs out early or not at all.

    Args:
        limit: the model's positions, where it fails behind them. transformers counts on in every row, finished or not,
            until the batch ends: no response may have more tokens than the batch's longest prompt has positions left.
    """
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True):
        if batch:
            end = len(prompts[batch[0]]) + config.budget(len(prompts[index]))
            if len(batch) == config.batch_size or (limit is not None and end > limit):
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch


def _generate_batch(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Prompts, keys: Sequence[int], config: GenerationConfig
) -> list[list[int]]:
    ends = end_tokens(model, tokenizer)
    budgets = [config.budget(len(prompt)) for prompt in prompts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    input_ids, attention_mask = _pad_left(prompts, pad)
    settings = transformers.GenerationConfig(
        max_new_tokens=max(budgets),
        do_sample=False,  # the processors below leave only the drawn token
        eos_token_id=list(ends),
        pad_token_id=pad,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        use_cache=True,
    )
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=settings,
        logits_processor=_processors(tokenizer, keys, max(budgets), config),
    )
    rows = output[:, input_ids.shape[1] :].tolist()
    return [_cut(row[:budget], ends) for row, budget in zip(rows, budgets, strict=True)]


def _pad_left(prompts: Prompts, pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T]: prompts end together, so the next token is one column for all."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _cut(ids: list[int], ends: Sequence[int]) -> list[int]:
    """``ids`` up to and including its first end token."""
    return next((ids[: position + 1] for position, i in enumerate(ids) if i in ends), ids)


def _processors(
    tokenizer: Tokenizer, keys: Sequence[int], num_tokens: int, config: GenerationConfig
) -> LogitsProcessorList:
    processors = LogitsProcessorList([_KnownTokens(vocabulary_size(tokenizer))])
    if config.do_sample:
        if config.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k > 0:
            processors.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1.0:
            processors.append(TopPLogitsWarper(config.top_p))
        processors.append(_Draw(config.seed, keys, num_tokens))
    return processors


class _KnownTokens(LogitsProcessor):  # type: ignore[misc]
    """Rules out ids that the tokenizer does not have: heads are padded beyond it, and untrained there."""

    def __init__(self, num_known: int) -> None:
        self.num_known = num_known

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.num_known :] = -torch.inf
        return scores


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token a row, drawn by inverting the cumulative distribution at the row's own random number.

    One number per (seed, key, position) instead of a generator shared by the batch: the draw depends neither on the
    batch nor on the order of batches, and costs one cumulative sum, of integers: a GPU adds floats in any order.
    """

    def __init__(self, seed: int, keys: Sequence[int], num_tokens: int) -> None:
        streams = [np.random.default_rng([seed, key]).random(num_tokens) for key in keys]
        self.uniform = torch.from_numpy(np.stack(streams))  # [B, num_tokens] in [0, 1)
        self.position = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.softmax(-1).double().mul_(_ONE).long().cumsum_(-1)  # [B, V]
        uniform = self.uniform[:, self.position, None].to(scores.device)
        self.position += 1
        # The first token whose cumulative probability passes the number: one of probability 0 never is.
        drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1:]).long(), right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


@contextmanager
def _bare(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model generates in evaluation mode and by the given settings alone.

    transformers fills unset values from the model's generation config: a checkpoint's penalty or temperature would
    silently shape every score.
    """
    was_training, own = model.training, model.generation_config
    ends = None if own is None else own.eos_token_id
    model.eval()
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends)
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)
