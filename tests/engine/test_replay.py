"""The replay buffer: first in, first out; what a draw picks; and that a file holds all of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mta_ds.data import GRANULARITIES, Example
from mta_ds.engine.replay import ReplayBuffer, load_examples, save_examples


def example(number: int, length: int = 4, num_spans: int = 1, prompt_length: int = 2) -> Example:
    generator = np.random.default_rng(number)
    ids = generator.integers(0, 2**31 - 1, length).astype(np.int32)
    labels = np.where(np.arange(length) < prompt_length, -100, ids).astype(np.int32)
    spans = generator.integers(0, length + 1, (num_spans, 2)).astype(np.int32)
    spans.sort(axis=1)
    return Example(f"r{number}", ids, labels, {"word": spans, "phrase": spans[1:]}, prompt_length)


def names(examples: list[Example]) -> list[str]:
    return [each.record_id for each in examples]


def test_first_in_first_out() -> None:
    buffer = ReplayBuffer(5)
    assert len(buffer) == 0 and buffer.examples() == []
    buffer.push(map(example, range(3)))
    assert len(buffer) == 3 and names(buffer.examples()) == ["r0", "r1", "r2"]
    buffer.push(map(example, range(3, 7)))
    assert len(buffer) == 5 and names(buffer.examples()) == ["r2", "r3", "r4", "r5", "r6"]
    buffer.push(map(example, range(10, 18)))  # more than it holds
    assert names(buffer.examples()) == ["r13", "r14", "r15", "r16", "r17"]
    buffer.push([])
    assert len(buffer) == 5


def test_a_draw_is_uniform_over_what_is_there() -> None:
    buffer = ReplayBuffer(8)
    buffer.push(map(example, range(4)))
    random = np.random.default_rng(0)
    drawn = [name for _ in range(2000) for name in names(buffer.draw(2, random))]
    counts = np.unique(drawn, return_counts=True)[1]
    assert len(counts) == 4 and counts.min() > 900
    assert buffer.draw(0, random) == []


def test_no_sequence_is_drawn_twice_while_there_are_enough() -> None:
    buffer = ReplayBuffer(8)
    buffer.push(map(example, range(8)))
    for seed in range(50):
        drawn = names(buffer.draw(8, np.random.default_rng(seed)))
        assert sorted(drawn) == [f"r{i}" for i in range(8)]
    assert len(buffer.draw(9, np.random.default_rng(0))) == 9  # a step of more sequences than there are


@pytest.mark.parametrize(
    "examples",
    [
        [],
        [example(0)],
        [example(0, 5, 0), example(1, 1, 0, 1), example(2, 9, 4), example(3, 2, 0)],
        [example(i, 3, 0) for i in range(3)],
    ],
    ids=["empty", "one", "ragged", "without spans"],
)
def test_a_file_holds_everything(tmp_path: Path, examples: list[Example]) -> None:
    note = {"plans": {"7": ["student", [[1, 2], []]]}, "vocabulary": "ü"}
    save_examples(tmp_path / "rollouts.safetensors", examples, note)
    found, found_note = load_examples(tmp_path / "rollouts.safetensors")
    assert found_note == note and names(found) == names(examples)
    for got, want in zip(found, examples, strict=True):
        assert got.prompt_length == want.prompt_length and not got.is_rejected
        pairs = [(got.input_ids, want.input_ids), (got.labels, want.labels)]
        pairs += [(got.spans[name], want.spans[name]) for name in GRANULARITIES]
        for ours, theirs in pairs:
            assert ours.dtype == np.int32 and ours.shape == theirs.shape and np.array_equal(ours, theirs)


def test_a_resumed_buffer_goes_on_as_the_old_one(tmp_path: Path) -> None:
    old, resumed = ReplayBuffer(4), ReplayBuffer(4)
    old.push(map(example, range(6)))
    save_examples(tmp_path / "file", old.examples(), {})
    resumed.push(load_examples(tmp_path / "file")[0])
    for buffer in (old, resumed):
        buffer.push([example(9)])
    drawn = [names(buffer.draw(3, np.random.default_rng(1))) for buffer in (old, resumed)]
    assert drawn[0] == drawn[1]
    assert names(resumed.examples()) == ["r3", "r4", "r5", "r9"]
