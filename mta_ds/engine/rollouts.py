"""Rollouts: steps whose sequences the student writes itself, or takes from what it wrote before.

A step's source is drawn once, the same on every rank, ``ahead`` steps before it is trained on. If the student is to
write, it does so then, and its text is parsed in processes beside the training until the step comes: nobody waits for
the parser, and yet a run never depends on how fast it was.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mta_ds.data import (
    Batch,
    DataConfig,
    Example,
    ParsedResponse,
    StepLoader,
    decode_with_offsets,
    rollout_example,
)
from mta_ds.engine import distributed
from mta_ds.engine.replay import ReplayBuffer, load_examples, save_examples
from mta_ds.errors import UserError
from mta_ds.evaluation import GenerationConfig, generate
from mta_ds.losses import Method, RolloutConfig, Source
from mta_ds.spans.pool import ParserPool
from mta_ds.spans.rows import Field

logger = logging.getLogger(__name__)

# Streams of random numbers that a step draws from, apart from those of generation.
_SOURCE, _REPLAY = 1, 2

Write = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[int]]]
"""(prompts, keys of their random streams) -> responses with their EOS; every rank calls it together."""


class Sent(NamedTuple):
    """A response that is being parsed."""

    ticket: int
    text: str
    offsets: np.ndarray
    """Of the response's ids in the text."""


class Plan(NamedTuple):
    """What a coming step trains on."""

    source: Source
    responses: list[list[int]]
    """Ids of each sequence of the step, over all ranks, by its place in the step; empty unless rollouts."""
    sent: dict[int, Sent]
    """Place in the step -> what the parser has of it, of this rank's sequences."""


class Rollouts:
    """The sequences of every step of a method that trains on student text; stands in the loader's place."""

    def __init__(
        self,
        method: Method,
        loader: StepLoader,
        write: Write,
        data: DataConfig,
        tokenizer: Any,
        seed: int,
        num_steps: int,
        open_pool: Callable[[], ParserPool] | None,
    ) -> None:
        assert method.rollouts is not None
        self._method, self._loader, self._write = method, loader, write
        self._open_pool = open_pool
        self._pool: ParserPool | None = None
        self._data, self._tokenizer, self._seed, self._num_steps = data, tokenizer, seed, num_steps
        self._ahead = method.rollouts.ahead
        self._buffer = ReplayBuffer(max(1, method.buffer_size))
        self._plans: dict[int, Plan] = {}

    def next_step(self, step: int) -> tuple[Source, list[Batch]]:
        """This rank's micro-batches of ``step`` (from 1; steps come in order); every rank must call it."""
        for coming in range(step, min(step + self._ahead, self._num_steps) + 1):
            if coming not in self._plans:
                self._plans[coming] = self._plan(coming)
        plan = self._plans.pop(step)
        if plan.source is Source.DATA:
            return plan.source, self._loader.next_step()
        everything = self._receive(step, plan) if plan.source is Source.STUDENT else self._replay(step)
        places = self._loader.places()
        batches = [self._loader.collate([everything[place] for place in row]) for row in places]
        self._loader.skip_step()
        return plan.source, batches

    def close(self) -> None:
        """End the parsers."""
        if self._pool is not None:
            self._pool.close()

    def save(self, path: Path) -> None:
        """Write buffer and plans; one rank's are everybody's."""
        plans = {step: [plan.source.value, plan.responses] for step, plan in self._plans.items()}
        save_examples(path, self._buffer.examples(), {"plans": plans, "vocabulary": self._vocabulary()})

    def load(self, path: Path) -> None:
        """Go on from a file of :meth:`save`: text that was on its way is parsed again.

        Raises:
            UserError: its ids are another tokenizer's.
        """
        examples, note = load_examples(path)
        if note["vocabulary"] != self._vocabulary():
            raise UserError(
                f"{path}: written with another tokenizer; resume with the run's own, or start another run_dir"
            )
        self._buffer.push(examples)
        plans: Any = note["plans"]
        self._plans = {
            int(step): Plan(Source(source), responses, self._submit(int(step), responses))
            for step, (source, responses) in plans.items()
        }

    def _plan(self, step: int) -> Plan:
        draw = float(np.random.default_rng([self._seed, _SOURCE, step]).random())
        on_their_way = sum(len(plan.responses) for plan in self._plans.values())
        buffer_full = len(self._buffer) + on_their_way >= self._method.buffer_size
        source = self._method.source(step, self._num_steps, draw, buffer_full)
        if source is not Source.STUDENT:
            return Plan(source, [], {})
        responses = self._generate(step)
        return Plan(source, responses, self._submit(step, responses))

    def _generate(self, step: int) -> list[list[int]]:
        """The student's answers to the step's prompts; each rank writes its own, every rank gets all."""
        first = self._first_sample(step)
        mine = self._own_places()
        asked = [self._loader.example(first + place) for place in mine]
        for example in asked:
            if not example.prompt_length:
                raise UserError(f"record {example.record_id}: has no prompt; the student cannot answer it in a rollout")
        prompts = [example.input_ids[: example.prompt_length].tolist() for example in asked]
        answers = self._write(prompts, [first + place for place in mine])
        gathered = distributed.gather_objects(dict(zip(mine, answers, strict=True)))
        merged = {place: answer for share in gathered for place, answer in share.items()}
        responses = [merged[place] for place in sorted(merged)]
        ends = set(self._tokenizer.all_special_ids)
        empty = sum(all(token in ends for token in response) for response in responses)
        if empty and distributed.rank() == 0:
            logger.warning("step %d: %d of %d rollouts are empty (EOS first)", step, empty, len(responses))
        return responses

    def _submit(self, step: int, responses: Sequence[Sequence[int]]) -> dict[int, Sent]:
        """Give this rank's responses to the parser."""
        if self._open_pool is None or not responses:
            return {}
        if self._pool is None:  # parsers start with the first text
            self._pool = self._open_pool()
        sent = {}
        for place in self._own_places():
            text, offsets = decode_with_offsets(responses[place], self._tokenizer)
            sent[place] = Sent(self._pool.submit([Field(f"{step}/{place}", "response", text)]), text, offsets)
        return sent

    def _receive(self, step: int, plan: Plan) -> list[Example]:
        """The step's rollouts as examples, those of all ranks; the buffer has them from now on."""
        first = self._first_sample(step)
        mine = {}
        for place in self._own_places():
            parsed = None
            if self._pool is not None:
                sent = plan.sent[place]
                (units,) = self._pool.result(sent.ticket).units()
                parsed = ParsedResponse(sent.text, sent.offsets, units)
            asked = self._loader.example(first + place)
            mine[place] = rollout_example(asked, plan.responses[place], parsed, self._data.units)
        merged = {place: example for share in distributed.gather_objects(mine) for place, example in share.items()}
        examples = [merged[place] for place in sorted(merged)]
        if self._method.buffer_size:
            self._buffer.push(examples)
        return examples

    def _replay(self, step: int) -> list[Example]:
        """The sequences of the step, those of all ranks in one draw."""
        random = np.random.default_rng([self._seed, _REPLAY, step])
        return self._buffer.draw(self._loader.samples_per_step, random)

    def _own_places(self) -> list[int]:
        """This rank's places in the step."""
        return [place for row in self._loader.places() for place in row]

    def _first_sample(self, step: int) -> int:
        return (step - 1) * self._loader.samples_per_step

    def _vocabulary(self) -> str:
        return hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def make_writer(
    whole: Callable[[], AbstractContextManager[Any]], tokenizer: Any, config: RolloutConfig, max_length: int, seed: int
) -> Write:
    """How a student writes its rollouts: in batches of alike lengths, each sequence from its own random stream.

    Args:
        whole: opens the student as it is now, as a plain model.
    """
    settings = GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_length=max_length,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        seed=seed,
    )

    def write(prompts: Sequence[Sequence[int]], keys: Sequence[int]) -> list[list[int]]:
        with whole() as model:
            return generate(model, tokenizer, prompts, settings, keys=keys)

    return write
