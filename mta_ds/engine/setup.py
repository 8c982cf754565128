"""Build all that a run needs from its configuration, in the order DeepSpeed wants it: student first, then teacher."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
from mta_ds.engine.regenerate import EpochPairs
from mta_ds.engine.rollouts import Rollouts, make_writer
from mta_ds.errors import UsageError, UserError
from mta_ds.losses import DistiLLM2Config, FDDConfig, KeyLayerOptions, Method, MTAConfig, make_method
from mta_ds.models import (
    KeyLayer,
    StreamingTeacher,
    Tokenizer,
    adapter_size,
    base_name,
    cut_layers,
    inject_adapters,
    load_config,
    load_pretrained,
    load_teacher,
    load_tokenizer,
    merged_folder,
    random_student,
    resolve_key_layers,
    resolve_model,
    student_config,
    vocabulary_size,
    whole_copy,
)
from mta_ds.models.zero import read_deepspeed_config
from mta_ds.spans.parser import load_parser
from mta_ds.spans.pool import ParserPool
from mta_ds.spans.store import SpanStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two models of a run as folders, before any weight is loaded."""

    teacher_dir: Path
    student_dir: Path
    tokenizer: Tokenizer
    vocab_size: int
    key_layers: tuple[KeyLayer, ...]
    """MTA's; none with MTA off."""
    method: Method


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

    @property
    def distiller(self) -> Distiller:
        return self.engine.module  # type: ignore[no-any-return]

    @property
    def method(self) -> Method:
        return self.pair.method


def prepare_pair(config: RunConfig) -> Pair:
    """Resolve both models, make the student's starting folder if need be, and check that they fit each other.

    Raises:
        UserError: a folder is missing, the vocabularies or EOS differ, or a key layer does not exist.
    """
    teacher_dir = teacher_folder(config)
    student_dir = distributed.on_rank_zero_first(lambda: student_folder(config, teacher_dir))
    tokenizer = load_tokenizer(student_dir, config.student.trust_remote_code)
    check_same_vocabulary(tokenizer, load_tokenizer(teacher_dir, config.teacher.trust_remote_code), config)
    vocab_size = vocabulary_size(tokenizer)
    teacher, student = load_config(teacher_dir), load_config(student_dir)
    for name, model in (("teacher", teacher), ("student", student)):
        if model.vocab_size < vocab_size:
            raise UserError(f"{name}: the model has {model.vocab_size} embeddings, its tokenizer {vocab_size} ids")
    if config.student.lora is not None:
        adapter_size(student, config.student.lora)  # finds a wrong target now, not when the data is encoded
    depths = (student.num_hidden_layers, teacher.num_hidden_layers)
    return Pair(
        teacher_dir,
        student_dir,
        tokenizer,
        vocab_size,
        key_layers(config.mta, *depths) if config.mta is not None else (),
        choose_method(config, vocab_size, *depths),
    )


def prepare(config: RunConfig) -> Run:
    """Load data and models, partition them, and wrap both in their engines; torch.distributed must be initialised."""
    set_seed(config.train.seed)
    distributed.insist_on_agreement({"configuration": config.model_dump_json(), "code or package": code_state()})
    pair = prepare_pair(config)
    train, validation = load_data(config, pair.tokenizer, pair.method.pairs)
    keys = {"training set": train.key, "validation set": validation.key if validation is not None else ""}
    distributed.insist_on_agreement(keys)
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
    engine = make_student_engine(config, pair)
    teacher = make_teacher(config, pair)
    num_steps = number_of_steps(config.train, len(train) // train.group, distributed.world_size())
    rollouts = make_rollouts(config, pair, loader, engine, num_steps)
    epoch_pairs = make_epoch_pairs(config, pair, engine, teacher)
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
    )


def teacher_folder(config: RunConfig) -> Path:
    """The teacher's folder; one with an adapter is merged into the run's cache, once."""
    teacher = config.teacher
    return distributed.on_rank_zero_first(
        lambda: merged_folder(
            resolve_model(teacher.path), teacher.adapter, config.run_dir / "cache", teacher.trust_remote_code
        )
    )


def student_folder(config: RunConfig, teacher_dir: Path) -> Path:
    """The folder the student starts from; a cut or random student is made in the run folder, once."""
    source = config.student
    if source.path is not None:
        return resolve_model(source.path)
    output = config.run_dir / "student_init"
    if output.is_dir():
        return output
    if source.config is not None:
        if not source.config.exists():
            raise UserError(f"student.config: {source.config}: no such file")
        return random_student(source.config, config.train.seed, teacher_dir, output)
    assert source.teacher_layers is not None  # StudentConfig holds exactly one source
    return cut_layers(teacher_dir, source.teacher_layers, output, config.teacher.trust_remote_code)


def check_same_vocabulary(student: Tokenizer, teacher: Tokenizer, config: RunConfig) -> None:
    """Token-level losses compare ids, so both tokenizers must give every id the same meaning."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = next(iter(sorted(set(ours.items()) ^ set(theirs.items()))))
        raise UserError(
            f"teacher and student vocabularies differ ({len(theirs)} and {len(ours)} tokens; first difference: "
            f"{differing[0]!r}); distil between models of one tokenizer"
        )
    for name in ("eos_token_id", "bos_token_id"):
        if getattr(student, name) != getattr(teacher, name):
            raise UserError(
                f"teacher and student tokenizers disagree on {name}: "
                f"{getattr(teacher, name)} and {getattr(student, name)}; make them equal in tokenizer_config.json"
            )


def key_layers(
    options: KeyLayerOptions, num_student_layers: int, num_teacher_layers: int, section: str = "mta"
) -> tuple[KeyLayer, ...]:
    """The key layers that a section of the configuration chooses."""
    return resolve_key_layers(
        num_student_layers,
        num_teacher_layers,
        student_layers=options.student_layers,
        teacher_layers=options.teacher_layers,
        num_layers=options.num_layers,
        stride=options.stride,
        num_word_layers=options.num_word_layers if isinstance(options, MTAConfig) else 0,
        section=section,
    )


def choose_method(config: RunConfig, vocab_size: int, num_student_layers: int, num_teacher_layers: int) -> Method:
    """The base method of a run; one that compares layers takes MTA's unless it names its own."""
    layers: dict[int, int] = {}
    if isinstance(config.loss, FDDConfig):
        own = config.mta is None or config.loss.names_layers
        options, section = (config.loss, "loss") if own else (config.mta, "mta")
        assert options is not None
        chosen = key_layers(options, num_student_layers, num_teacher_layers, section)
        layers = {layer.teacher: layer.student for layer in chosen}
    tops = (num_student_layers, num_teacher_layers)
    return make_method(config.loss, vocab_size, layers, tops, beside_mta=config.mta is not None)


def load_data(config: RunConfig, tokenizer: Tokenizer, pairs: bool) -> tuple[EncodedDataset, EncodedDataset | None]:
    """Training and validation sets, encoded by rank 0 into memory-mapped files that every rank opens."""
    data = config.data
    if not data.train:
        raise UsageError("data.train: no training records are named")
    store = open_store(config)
    # records that are answered anew at each epoch: these only say how many there are, and need no spans
    pairs, of_training = (False, None) if config.regenerates else (pairs, store)

    def build(inputs: tuple[str, ...], pairs: bool, store: SpanStore | None) -> EncodedDataset:
        cache = config.run_dir / "cache"
        return distributed.on_rank_zero_first(lambda: build_dataset(inputs, data, tokenizer, store, cache, pairs=pairs))

    return build(data.train, pairs, of_training), build(data.validation, False, store) if data.validation else None


def open_store(config: RunConfig) -> SpanStore | None:
    """The run's span store, or None with MTA off.

    Raises:
        UserError: it is missing, unfinished or damaged, or the YAML's ``parse`` section names another parser.
    """
    path = config.data.spans
    if config.mta is None or path is None:
        return None
    store = distributed.on_rank_zero_first(lambda: SpanStore.open(path))
    if config.parse is not None and config.parse.output == path:
        check_parser(config.parse.parser, store)
    return store


def check_parser(spec: str | None, store: SpanStore) -> None:
    """Insist that a parser is the one that the store was made with; UserError if not."""
    wanted = load_parser(spec)
    if wanted.fingerprint != store.manifest.parser.fingerprint:
        raise UserError(
            f"{store.path}: parsed by '{store.manifest.parser.name}', the config's parse.parser is '{wanted.name}', "
            "another parser; parse again into another folder, or mend parse.parser"
        )


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
    if config.student.lora is not None:
        base = base_name(config.student.path, pair.student_dir)
        inject_adapters(model, config.student.lora, train.seed, base)
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
        if (store := open_store(config)) is not None:
            check_parser(spec, store)
        in_flight = (options.ahead + 1) * loader.samples_per_step  # all: a step never waits to hand its texts over
        open_pool = partial(ParserPool, spec, options.parser_workers, ahead=in_flight)
    student = engine.module.student.model
    seed = config.train.seed
    write = make_writer(lambda: whole_copy(student), pair.tokenizer, options, config.data.max_length, seed)
    return Rollouts(pair.method, loader, write, config.data, pair.tokenizer, seed, num_steps, open_pool)


def make_epoch_pairs(config: RunConfig, pair: Pair, engine: Any, teacher: StreamingTeacher | None) -> EpochPairs | None:
    """What writes the records anew at each epoch; None for a method that does not."""
    if not config.regenerates:
        return None
    writes = teacher if isinstance(config.loss, DistiLLM2Config) and config.loss.regenerate == "both" else None
    return EpochPairs(config, pair.tokenizer, engine.module.student.model, writes)


def make_teacher(config: RunConfig, pair: Pair) -> StreamingTeacher | None:
    """The teacher's engine, or None for a run that reads neither its logits nor its layers (plain SFT)."""
    by_entropy = config.mta is not None and config.mta.teacher_weights == "entropy"
    needs_final = pair.method.divergence.needs_teacher or by_entropy or bool(config.data.validation)
    layers = sorted({layer.teacher for layer in pair.key_layers} | set(pair.method.key_layers))
    if not needs_final and not layers:
        return None
    train = config.train
    return load_teacher(pair.teacher_dir, config.teacher, train.dtype, train.micro_batch_size, layers, needs_final)


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


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
