"""Build all that a run needs from its configuration, in the order DeepSpeed wants it: student first, then teacher."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import nn

from mta_ds.data import EncodedDataset, StepLoader, build_dataset
from mta_ds.engine import distributed
from mta_ds.engine.config import RunConfig, TrainConfig
from mta_ds.engine.distiller import Distiller
from mta_ds.engine.environment import code_state
from mta_ds.engine.health import StepGuard
from mta_ds.engine.inputs import input_hashes
from mta_ds.engine.metrics import insist_on_wandb
from mta_ds.engine.pair import Pair, check_parser, check_prompts, prepare_pair, reads_final_state
from mta_ds.engine.regenerate import EpochPairs
from mta_ds.engine.rollouts import Rollouts, make_writer
from mta_ds.errors import UsageError
from mta_ds.losses import DistiLLM2Config, Method
from mta_ds.models import (
    StreamingTeacher,
    Tokenizer,
    base_name,
    chunk_mlps,
    inject_adapters,
    load_config,
    load_pretrained,
    load_teacher,
    student_config,
    teacher_config,
    verify_weights,
    whole_copy,
)
from mta_ds.models.zero import read_deepspeed_config
from mta_ds.spans.pool import ParserPool
from mta_ds.spans.store import SpanStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """A run ready to step."""

    config: RunConfig
    pair: Pair
    engine: Any
    """DeepSpeed's engine around a :class:`Distiller`."""
    teacher: StreamingTeacher | None
    train: EncodedDataset
    validation: EncodedDataset | None
    loader: StepLoader
    rollouts: Rollouts | None
    """In the loader's place, for a method that trains on student text."""
    epoch_pairs: EpochPairs | None
    """Makes each epoch's data set, for a method that writes its records anew."""
    guard: StepGuard
    num_steps: int
    zero_stage: int
    inputs: Mapping[str, str]
    """Hashes of what the run learns from."""

    @property
    def distiller(self) -> Distiller:
        return self.engine.module  # type: ignore[no-any-return]

    @property
    def method(self) -> Method:
        return self.pair.method


def prepare(config: RunConfig, between: Callable[[], None] = lambda: None) -> Run:
    """Load data and models, partition them, and wrap both in their engines; torch.distributed must be initialised.

    Args:
        between: called between parts that take long, by every rank; it may raise, to stop.
    """
    set_seed(config.train.seed)
    set_determinism(config.train.deterministic)
    distributed.insist_on_agreement(common_to_ranks(config))
    distributed.on_rank_zero_first(lambda: refuse_early(config))
    between()
    pair = distributed.on_rank_zero_first(lambda: prepare_pair(config))
    between()
    train, validation = distributed.on_rank_zero_first(lambda: load_data(config, pair.tokenizer, pair.method.pairs))
    keys = {"training set": train.key, "validation set": validation.key if validation is not None else ""}
    distributed.insist_on_agreement(keys)
    distributed.on_rank_zero_first(lambda: check_prompts(pair.method, train))
    distributed.on_rank_zero_first(lambda: check_parser(config, pair.method))
    loader = StepLoader(
        train,
        pad_id=pad_id(pair.tokenizer),
        seed=config.train.seed,
        micro_batch_size=config.train.micro_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        length_grouping=config.train.length_grouping,
    )
    inputs = input_hashes(config, pair, train, validation)
    between()
    engine = make_student_engine(config, pair)
    between()
    teacher = make_teacher(config, pair)
    between()
    num_steps = number_of_steps(config.train, len(train) // train.group, distributed.world_size())
    rollouts = make_rollouts(config, pair, loader, engine, num_steps)
    epoch_pairs = make_epoch_pairs(config, pair, engine, teacher, inputs)
    set_seed(config.train.seed + distributed.rank())
    return Run(
        config,
        pair,
        engine,
        teacher,
        train,
        validation,
        loader,
        rollouts,
        epoch_pairs,
        StepGuard(config.train.non_finite, config.train.spike_factor),
        num_steps=num_steps,
        zero_stage=engine.zero_optimization_stage(),
        inputs=inputs,
    )


def common_to_ranks(config: RunConfig) -> dict[str, str]:
    """What all ranks must have in common before anything is loaded, by what it is."""
    values = {"configuration": config.model_dump_json(), "code or package": code_state()}
    for name, path in (("teacher", config.teacher.deepspeed), ("student", config.student.deepspeed)):
        content = path.read_text("utf-8") if path is not None and path.is_file() else ""
        values[f"DeepSpeed configuration of the {name}"] = content
    return values


def refuse_early(config: RunConfig) -> None:
    """Find now what would stop the run only when models and data are loaded.

    Raises:
        UserError: a DeepSpeed configuration or a package is missing or wrong.
    """
    check_deepspeed(config)
    if config.train.wandb_project is not None and distributed.rank() == 0:
        insist_on_wandb()


def check_deepspeed(config: RunConfig, on_this_machine: bool = True) -> None:
    """Refuse a DeepSpeed configuration of either model that its engine would not take.

    Args:
        on_this_machine: look also for what only the machine that trains need have: NVMe folders, libaio.

    Raises:
        UsageError: a key that the YAML owns, a wrong stage or offload, or bad JSON.
    """
    train, teacher = config.train, config.teacher
    batch = train.micro_batch_size, train.gradient_accumulation_steps
    student_config(config.student.deepspeed, train.dtype, *batch, distributed.world_size(), train.gradient_clipping)
    if teacher.quantization is None:
        teacher_config(teacher.deepspeed, train.dtype, train.micro_batch_size, on_this_machine)


def load_data(config: RunConfig, tokenizer: Tokenizer, pairs: bool) -> tuple[EncodedDataset, EncodedDataset | None]:
    """Training and validation sets, encoded by rank 0 into memory-mapped files that every rank opens.

    Nobody reads spans of the validation set, nor of records that are answered anew at each epoch: those only say how
    many there are, by their prompts alone where no response is kept.
    """
    data = config.data
    if not data.train:
        raise UsageError("data.train: no training records are named")
    store = open_store(config)
    if config.regenerates:
        pairs, store = False, None
    prompts_only = isinstance(config.loss, DistiLLM2Config) and config.loss.regenerate == "both"

    def build(inputs: tuple[str, ...], store: SpanStore | None, **kind: bool) -> EncodedDataset:
        cache = config.run_dir / "cache"
        return distributed.on_rank_zero_first(lambda: build_dataset(inputs, data, tokenizer, store, cache, **kind))

    train = build(data.train, store, pairs=pairs, prompts_only=prompts_only)
    return train, build(data.validation, None) if data.validation else None


def open_store(config: RunConfig) -> SpanStore | None:
    """The run's span store, or None with MTA off.

    Raises:
        UserError: it is missing, unfinished or damaged.
    """
    path = config.data.spans
    if config.mta is None or path is None:
        return None
    return distributed.on_rank_zero_first(lambda: SpanStore.open(path))


def make_student_engine(config: RunConfig, pair: Pair) -> Any:
    """Student and projections in one module under one engine, so that one backward and one step serve both."""
    train = config.train
    engine_config = student_config(
        config.student.deepspeed,
        train.dtype,
        train.micro_batch_size,
        train.gradient_accumulation_steps,
        distributed.world_size(),
        train.gradient_clipping,
    )
    model = load_pretrained(pair.student_dir, train.dtype, engine_config, config.student.trust_remote_code)
    if train.verify_weights:
        verify_weights(model, pair.student_dir)
    if config.student.lora is not None:
        base = base_name(config.student.path, pair.student_dir)
        inject_adapters(model, config.student.lora, train.seed, base)
    if config.student.mlp_chunk is not None:
        chunk_mlps(model, config.student.mlp_chunk)
    model.train()  # it comes in evaluation mode, in which no layer is recomputed and nothing is dropped
    if not train.dropout:
        switch_dropout_off(model)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = load_config(pair.teacher_dir, config.teacher.trust_remote_code)
    distiller = Distiller(model, teacher, pair.key_layers, config.mta, pair.method)
    distiller.to(getattr(torch, train.dtype))
    # fused: one pass over parameters and moments, without temporaries of their size
    optimizer = torch.optim.AdamW(parameter_groups(distiller, config), betas=train.betas, fused=True)
    engine, *_ = deepspeed.initialize(model=distiller, optimizer=optimizer, config=engine_config)
    distiller.register_taps()
    return engine


def make_rollouts(config: RunConfig, pair: Pair, loader: StepLoader, engine: Any, num_steps: int) -> Rollouts | None:
    """What the student writes and trains on, with the parsers for it; None for a method that does not."""
    options = pair.method.rollouts
    if options is None:
        return None
    open_pool = None
    if config.mta is not None and options.parser_workers:
        spec = config.parse.parser if config.parse is not None else None
        in_flight = (options.ahead + 1) * loader.samples_per_step  # all: a step never waits to hand its texts over
        open_pool = partial(ParserPool, spec, options.parser_workers, ahead=in_flight)
    student = engine.module.student.model
    seed = config.train.seed
    write = make_writer(lambda: whole_copy(student), pair.tokenizer, options, config.data.max_length, seed)
    return Rollouts(pair.method, loader, write, config.data, pair.tokenizer, seed, num_steps, open_pool)


def make_epoch_pairs(
    config: RunConfig, pair: Pair, engine: Any, teacher: StreamingTeacher | None, inputs: Mapping[str, str]
) -> EpochPairs | None:
    """What writes the records anew at each epoch; None for a method that does not."""
    if not config.regenerates:
        return None
    writes = teacher if isinstance(config.loss, DistiLLM2Config) and config.loss.regenerate == "both" else None
    return EpochPairs(config, pair.tokenizer, engine.module.student.model, writes, inputs)


def make_teacher(config: RunConfig, pair: Pair) -> StreamingTeacher | None:
    """The teacher's engine, or None for a run that reads neither its logits nor its layers (plain SFT)."""
    needs_final = reads_final_state(config, pair.method)
    layers = sorted({layer.teacher for layer in pair.key_layers} | set(pair.method.key_layers))
    if not needs_final and not layers:
        return None
    train = config.train
    return load_teacher(
        pair.teacher_dir,
        config.teacher,
        train.dtype,
        train.micro_batch_size,
        layers,
        needs_final,
        verify=train.verify_weights,
    )


def parameter_groups(distiller: Distiller, config: RunConfig) -> list[dict[str, Any]]:
    """AdamW's groups: the student's matrices with weight decay, its vectors without, the projections at their own rate.

    ``peak_lr`` stays in each group: the schedule multiplies it, so that resuming needs no scheduler state.
    """
    student = [p for p in distiller.student.parameters() if p.requires_grad]
    matrices = [p for p in student if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in student if len(getattr(p, "ds_shape", p.shape)) <= 1]
    decay, lr = config.train.weight_decay, config.train.lr
    projection_lr = config.mta.projection_lr if config.mta else lr
    groups: Iterable[tuple[list[nn.Parameter], float, float]] = (
        (matrices, lr, decay),
        (vectors, lr, 0.0),
        (list(distiller.projections.parameters()), projection_lr, decay),
    )
    return [{"params": p, "lr": rate, "peak_lr": rate, "weight_decay": wd} for p, rate, wd in groups if p]


def switch_dropout_off(model: nn.Module) -> None:
    """Set every dropout to zero in the modules, not in the config, which the export keeps as it was."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def number_of_steps(train: TrainConfig, num_records: int, world_size: int) -> int:
    """Optimizer steps of the run."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None  # TrainConfig holds one of the two
    per_step = train.micro_batch_size * train.gradient_accumulation_steps * world_size
    return max(1, round(train.epochs * num_records / per_step))


def student_zero_stage(config: RunConfig) -> int:
    """The student's ZeRO stage, from its DeepSpeed JSON."""
    return int(read_deepspeed_config(config.student.deepspeed)["zero_optimization"]["stage"])


def pad_id(tokenizer: Tokenizer) -> int:
    """The id that fills up a batch; masked everywhere, so its meaning is nothing."""
    assert isinstance(tokenizer.pad_token_id, int)  # load_tokenizer sees to it
    return tokenizer.pad_token_id


def set_determinism(deterministic: bool) -> None:
    """Have a GPU add up in one order, and refuse what it cannot; must come before anything is computed there."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # else a pass over all new memory, which is written anyway
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
