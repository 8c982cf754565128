"""DistiLLM-2's preference pairs, made anew at the start of each epoch by the models as they are then.

    run_dir/epochs/KEY/epoch-0000/rejected/      the student's answers in parts, as ``mta-ds generate`` writes them
                                  chosen/        the teacher's, for ``regenerate: both``
                                  pairs.jsonl    both joined by record, in the order of their ids
                                  spans/         their span store, in as many parts

KEY is a hash of all that decides what the models write: nothing of another run of the same folder is taken for this
one's.

The ranks share out the parts, which do not depend on how many ranks there are. What is there already is not made again:
a run that was stopped or killed goes on in the middle of it, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from mta_ds.data import EncodedDataset, SpanStore, build_dataset, write_pairs
from mta_ds.engine import distributed
from mta_ds.engine.config import RunConfig
from mta_ds.errors import UserError
from mta_ds.evaluation import answer_shard, finish
from mta_ds.evaluation.generated import complete_part as complete_answers
from mta_ds.files import write_atomic
from mta_ds.models import StreamingTeacher, Tokenizer, whole_copy
from mta_ds.spans.merge import complete_part as complete_spans
from mta_ds.spans.parse import ParseConfig, merge_only, parse

logger = logging.getLogger(__name__)


class Watch(NamedTuple):
    """What the run looks after while an epoch's text is written."""

    stopping: Callable[[], bool]
    """Whether to stop now; every rank asks together and gets one answer. Asked after a round of parts, never before the
    first: a run whose time is always up by then would not get on."""
    on_batch: Callable[[int], None]
    """Told the number of prompts after each batch."""


@dataclass(frozen=True, slots=True)
class EpochPairs:
    """Makes the data set of an epoch."""

    config: RunConfig
    tokenizer: Tokenizer
    student: PreTrainedModel
    teacher: StreamingTeacher | None
    """The teacher, if it writes the chosen responses anew; else those of ``data.train`` are kept."""
    inputs: Mapping[str, str]
    """Hashes of what the run learns from."""

    def dataset(self, epoch: int, watch: Watch, *, begins: bool) -> EncodedDataset | None:
        """The pairs of an epoch (from 0), encoded; None if the run stops first. Every rank must call it.

        Args:
            begins: whether the models are where the epoch begins; later, its pairs must be there.

        Raises:
            UserError: they are not, or no record has two responses.
        """
        folder = self.folder(epoch)
        pairs = folder / "pairs.jsonl"
        if not distributed.from_rank_zero(pairs.is_file):
            if not begins:
                raise UserError(f"{pairs}: is gone, and the models have moved on; start from another run_dir")
            if not self._answer(folder, epoch, watch):
                return None
            distributed.on_rank_zero_first(lambda: self._join(folder))
        spans = None
        if self.config.mta is not None:
            if not self._parse(pairs, folder / "spans", watch):
                return None
            spans = distributed.on_rank_zero_first(lambda: SpanStore.open(folder / "spans"))
        cache = self.config.run_dir / "cache"
        return distributed.on_rank_zero_first(
            lambda: build_dataset((str(pairs),), self.config.data, self.tokenizer, spans, cache, pairs=True)
        )

    def folder(self, epoch: int) -> Path:
        """Where the text of an epoch goes."""
        made_of = {"configuration": self.config.training_hash(), **self.inputs}
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
        return self.config.run_dir / "epochs" / key / f"epoch-{epoch:04d}"

    def _answer(self, folder: Path, epoch: int, watch: Watch) -> bool:
        """Both models answer all records, or as far as they come; whether that was to the end."""
        writers = {"rejected": self.student} | ({"chosen": self.teacher.model} if self.teacher is not None else {})
        return all(self._answer_half(half, model, folder, epoch, watch) for half, model in writers.items())

    def _answer_half(self, half: str, model: PreTrainedModel, folder: Path, epoch: int, watch: Watch) -> bool:
        generation = self.config.generation
        missing = self._missing(complete_answers, folder / half)
        if not missing:
            return True  # and no copy of the model is made
        logger.info("epoch %d: writing %s, %d of %d parts", epoch, half, len(missing), generation.num_shards)
        if generation.num_shards < distributed.world_size():
            logger.warning(
                "generation.num_shards: %d ranks share so few parts; some only wait", distributed.world_size()
            )
        with whole_copy(model) as whole:
            answer = partial(
                answer_shard,
                whole,
                self.tokenizer,
                f"{half}, epoch {epoch}",
                self.config.data.train,
                folder / half,
                config=generation.model_copy(update={"seed": generation.seed + epoch}),
                data=self.config.data,
                on_batch=watch.on_batch,
            )
            return _make(missing, lambda part: answer(shard_index=part), watch)

    def _join(self, folder: Path) -> None:
        """The parts as one file, in an order that their number does not change."""
        if (folder / "pairs.jsonl").is_file():
            return
        finish(folder / "rejected")
        chosen = self.config.data.train
        if self.teacher is not None:
            finish(folder / "chosen")
            chosen = (str(folder / "chosen"),)
        joined = folder / "joined.jsonl"
        write_pairs(chosen, (str(folder / "rejected"),), joined)
        lines = joined.read_bytes().rstrip(b"\n").split(b"\n")
        ordered = sorted(lines, key=lambda line: str(json.loads(line)["id"]))
        write_atomic(folder / "pairs.jsonl", b"\n".join(ordered) + b"\n")

    def _parse(self, pairs: Path, store: Path, watch: Watch) -> bool:
        """Make the span store of the pairs, or as much as there is time for; whether it is complete."""
        manifest = store / "manifest.json"
        if distributed.from_rank_zero(manifest.is_file):
            return True  # in however many parts: lookups compare its texts with the records'
        config = ParseConfig(
            inputs=(str(pairs),),
            output=store,
            parser=self.config.parse.parser if self.config.parse is not None else None,
            num_shards=self.config.generation.num_shards,
            workers=1,
        )
        missing = self._missing(complete_spans, store)
        if not _make(missing, lambda part: parse(config, part), watch):
            return False
        distributed.on_rank_zero_first(lambda: None if manifest.is_file() else merge_only(config))
        return True

    def _missing(self, complete: Callable[[Path, int, int], object | None], folder: Path) -> list[int]:
        """The parts that ``folder`` lacks."""
        num_parts = self.config.generation.num_shards
        return distributed.from_rank_zero(
            lambda: [i for i in range(num_parts) if complete(folder, i, num_parts) is None]
        )


def _make(parts: list[int], make: Callable[[int], object], watch: Watch) -> bool:
    """Make the parts in rounds of one a rank; False if the run stops before they are all there."""
    for first in range(0, len(parts), distributed.world_size()):
        mine = first + distributed.rank()
        if mine < len(parts):
            make(parts[mine])
        if watch.stopping():
            return False
    return True
