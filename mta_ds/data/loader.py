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

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int [len]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


# Blocks of similar length that are formed together: more would group more sharply, and shuffle less.
_BLOCKS_AT_ONCE = 50


def sample_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of one epoch, int64 [num_samples]."""
    return _generator(seed, epoch).permutation(num_samples)


def grouped_order(lengths: np.ndarray, block: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of one epoch in which every ``block`` samples that follow one another are of similar length.

    The epoch's random order is cut into stretches of 50 blocks; each is sorted by length and its blocks come in random
    order. What does not fill a block comes last. Nothing depends on how a step is split.

    Args:
        lengths: tokens of each sample [num_samples].

    Returns:
        int64 [num_samples].
    """
    order = sample_order(len(lengths), seed, epoch)
    random = _generator(seed, epoch, 1)
    whole = len(order) - len(order) % block
    parts = []
    for start in range(0, whole, block * _BLOCKS_AT_ONCE):
        stretch = _by_length(order[start : min(start + block * _BLOCKS_AT_ONCE, whole)], lengths)
        parts.append(random.permutation(stretch.reshape(-1, block)).ravel())
    return np.concatenate([*parts, _by_length(order[whole:], lengths)])


def pad_share(lengths: np.ndarray, order: np.ndarray, micro_batch_size: int) -> float:
    """Share of padding in an epoch's batches: [B, T] positions that hold no token."""
    ordered = lengths[order]
    starts = range(0, len(ordered), micro_batch_size)
    batches = [ordered[start : start + micro_batch_size] for start in starts]
    return 1 - float(ordered.sum()) / sum(int(batch.max()) * len(batch) for batch in batches)


def _by_length(samples: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return samples[np.argsort(lengths[samples], kind="stable")]


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox([*key]))


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
        length_grouping: int | None = None,
    ) -> None:
        """``length_grouping``: see :func:`grouped_order`; by the lengths of ``dataset``, whatever is used later."""
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
        self._block = length_grouping
        # a pair's halves are padded in one batch: the longer counts
        self._lengths = dataset.lengths.reshape(-1, dataset.group).max(axis=1) if length_grouping else None

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
            self._order = (epoch, self._order_of(epoch))
        return int(self._order[1][position]) % (len(self._dataset) // self._dataset.group)

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._lengths is None or self._block is None:
            return sample_order(self._num_samples, self._seed, epoch)
        return grouped_order(self._lengths, self._block, self._seed, epoch)
