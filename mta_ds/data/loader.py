"""The loader: one optimizer step at a time, in an order that is a pure function of (seed, epoch, global index).

Because of that a position is one number, the samples consumed by all ranks, and a run can be resumed exactly, or with
another number of ranks or another micro-batch: the same samples come in the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from mta_ds.data.collate import Batch, Example, collate


class Examples(Protocol):
    """What the loader reads: a sized, indexed set of examples, those of a record side by side."""

    @property
    def group(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def sample_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of one epoch, int64 [num_samples]."""
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(num_samples)


class StepLoader:
    """Endless iterator over optimizer steps: this rank's micro-batches, one list a step.

    A step is ``micro_batch_size · gradient_accumulation_steps · world_size`` samples, and a sample is a record: with
    pairs a batch has two sequences for each. Epochs run into one another, so no step is short and every rank always
    has equally many forwards.
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
        self._num_samples = len(dataset) // dataset.group
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
    def epoch_begins(self) -> bool:
        """Whether the next step is the first that begins in its epoch."""
        return self.samples_consumed % self._num_samples < self.samples_per_step

    @property
    def epoch(self) -> int:
        """The epoch that the next sample belongs to, from 0."""
        return self.samples_consumed // self._num_samples

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield self.next_step()

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next step: micro-step by micro-step, the ranks side by side."""
        group = self._dataset.group
        batches = []
        for row in self.places():
            samples = [self._sample(self.samples_consumed + place) for place in row]
            batches.append(self.collate([self._dataset[s * group + i] for s in samples for i in range(group)]))
        self.skip_step()
        return batches

    def places(self) -> list[list[int]]:
        """This rank's places among the samples of a step, a list for each micro-batch; the same in every step."""
        firsts = [(micro_step * self._world_size + self._rank) * self._micro for micro_step in range(self._steps)]
        return [list(range(first, first + self._micro)) for first in firsts]

    def example(self, global_index: int) -> Example:
        """The example of a sample by its number since the start of the run; not for pairs."""
        assert self._dataset.group == 1
        return self._dataset[self._sample(global_index)]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A micro-batch of any examples."""
        return collate(examples, self._pad_id)

    def use(self, dataset: Examples) -> None:
        """Take samples from another version of the data set from now on: epochs keep their length, whatever its own."""
        self._dataset = dataset

    def skip_step(self) -> None:
        """Count a step's samples as consumed."""
        self.samples_consumed += self.samples_per_step

    def _sample(self, global_index: int) -> int:
        epoch, position = divmod(global_index, self._num_samples)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, sample_order(self._num_samples, self._seed, epoch))
        return int(self._order[1][position]) % (len(self._dataset) // self._dataset.group)
