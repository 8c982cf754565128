"""Validation in the middle of training: held-out loss and KL, through the engines as they are partitioned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from mta_ds.data import Batch, EncodedDataset, collate
from mta_ds.engine import distributed
from mta_ds.engine.health import Heartbeat
from mta_ds.engine.metrics import MetricsLog
from mta_ds.engine.setup import Run, pad_id
from mta_ds.engine.stopping import Stopped
from mta_ds.evaluation import Scores, validate


def validate_run(
    run: Run, step: int, log: MetricsLog | None, heartbeat: Heartbeat, stopping: Callable[[], bool]
) -> bool:
    """Token means of label cross-entropy and KL(teacher ‖ student) over ``data.validation``; every rank takes part.

    Args:
        stopping: whether to give up, asked before each batch; every rank asks together and gets one answer.

    Returns:
        Whether it came to its end; if not, nothing has changed, and it has to come again.
    """
    if run.validation is None:
        return True

    def score(batch: Batch) -> Scores:
        sums = run.engine(batch.to(distributed.device()), run.teacher)
        return Scores(sums["cross_entropy"], sums.get("divergence"), sums["count"])

    def batches(validation: EncodedDataset) -> Iterator[Batch]:
        size, pad = run.config.train.micro_batch_size, pad_id(run.pair.tokenizer)
        for batch in rank_batches(validation, size, pad, distributed.rank(), distributed.world_size()):
            heartbeat.beat(step, "validate")
            if stopping():
                raise Stopped
            yield batch

    run.engine.eval()
    try:
        result = validate(score, batches(run.validation), distributed.all_reduce_sum)
    except Stopped:
        return False
    finally:
        run.engine.train()
        if run.teacher is not None:
            run.teacher.release()
    run.method.after_validation(result.loss)
    if log is not None:
        log.write(step, {"validation/loss": result.loss, "validation/kl": result.kl or 0.0}, {})
        log.say(f"step {step}: held-out loss {result.loss:.4f}, KL to the teacher {result.kl or 0.0:.4f}")
    return True


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
