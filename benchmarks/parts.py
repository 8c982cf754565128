"""What a step is made of, and its floor: the contestants and the clock of ``step.py``'s case "floor".

The floor is what no method can do without: both models' bodies, both LM heads at the positions that have a label, the
student's backward and AdamW, in plain PyTorch on the same batches in the same dtype. No loss is computed: the
student's logits get the teacher's as their upstream gradient, because nothing is cheaper.

    python benchmarks/parts.py RUN.yaml --steps 5      # seconds of each part, as JSON
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import Work

from mta_ds.config import load

PARTS = (
    "loader",
    "student forward",
    "teacher forward",
    "structural",
    "divergence",
    "backward",
    "optimizer",
    "communication",
)
OTHER = "everything else"


class Clock:
    """Adds up the seconds of sections; a section inside another is taken out of that one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open = [OTHER]
        self._since = time.perf_counter()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Charge what runs inside to ``name``."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Make every call of a function or method a section."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.section(name):
                return function(*arguments, **options)

        setattr(owner, attribute, timed)

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        self._charge()
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken

    def _charge(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


def make_step(config_path: Path, clock: Clock | None = None) -> Work:
    """A run of ``mta-ds train`` on one rank; each call loads and trains the next step."""
    from mta_ds.engine import RunConfig, distributed
    from mta_ds.engine.setup import prepare
    from mta_ds.engine.train import steps, train_step

    distributed.initialise()
    run = prepare(load(config_path, RunConfig))
    if clock is not None:
        attach_clock(clock, run)
    coming = enumerate(steps(run, 0, lambda: True), 1)

    def work() -> None:
        step, (source, batches) = next(coming)
        train_step(run, step, batches, source)

    return work


def attach_clock(clock: Clock, run: Any) -> None:
    """Charge each part of a step to its name."""
    import deepspeed
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    from mta_ds.engine.distiller import Distiller, StructuralLoss
    from mta_ds.losses.method import BaseLoss

    clock.wrap(run.loader, "next_step", "loader")
    clock.wrap(Distiller, "run_student", "student forward")
    clock.wrap(run.teacher, "run", "teacher forward")
    clock.wrap(StructuralLoss, "align", "structural")
    clock.wrap(StructuralLoss, "attach", "structural")
    clock.wrap(BaseLoss, "finish", "divergence")
    clock.wrap(run.engine, "backward", "backward")
    clock.wrap(run.engine, "step", "optimizer")
    # what partitioning costs: gathering and releasing parameters, reducing gradients into partitions, collectives
    for owner, attributes in (
        (PartitionedParameterCoordinator, ("fetch_sub_module", "release_sub_module", "reset_step")),
        (DeepSpeedZeroOptimizer_Stage3, ("reduce_ready_partitions_and_remove_grads",)),
        (DeepSpeedZeroOptimizer_Stage3, ("independent_gradient_partition_epilogue",)),
        (deepspeed.zero.GatheredParameters, ("__enter__", "__exit__")),
        (torch.distributed, ("all_reduce", "all_gather_object", "barrier")),
    ):
        for attribute in attributes:
            clock.wrap(owner, attribute, "communication")


def make_floor(config_path: Path) -> Work:
    """The bare pair on the same batches; each call runs the next step."""
    from mta_ds.data import IGNORED, StepLoader
    from mta_ds.engine import RunConfig
    from mta_ds.engine.pair import prepare_pair
    from mta_ds.engine.setup import load_data, pad_id
    from mta_ds.models import load_pretrained, output_head, ragged

    config = load(config_path, RunConfig)
    pair = prepare_pair(config)
    train, _ = load_data(config, pair.tokenizer, pair.method.pairs)
    options = config.train
    loader = StepLoader(
        train,
        pad_id(pair.tokenizer),
        options.seed,
        options.micro_batch_size,
        options.gradient_accumulation_steps,
        rank=0,
        world_size=1,
    )
    student = load_pretrained(pair.student_dir, options.dtype)
    teacher = load_pretrained(pair.teacher_dir, options.dtype).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)

    def logits(model: Any, batch: Any) -> torch.Tensor:
        output = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        counted = ragged(output.last_hidden_state, batch.valid)[batch.targets != IGNORED]
        return counted @ output_head(model).T

    def work() -> None:
        for batch in loader.next_step():
            with torch.no_grad():
                upstream = logits(teacher, batch)
            logits(student, batch).backward(upstream)
        optimizer.step()
        optimizer.zero_grad()

    return work


def time_parts(config_path: Path, num_steps: int, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of each part over ``num_steps`` steps."""
    clock = Clock()
    work: Callable[[], object] = make_step(config_path, clock)
    taken = []
    for _ in range(warm_up + num_steps):
        clock.take()
        work()
        taken.append(clock.take())
    return {name: statistics.median(each.get(name, 0.0) for each in taken[warm_up:]) for name in (*PARTS, OTHER)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("config", type=Path, help="a run's YAML")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    print(json.dumps(time_parts(arguments.config, arguments.steps)))


if __name__ == "__main__":
    main()
