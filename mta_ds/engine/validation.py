"""Validation in the middle of training: held-out loss and KL, through the engines as they are partitioned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from mta_ds.data import Batch, EncodedDataset, collate
from mta_ds.engine import distributed
from mta_ds.engine.metrics import MetricsLog
from mta_ds.engine.setup import Run, pad_id
from mta_ds.evaluation import Scores, Validation, validate


def validate_run(run: Run, step: int, log: MetricsLog | None) -> Validation | None:
    """Token means of label cross-entropy and KL(teacher ‖ student) over ``data.validation``; every rank takes part."""
    if run.validation is None:
        return None

    def score(batch: Batch) -> Scores:
        sums = run.engine(batch.to(distributed.device()), run.teacher)
        return Scores(sums["cross_entropy"], sums.get("divergence"), sums["count"])

    run.engine.eval()
    batches = rank_batches(
        run.validation,
        run.config.train.micro_batch_size,
        pad_id(run.pair.tokenizer),
        distributed.rank(),
        distributed.world_size(),
    )
    result = validate(score, batches, distributed.all_reduce_sum)
    run.engine.train()
    if run.teacher is not None:
        run.teacher.release()
    run.method.after_validation(result.loss)
    if log is not None:
        log.write(step, {"validation/loss": result.loss, "validation/kl": result.kl or 0.0}, {})
        log.say(f"step {step}: held-out loss {result.loss:.4f}, KL to the teacher {result.kl or 0.0:.4f}")
    return result


def rank_batches(dataset: EncodedDataset, batch_size: int, pad_id: int, rank: int, world_size: int) -> Iterator[Batch]:
    """This rank's share of a data set, in as many batches as every other rank's.

    Under ZeRO-3 a forward is a collective, so all ranks must run equally many: whoever has no record left runs one
    again with every target ignored.
    """
    per_rank = -(-len(dataset) // world_size)
    for start in range(0, per_rank, batch_size):
        examples = []
        for i in range(start, min(start + batch_size, per_rank)):
            index = i * world_size + rank
            example = dataset[min(index, len(dataset) - 1)]
            if index >= len(dataset):
                example = dataclasses.replace(example, labels=np.full_like(example.labels, -100))
            examples.append(example)
        yield collate(examples, pad_id)
