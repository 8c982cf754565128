"""The loader: one optimizer step at a time, in an order that is a pure function of (seed, epoch, global index).

Because of that a position is one number, the samples consumed by all ranks, and a run can be resumed exactly, or with
another number of ranks or another micro-batch: the same samples come in the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from mta_ds.data.collate import Batch, Example, collate


class Examples(Protocol):
    """What the loader reads: a sized, indexed set of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def sample_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of one epoch, int64 [num_samples]."""
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(num_samples)


class StepLoader:
    """Endless iterator over optimizer steps: this rank's micro-batches, one list a step.

    A step is ``micro_batch_size · gradient_accumulation_steps · world_size`` samples. Epochs run into one another, so
    no step is short and every rank always has equally many forwards.
    """

    def __init__(
        self,
        dataset: Examples,
        pad_id: int,
        seed: int,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("dataset: has no examples")
        self.samples_consumed = 0
        """Position: samples of all ranks, since the start of the run. May be set."""
        self._dataset = dataset
        self._pad_id = pad_id
        self._seed = seed
        self._micro = micro_batch_size
        self._steps = gradient_accumulation_steps
        self._rank = rank
        self._world_size = world_size
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, over all ranks."""
        return self._micro * self._steps * self._world_size

    @property
    def epoch(self) -> int:
        """The epoch that the next sample belongs to, from 0."""
        return self.samples_consumed // len(self._dataset)

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield self.next_step()

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next step: micro-step by micro-step, the ranks side by side."""
        batches = []
        for micro_step in range(self._steps):
            first = self.samples_consumed + (micro_step * self._world_size + self._rank) * self._micro
            examples = [self._dataset[self._sample(first + i)] for i in range(self._micro)]
            batches.append(collate(examples, self._pad_id))
        self.samples_consumed += self.samples_per_step
        return batches

    def _sample(self, global_index: int) -> int:
        epoch, position = divmod(global_index, len(self._dataset))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, sample_order(len(self._dataset), self._seed, epoch))
        return int(self._order[1][position])
