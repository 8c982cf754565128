"""The loader's order is a function of (seed, epoch, global index), however a step is split."""

from __future__ import annotations

import numpy as np
import pytest

from mta_ds.data import Example, StepLoader, grouped_order, pad_share, sample_order


class Numbered:
    """Example i has one token, i; with ``group`` 2, two follow one another for each record."""

    def __init__(self, size: int, group: int = 1) -> None:
        self.size = size
        self.group = group

    @property
    def lengths(self) -> np.ndarray:
        return np.random.default_rng(0).integers(1, 400, self.size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Example:
        ids = np.array([i], dtype=np.int32)
        none = np.zeros((0, 2), dtype=np.int32)
        return Example(str(i), ids, ids, {"word": none, "phrase": none}, 0, is_rejected=i % self.group == 1)


def steps(
    size: int, micro: int, gas: int, world: int, num: int, start: int = 0, seed: int = 3, block: int | None = None
) -> list[list[int]]:
    """Samples of each step over all ranks, in global order."""
    loaders = [StepLoader(Numbered(size), 0, seed, micro, gas, rank, world, block) for rank in range(world)]
    for loader in loaders:
        loader.samples_consumed = start
    found = []
    for _ in range(num):
        per_rank = [loader.next_step() for loader in loaders]
        assert all(len(batches) == gas for batches in per_rank)
        found.append([int(r) for i in range(gas) for batches in per_rank for r in batches[i].record_ids])
    return found


@pytest.mark.parametrize(("micro", "gas", "world"), [(12, 1, 1), (6, 2, 1), (3, 1, 4), (2, 3, 2), (1, 12, 1)])
def test_a_step_holds_the_same_samples_however_it_is_split(micro: int, gas: int, world: int) -> None:
    assert steps(31, micro, gas, world, 5) == steps(31, 12, 1, 1, 5)


def test_position_alone_says_what_comes_next() -> None:
    whole = steps(31, 4, 1, 2, 9)
    assert steps(31, 4, 1, 2, 4, start=5 * 8) == whole[5:]
    assert steps(31, 2, 2, 2, 4, start=5 * 8) == whole[5:]


def test_every_epoch_holds_every_sample_once_in_its_own_order() -> None:
    flat = [i for step in steps(10, 1, 1, 1, 30) for i in step]
    epochs = [flat[k : k + 10] for k in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs == [sample_order(10, 3, epoch).tolist() for epoch in range(3)]
    assert flat != [i for step in steps(10, 1, 1, 1, 30, seed=4) for i in step]


def test_more_samples_a_step_than_the_data_has() -> None:
    ((first),) = steps(3, 4, 1, 2, 1)
    assert len(first) == 8 and set(first) == {0, 1, 2}


def test_position_and_epoch_are_known() -> None:
    loader = StepLoader(Numbered(10), 0, 0, 2, 2, 0, 1)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    assert (loader.samples_consumed, loader.epoch, loader.samples_per_step) == (12, 1, 4)
    with pytest.raises(ValueError, match="no examples"):
        StepLoader(Numbered(0), 0, 0, 1, 1, 0, 1)


@pytest.mark.parametrize(("micro", "gas", "world"), [(6, 1, 1), (3, 2, 1), (1, 2, 3)])
def test_pairs_come_whole_and_in_the_order_of_their_records(micro: int, gas: int, world: int) -> None:
    single = steps(7, 6, 1, 1, 4)
    loaders = [StepLoader(Numbered(14, group=2), 0, 3, micro, gas, rank, world) for rank in range(world)]
    for expected in single:
        per_rank = [loader.next_step() for loader in loaders]
        batches = [batches[i] for i in range(gas) for batches in per_rank]
        assert all(batch.rejected == (False, True) * micro for batch in batches)
        assert all(len(batch.input_ids) == batch.counts.sequences == 2 * micro for batch in batches)
        found = [int(record) for batch in batches for record in batch.record_ids]
        assert found == [2 * record + half for record in expected for half in (0, 1)]
    assert loaders[0].epoch == 4 * 6 // 7 and loaders[0].samples_consumed == 24


@pytest.mark.parametrize(("micro", "gas", "world"), [(6, 2, 1), (3, 1, 4), (2, 3, 2)])
def test_grouped_by_length_a_step_holds_the_same_samples_however_it_is_split(micro: int, gas: int, world: int) -> None:
    whole = steps(31, 12, 1, 1, 9, block=4)
    assert steps(31, micro, gas, world, 9, block=4) == whole
    assert steps(31, micro, gas, world, 4, start=5 * 12, block=4) == whole[5:]
    # another step size goes on from the same sample
    flat = [i for step in whole for i in step]
    assert [i for step in steps(31, 2, 1, 1, 10, start=24, block=4) for i in step] == flat[24:44]
    assert whole != steps(31, 12, 1, 1, 9)


@pytest.mark.parametrize("size", [5, 16, 1003, 3200])
def test_every_grouped_epoch_holds_every_sample_once_and_blocks_of_similar_length(size: int) -> None:
    lengths, block = Numbered(size).lengths, 16
    orders = [grouped_order(lengths, block, seed, epoch) for seed, epoch in ((3, 0), (3, 1), (4, 0))]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert all(np.array_equal(a, grouped_order(lengths, block, 3, i)) for i, a in enumerate(orders[:2]))
    if size > block:
        assert not any(np.array_equal(orders[0], order) for order in orders[1:])
        blocks = lengths[orders[0][: size - size % block]].reshape(-1, block)
        # 50 blocks share the range of lengths; at random each would span nearly all of it
        assert np.median(np.ptp(blocks, axis=1)) < 30
        means = blocks.mean(axis=1)
        assert (np.diff(means) < 0).any() and (np.diff(means) > 0).any(), "blocks come in random order"


def test_pad_share_is_that_of_the_batches() -> None:
    lengths = np.array([4, 1, 2, 4, 3])
    assert pad_share(lengths, np.array([0, 1, 2, 3, 4]), 2) == pytest.approx(1 - 14 / (8 + 8 + 3))
    assert pad_share(lengths, np.array([0, 3, 1, 2, 4]), 2) == pytest.approx(1 - 14 / (8 + 4 + 3))
    many = Numbered(3200).lengths
    shares = [pad_share(many, order, 8) for order in (sample_order(3200, 0, 0), grouped_order(many, 32, 0, 0))]
    assert shares[1] < 0.1 * shares[0] < shares[0] < 0.6


def test_a_pair_is_as_long_as_its_longer_half() -> None:
    loader = StepLoader(Numbered(40, group=2), 0, 3, 4, 1, 0, 1, length_grouping=4)
    longer = Numbered(40).lengths.reshape(-1, 2).max(axis=1)
    found = [int(record) // 2 for _ in range(5) for record in loader.next_step()[0].record_ids[::2]]
    assert found == grouped_order(longer, 4, 3, 0).tolist()
