"""The training stage: read :func:`train` from top to bottom, then :func:`train_step`.

Run it with ``mta-ds train CONFIG --nproc N``, or the same without ``--nproc`` as a rank under torchrun or srun.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mta_ds.config import dump
from mta_ds.data import Batch
from mta_ds.engine import distributed, run_lock
from mta_ds.engine.checkpoint import Checkpoints, load, remove_unfinished
from mta_ds.engine.commit import Progress, find_newest
from mta_ds.engine.config import RunConfig, TrainConfig
from mta_ds.engine.diagnose import find_non_finite
from mta_ds.engine.distiller import global_counts
from mta_ds.engine.environment import describe_environment, describe_ranks, record_start
from mta_ds.engine.export import export_student
from mta_ds.engine.health import Heartbeat
from mta_ds.engine.metrics import MetricsLog, peak_memory_bytes
from mta_ds.engine.regenerate import Watch
from mta_ds.engine.setup import Run, prepare
from mta_ds.engine.shards import own_shard
from mta_ds.engine.stopping import Stopped, StopWatch
from mta_ds.engine.validation import validate_run
from mta_ds.losses import Source

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> bool:
    """Distil the student of ``config``; resumes from the run folder's newest valid checkpoint.

    Returns:
        True when the last step is done and the student exported; False when a signal or the time limit stopped the
        run first: it is saved, and the same call goes on with it.
    """
    with StopWatch(config.train.max_minutes, config.train.stop_grace_seconds) as stop:
        try:
            distributed.initialise()
            with run_lock.hold(config.run_dir):
                return train_until(config, stop)
        except Stopped:
            return False


def train_until(config: RunConfig, stop: StopWatch) -> bool:
    """:func:`train`, in a folder that no other run writes, with signals noted by ``stop``.

    Raises:
        Stopped: one came before the first step.
    """
    heartbeat = Heartbeat(config.run_dir)
    heartbeat.beat(0, "load")
    run = prepare(config, stop.check)
    logger.info("base loss: %s", run.method.describe())
    step = resume(run)
    log = open_log(run, step)
    checkpoints = open_checkpoints(config, step, log)
    # a checkpoint holds what was before its step's validation, which therefore comes again
    again = step == 0 or is_due(step, validate_every(run), run.num_steps)
    if again and not validate_run(run, step, log, heartbeat, stop.signalled):
        raise Stopped
    stopping = False

    def begin_epoch() -> bool:
        checkpoints.finish()  # the models that write are on disk before a stop can come
        heartbeat.beat(step, "generate")
        return use_epoch_pairs(run, Watch(stop.agreed, lambda _: heartbeat.beat(step, "generate")))

    ready = time.perf_counter()
    for source, batches in steps(run, step, begin_epoch):
        step += 1
        heartbeat.beat(step, "step")
        began = time.perf_counter()
        with checkpoints.finished_at_a_stop():
            metrics = train_step(run, step, batches, source)
        checkpoints.poll()
        if is_due(step, config.train.log_every, run.num_steps):
            write_metrics(run, step, source, metrics, (began - ready, time.perf_counter() - began), log)
        stopping = stop.agreed()
        saving = stopping or is_due(step, config.train.save_every, run.num_steps) or regenerates_next(run)
        if saving:
            heartbeat.beat(step, "save")
            save(run, checkpoints, step)
        if not stopping and is_due(step, validate_every(run), run.num_steps):
            stopping = not validate_run(run, step, log, heartbeat, stop.agreed)
            if stopping and not saving:
                save(run, checkpoints, step)
        if stopping:
            break
        ready = time.perf_counter()
        if run.rollouts is not None:
            heartbeat.beat(step, "rollouts")
    checkpoints.finish()
    finished = step >= run.num_steps and not stopping
    if finished:
        heartbeat.beat(step, "export")
        export_student(config, run.pair, run.distiller, step)
    if run.rollouts is not None:
        run.rollouts.close()
    heartbeat.beat(step, "end" if finished else "stopped")
    if log is not None:
        log.close()
    distributed.barrier()  # who ends long before the others would have them killed
    return finished


class StepMetrics(NamedTuple):
    """What a step leaves to be logged."""

    shares: dict[str, Tensor]
    """This rank's share of every metric; their sum over ranks is the value of the whole step."""
    tokens: int
    """Of all ranks, without padding."""


def train_step(run: Run, step: int, batches: list[Batch], source: Source = Source.DATA) -> StepMetrics:
    """One optimizer step over this rank's micro-batches.

    Raises:
        UserError: a NaN or Inf, unless the run leaves such steps out; on every rank, and no weight has changed.
    """
    set_learning_rates(run, step)
    counts = global_counts(batches, step, run.num_steps, source)
    shares: dict[str, Tensor] = {}
    for batch, count in zip(batches, counts, strict=True):
        loss, metrics = run.engine(batch.to(distributed.device()), run.teacher, count)
        loss = run.guard.watch(batch, loss, metrics)
        for name, value in metrics.items():
            shares[name] = shares.get(name, 0) + value
        if batch is batches[-1]:
            loss = run.guard.watch_step(loss, shares["loss"], source)
        run.engine.backward(loss)
        run.engine.step()
    if not run.guard.judge(run.engine, step, partial(find_non_finite, run.engine, run.teacher, batches, counts)):
        run.method.after_step(step, shares, distributed.all_reduce_sum)
    if run.teacher is not None:
        run.teacher.release()
    return StepMetrics(shares, counts[0].base.valid_tokens)


def steps(run: Run, done: int, begin_epoch: Callable[[], bool]) -> Iterator[tuple[Source, list[Batch]]]:
    """Source and micro-batches of each step that is left.

    Args:
        begin_epoch: called before an epoch's first step, for a method that writes its records anew; False ends the run.
    """
    run.loader.samples_consumed = done * samples_per_step(run)
    epoch = None
    for step in range(done + 1, run.num_steps + 1):
        if run.epoch_pairs is not None and run.loader.epoch != epoch:
            epoch = run.loader.epoch
            if not begin_epoch():
                return
        yield run.rollouts.next_step(step) if run.rollouts is not None else (Source.DATA, run.loader.next_step())


def use_epoch_pairs(run: Run, watch: Watch) -> bool:
    """Train on the records of the next step's epoch from now on, made if need be; False if the run stops first."""
    assert run.epoch_pairs is not None
    pairs = run.epoch_pairs.dataset(run.loader.epoch, watch, begins=run.loader.epoch_begins)
    if pairs is None:
        return False
    run.loader.use(pairs)
    return True


def regenerates_next(run: Run) -> bool:
    """Whether the next step waits for new text: a run that stops meanwhile resumes with the models that write it."""
    return run.epoch_pairs is not None and run.loader.epoch_begins


def samples_per_step(run: Run) -> int:
    """Sequences of one optimizer step, over all ranks and micro-batches."""
    train = run.config.train
    return train.micro_batch_size * train.gradient_accumulation_steps * distributed.world_size()


def set_learning_rates(run: Run, step: int) -> None:
    """Give every group its peak rate times the schedule's factor for ``step`` (from 1): no state to save or lose."""
    factor = schedule_factor(step, run.num_steps, run.config.train)
    for group in run.engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def schedule_factor(step: int, num_steps: int, train: TrainConfig) -> float:
    """Share of the peak rate at ``step`` (from 1): linear warm-up, then a half cosine down to ``min_lr_ratio``."""
    if step <= train.warmup_steps:
        return step / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    progress = (step - train.warmup_steps - 1) / max(1, num_steps - train.warmup_steps)
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def is_due(step: int, every: int | None, num_steps: int) -> bool:
    """Whether something that happens every so many steps, and after the last one, happens now."""
    return step == num_steps or (every is not None and step % every == 0)


def validate_every(run: Run) -> int | None:
    """Steps between validations; once an epoch for a method that adapts to them, unless the config says."""
    every = run.config.train.validate_every
    if every is None and run.config.loss.adapts:
        return max(1, len(run.train) // samples_per_step(run))
    return every


def open_checkpoints(config: RunConfig, step: int, log: MetricsLog | None) -> Checkpoints:
    """The run folder's checkpoints, to save into; the run goes on after ``step``."""
    train, root = config.train, config.run_dir / "checkpoints"
    if log is not None:
        remove_unfinished(root)
    return Checkpoints(
        root,
        train.keep_last,
        train.keep_every,
        train.asynchronous_saves,
        resumed_step=step,
        before_commit=log.sync if log is not None else None,
    )


def resume(run: Run) -> int:
    """Restore the newest valid checkpoint, if there is one; returns the number of steps done."""
    own_shard(run.engine)  # what could not be saved is refused now, not after the first hours
    config = run.config
    root = config.run_dir / "checkpoints"
    found = find_newest(root, config.training_hash(), samples_per_step(run), run.inputs)
    if found is None:
        return 0
    folder, progress = found
    load(run.engine, folder, progress, config.train.seed)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    run.method.load_state(state["method"])
    run.guard.load_state(state["guard"])
    if run.rollouts is not None:
        run.rollouts.load(folder / "rollouts.safetensors")
    logger.info("resumed from %s", folder)
    return progress.step


def save(run: Run, checkpoints: Checkpoints, step: int) -> None:
    """Begin a checkpoint at this step boundary."""
    progress = Progress(
        step=step,
        samples=run.loader.samples_consumed,
        batch_size=samples_per_step(run),
        world_size=distributed.world_size(),
        zero_stage=run.zero_stage,
        config_hash=run.config.training_hash(),
        inputs=run.inputs,
    )

    def save_state(folder: Path) -> list[str]:
        state = {"method": run.method.state(), "guard": run.guard.state()}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
        if run.rollouts is None:
            return ["state.json"]
        run.rollouts.save(folder / "rollouts.safetensors")
        return ["state.json", "rollouts.safetensors"]

    checkpoints.save(run.engine, progress, save_state)


def open_log(run: Run, step: int) -> MetricsLog | None:
    """Rank 0's log, cut back to ``step``; also writes down what is being run, and on what. Every rank must call it."""
    ranks = describe_ranks()
    if distributed.rank() != 0:
        return None
    run_dir = run.config.run_dir
    identity = {
        "training_hash": run.config.training_hash(),
        "training_set": run.train.key,
        "validation_set": run.validation.key if run.validation is not None else None,
    }
    record_start(run_dir, step, dump(run.config), describe_environment(identity, ranks))
    return MetricsLog(run_dir, step, run.config.train.wandb_project)


def write_metrics(
    run: Run,
    step: int,
    source: Source,
    made: StepMetrics,
    seconds: tuple[float, float],
    log: MetricsLog | None,
) -> None:
    """Sum every metric over ranks (every rank must call it) and log the step.

    Args:
        seconds: that the step waited for its sequences (the loader; rollouts, the parser), and that it took then.
    """
    summed = distributed.all_reduce_sum(torch.stack([value.float() for value in made.shares.values()])).tolist()
    totals = dict(zip(made.shares, summed, strict=True))
    if log is None:
        return
    metrics: dict[str, Any] = {"samples": run.loader.samples_consumed} | totals
    metrics |= {f"method/{name}": value for name, value in run.method.state().items()}
    if run.rollouts is not None:
        metrics |= {f"source/{each.value}": float(each is source) for each in Source}
    metrics["lr"] = run.engine.optimizer.param_groups[0]["lr"]
    metrics["grad_norm"] = float(run.engine.get_global_grad_norm())
    if run.guard.skipped:
        metrics["skipped_steps"] = run.guard.skipped
    waited, took = seconds
    perf = {
        "seconds": took,
        "data_seconds": waited,
        "tokens_per_second": made.tokens / (waited + took),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    log.write(step, metrics, perf)
    log.announce(step, run.num_steps, metrics, perf)
