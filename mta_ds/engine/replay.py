"""The replay buffer: earlier rollouts, one logical queue over all ranks, in the order of their sequences' numbers.

Every rank holds all of it, so that a draw is the same on one rank and on many, and a checkpoint can be resumed by any
number of them. A thousand sequences of 512 tokens are about 4 MB.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mta_ds.data import GRANULARITIES, Example


class ReplayBuffer:
    """First in, first out."""

    def __init__(self, capacity: int) -> None:
        self._examples: deque[Example] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._examples)

    def push(self, examples: Iterable[Example]) -> None:
        """Add examples in order; the oldest go."""
        self._examples.extend(examples)

    def draw(self, number: int, random: np.random.Generator) -> list[Example]:
        """So many examples, uniformly; none of them twice, unless there are fewer."""
        chosen = random.choice(len(self), number, replace=number > len(self))
        return [self._examples[i] for i in chosen]

    def examples(self) -> list[Example]:
        """All of them, the oldest first."""
        return list(self._examples)


def save_examples(path: Path, examples: Sequence[Example], note: dict[str, object]) -> None:
    """Write examples, and a note as JSON, into one safetensors file."""
    lists = {"input_ids": [e.input_ids for e in examples], "labels": [e.labels for e in examples]}
    lists |= {g: [e.spans[g].reshape(-1) for e in examples] for g in GRANULARITIES}
    arrays = {"prompt_length": np.array([e.prompt_length for e in examples], dtype=np.int32)}
    for name, rows in lists.items():
        arrays[name] = np.concatenate([np.zeros(0, dtype=np.int32), *rows]).astype(np.int32)
        arrays[f"{name}.bounds"] = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    ids = [e.record_id for e in examples]
    save_file(arrays, path, {"record_ids": json.dumps(ids), "note": json.dumps(note)})


def load_examples(path: Path) -> tuple[list[Example], dict[str, object]]:
    """What :func:`save_examples` wrote."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def rows(name: str) -> list[np.ndarray]:
        return np.split(arrays[name], arrays[f"{name}.bounds"][1:-1]) if len(arrays["prompt_length"]) else []

    columns = {name: rows(name) for name in ("input_ids", "labels", *GRANULARITIES)}
    examples = [
        Example(
            record_id,
            columns["input_ids"][i],
            columns["labels"][i],
            {g: columns[g][i].reshape(-1, 2) for g in GRANULARITIES},
            int(arrays["prompt_length"][i]),
        )
        for i, record_id in enumerate(json.loads(metadata["record_ids"]))
    ]
    return examples, json.loads(metadata["note"])
