"""DistiLLM-2's preference pairs, made anew at the start of each epoch by the models as they are then.

    run_dir/epochs/epoch-0000/rejected/      the student's answers, a shard for each rank, as ``mta-ds generate`` writes
                              chosen/        the teacher's, for ``regenerate: both``
                              pairs.jsonl    both joined by record, in the order of their ids
                              spans/         their span store

What is there already is not made again: a run that was killed goes on in the middle of it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from mta_ds.data import EncodedDataset, SpanStore, build_dataset, write_pairs
from mta_ds.engine import distributed
from mta_ds.engine.config import RunConfig
from mta_ds.errors import UserError
from mta_ds.evaluation import answer_shard, finish
from mta_ds.files import write_atomic
from mta_ds.models import StreamingTeacher, Tokenizer, whole_copy
from mta_ds.spans.parse import ParseConfig, parse

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EpochPairs:
    """Makes the data set of an epoch."""

    config: RunConfig
    tokenizer: Tokenizer
    student: PreTrainedModel
    teacher: StreamingTeacher | None
    """The teacher, if it writes the chosen responses anew; else those of ``data.train`` are kept."""

    def dataset(self, epoch: int, *, begins: bool) -> EncodedDataset:
        """The pairs of an epoch (from 0), encoded; every rank must call it.

        Args:
            begins: whether the models are where the epoch begins; later, its pairs must be there.

        Raises:
            UserError: they are not, or no record has two responses.
        """
        folder = self.config.run_dir / "epochs" / f"epoch-{epoch:04d}"
        pairs = folder / "pairs.jsonl"
        is_there = distributed.on_rank_zero_first(pairs.is_file)
        if not is_there:
            if not begins:
                raise UserError(f"{pairs}: is gone, and the models have moved on; start from another run_dir")
            self._answer(folder, epoch)
            distributed.on_rank_zero_first(lambda: self._join(folder))
        spans = self._parse(pairs, folder / "spans") if self.config.mta is not None else None
        cache = self.config.run_dir / "cache"
        return distributed.on_rank_zero_first(
            lambda: build_dataset((str(pairs),), self.config.data, self.tokenizer, spans, cache, pairs=True)
        )

    def _answer(self, folder: Path, epoch: int) -> None:
        """Each rank answers its share of the records, with whole models."""
        logger.info("epoch %d: writing responses", epoch)
        settings = self.config.generation.model_copy(
            update={"seed": self.config.generation.seed + epoch, "num_shards": distributed.world_size()}
        )
        writers = {"rejected": self.student} | ({"chosen": self.teacher.model} if self.teacher is not None else {})
        for half, model in writers.items():
            with whole_copy(model) as whole:
                answer_shard(
                    whole,
                    self.tokenizer,
                    f"{half}, epoch {epoch}",
                    self.config.data.train,
                    folder / half,
                    config=settings,
                    data=self.config.data,
                    shard_index=distributed.rank(),
                )
        distributed.barrier()

    def _join(self, folder: Path) -> None:
        """The ranks' shares as one file, in an order that their number does not change."""
        finish(folder / "rejected")
        chosen = self.config.data.train
        if self.teacher is not None:
            finish(folder / "chosen")
            chosen = (str(folder / "chosen"),)
        joined = folder / "joined.jsonl"
        if not (folder / "pairs.jsonl").is_file():
            write_pairs(chosen, (str(folder / "rejected"),), joined)
            lines = joined.read_bytes().rstrip(b"\n").split(b"\n")
            ordered = sorted(lines, key=lambda line: str(json.loads(line)["id"]))
            write_atomic(folder / "pairs.jsonl", b"\n".join(ordered) + b"\n")

    def _parse(self, pairs: Path, store: Path) -> SpanStore:
        """Each rank parses its share; then the store is complete."""
        own = self.config.parse
        config = ParseConfig(
            inputs=(str(pairs),),
            output=store,
            parser=own.parser if own is not None else None,
            num_shards=distributed.world_size(),
            workers=1,
        )
        parse(config, distributed.rank())
        distributed.barrier()
        distributed.on_rank_zero_first(lambda: parse(config))
        return distributed.on_rank_zero_first(lambda: SpanStore.open(store))
