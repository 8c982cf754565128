"""The two models of a run as folders, before any weight is loaded: found, made or merged, and compared."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from mta_ds.data import EncodedDataset, read_manifest
from mta_ds.engine import distributed
from mta_ds.engine.config import RunConfig
from mta_ds.errors import UserError
from mta_ds.losses import FDDConfig, KeyLayerOptions, Method, MTAConfig, make_method
from mta_ds.models import (
    KeyLayer,
    Tokenizer,
    adapter_size,
    check_positions,
    cut_layers,
    load_config,
    load_tokenizer,
    merged_folder,
    output_head,
    random_student,
    resolve_key_layers,
    resolve_model,
    state_width,
    vocabulary_size,
)
from mta_ds.models.body import final_norm
from mta_ds.models.loading import model_outline
from mta_ds.spans.parser import load_parser


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


def prepare_pair(config: RunConfig) -> Pair:
    """Resolve both models, make the student's starting folder if need be, and check that they fit each other.

    Raises:
        UserError: a folder is missing, the vocabularies or EOS differ, a model has fewer positions than
            ``data.max_length``, or a key layer does not exist.
    """
    teacher_dir = teacher_folder(config)
    student_dir = distributed.on_rank_zero_first(lambda: student_folder(config, teacher_dir))
    tokenizer = load_tokenizer(student_dir, config.student.trust_remote_code)
    check_same_vocabulary(tokenizer, load_tokenizer(teacher_dir, config.teacher.trust_remote_code), config)
    vocab_size = vocabulary_size(tokenizer)
    teacher = load_config(teacher_dir, config.teacher.trust_remote_code)
    student = load_config(student_dir, config.student.trust_remote_code)
    for name, model in (("teacher", teacher), ("student", student)):
        if model.vocab_size < vocab_size:
            raise UserError(f"{name}: the model has {model.vocab_size} embeddings, its tokenizer {vocab_size} ids")
        check_positions(model, f"the {name}", {"data.max_length": config.data.max_length})
    if config.student.lora is not None:  # finds a wrong target now, not when the data is encoded
        adapter_size(model_outline(student, config.student.trust_remote_code), config.student.lora)
    depths = (student.num_hidden_layers, teacher.num_hidden_layers)
    method = choose_method(config, vocab_size, *depths)
    check_heads(method.key_layers.values(), method, "student", student, config.student.trust_remote_code)
    check_heads(method.key_layers.keys(), method, "teacher", teacher, config.teacher.trust_remote_code)
    return Pair(
        teacher_dir,
        student_dir,
        tokenizer,
        vocab_size,
        key_layers(config.mta, *depths) if config.mta is not None else (),
        method,
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
    if source.config is not None:
        if not source.config.exists():
            raise UserError(f"student.config: {source.config}: no such file")
        return random_student(source.config, config.train.seed, teacher_dir, output, source.trust_remote_code)
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


def check_heads(layers: Collection[int], method: Method, name: str, model: PretrainedConfig, trusted: bool) -> None:
    """A method that compares layers puts their states through the LM head, and through the final norm if asked to.

    Raises:
        UserError: the head takes another width than a layer's state has, or there is no final norm.
    """
    if not layers:
        return
    outline = model_outline(model, trusted)
    if method.uses_norm:
        final_norm(outline)
    width = output_head(outline).shape[1]
    for layer in layers:
        if (found := state_width(model, layer)) != width:
            raise UserError(
                f"loss: the {name}'s layer {layer} is {found} wide and its LM head takes {width} (the model projects "
                "its final state), so its layers have no logits to compare; choose another method or model"
            )


def check_prompts(method: Method, train: EncodedDataset) -> None:
    """A record that the student will answer needs a prompt: told now, not at its first rollout.

    Raises:
        UserError: one has none.
    """
    if method.rollouts is None:
        return
    without = np.flatnonzero(train.prompt_lengths == 0)
    if len(without):
        raise UserError(
            f"record {train[int(without[0])].record_id}: has no prompt, and the student is to answer it in rollouts; "
            "leave out records of text alone, or choose a method without rollouts"
        )


def check_parser(config: RunConfig, method: Method) -> None:
    """Text that the models write is parsed as the records were: told now, not at the first text.

    Raises:
        UserError: the YAML's parser cannot be loaded, or is not the one that the span store was made with.
    """
    if config.mta is None:
        return
    section, store = config.parse, config.data.spans
    parses = config.regenerates or (method.rollouts is not None and method.rollouts.parser_workers > 0)
    if not parses and (section is None or section.output != store):
        return
    named = section.parser if section is not None else None
    parser = load_parser(named)
    made_with = read_manifest(store).parser if store is not None else None
    if made_with is None or parser.fingerprint == made_with.fingerprint:
        return
    ours = f"parse.parser: {named}"
    if named is None:
        ours = f"no {'section parse' if section is None else 'parse.parser'}, so the bundled one"
    raise UserError(
        f"{store}: parsed by '{made_with.name}', another parser than the config's ({ours}); name the store's in "
        "parse.parser, or parse again into another folder"
    )


def reads_final_state(config: RunConfig, method: Method) -> bool:
    """Whether anything reads the teacher's final state: the loss, token weights by entropy, or a validation's KL."""
    by_entropy = config.mta is not None and config.mta.teacher_weights == "entropy"
    return method.divergence.needs_teacher or by_entropy or bool(config.data.validation)
