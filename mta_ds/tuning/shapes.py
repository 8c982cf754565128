"""The shapes of both models and of the step between them, from the run's YAML and two model configs alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from mta_ds.engine.config import RunConfig
from mta_ds.engine.pair import choose_method, key_layers, reads_final_state
from mta_ds.errors import UserError
from mta_ds.losses import Method
from mta_ds.models import KeyLayer, adapter_size, load_config, state_width
from mta_ds.models.body import decoder_layers
from mta_ds.models.initialise import cut_config, every_kth
from mta_ds.models.loading import model_outline
from mta_ds.tuning.outline import LayerBytes, outline

# Units of a token in instruction data: 195 words and 75 phrases to 256 tokens.
SPANS_PER_TOKEN = {"word": 195 / 256, "phrase": 75 / 256}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One model; sizes in elements."""

    parameters: int
    """All, tied ones once."""
    num_layers: int
    layer_parameters: int
    """Of one decoder layer."""
    width: int
    final_width: int
    """Of the final state, which the LM head reads."""
    attention_width: int
    """Heads times their width."""
    vocabulary: int
    sizes: tuple[int, ...]
    """Of every parameter, for what ZeRO-3 gathers at once and what it never cuts."""
    active: int
    """Of all decoder layers, what one token is multiplied with: of a mixture's experts those it is sent to."""
    cache_width: int
    """Keys and values of a token in all layers."""
    bytes: LayerBytes

    @property
    def largest(self) -> int:
        """The largest parameter: what a gather brings at least, an embedding as a rule."""
        return max(self.sizes)

    @property
    def head(self) -> int:
        """The LM head's elements."""
        return self.vocabulary * self.final_width

    def persistent(self, threshold: int) -> int:
        """Elements that ZeRO-3 leaves whole on every rank: of parameters below ``threshold``."""
        return sum(size for size in self.sizes if size < threshold)


class Writing(NamedTuple):
    """How the student writes rollouts."""

    sequences: int
    """Written at once."""
    new_tokens: int
    """Of a sequence, at most."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One optimizer step of one run, apart from how it is cut over ranks and micro-steps."""

    student: ModelShape
    teacher: ModelShape | None
    """As far as it runs: cut after the last layer that is needed; None for plain SFT."""
    trained: int
    """Elements that are trained, projections included: all of the student's, or its adapters."""
    adapters: bool
    """Whether the student's own weights are frozen, its head among them, and adapters trained beside them."""
    projections: int
    """Elements of the projections."""
    key_layers: tuple[KeyLayer, ...]
    """MTA's."""
    trajectory: tuple[int, ...]
    """Student layers that FDD compares in output space."""
    trajectory_normed: bool
    """Whether their states go through the final norms first."""
    teacher_head: bool
    """Whether the teacher's LM head is read."""
    keeps_teacher_states: bool
    """Token weights by entropy: the teacher's covered states stay, in bfloat16, until its end."""
    writing: Writing | None
    """Of a method that trains on what the student writes: a whole copy of it exists meanwhile."""
    asynchronous_saves: bool
    """Whether a checkpoint is copied before it is written."""
    sequence_length: int
    """Tokens of the longest sequence."""
    sequences_per_sample: int
    """2 for preference pairs."""
    batch_per_rank: int
    """Samples of a rank and optimizer step: micro-batch times accumulation."""
    element_bytes: int
    """Of weights, states and gradients."""

    @property
    def student_elements(self) -> int:
        """The student's, and what is trained beside it: projections, adapters."""
        return self.student.parameters + (self.trained if self.adapters else self.projections)

    @property
    def trained_head(self) -> int:
        """Elements of the student's head that have a gradient."""
        return 0 if self.adapters else self.student.head

    @property
    def head_passes(self) -> int:
        """States that go through the LM heads: the final one, and FDD's, each with the one of the layer before."""
        return 1 + max(0, 2 * len(self.trajectory) - 1)

    def tokens(self, micro_batch_size: int) -> int:
        """Tokens of a full micro-batch."""
        return micro_batch_size * self.sequences_per_sample * self.sequence_length


def model_shape(
    config: PretrainedConfig, dtype: torch.dtype, num_tokens: int, trust_remote_code: bool = False
) -> ModelShape:
    """Count and size a model by its config; nothing is loaded."""
    model = model_outline(config, trust_remote_code)
    sizes = tuple(parameter.numel() for parameter in model.parameters())  # tied ones come once
    layers = decoder_layers(model)
    heads = getattr(config, "num_attention_heads", 1)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return ModelShape(
        parameters=sum(sizes),
        num_layers=config.num_hidden_layers,
        layer_parameters=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        width=config.hidden_size,
        final_width=state_width(config, config.num_hidden_layers),
        attention_width=heads * head_width,
        vocabulary=config.vocab_size,
        sizes=sizes,
        active=round(sum(_active(layer, config) for layer in layers)),
        cache_width=2 * key_heads * head_width * config.num_hidden_layers,
        bytes=outline(config, dtype, num_tokens, trust_remote_code),
    )


def _active(layer: nn.Module, config: PretrainedConfig) -> float:
    """Elements of a decoder layer that one token meets."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    experts = experts or getattr(config, "n_routed_experts", None)
    share = getattr(config, "num_experts_per_tok", experts) / experts if experts else 1.0
    sizes = ((f".{name}.", parameter.numel()) for name, parameter in layer.named_parameters())
    return sum(size * (share if ".experts." in name else 1) for name, size in sizes)


def workload(config: RunConfig, batch_per_rank: int | None = None) -> Workload:
    """The step of a run, from its YAML and both models' config.json.

    Raises:
        UserError: a config.json is missing, a key layer does not exist, or the teacher is quantised.
    """
    if config.teacher.quantization is not None:
        raise UserError(
            "teacher.quantization: plans are of a teacher in ZeRO-3 partitions, and a quantised one has none; to plan, "
            "give teacher.quantization=null"
        )
    teacher_config, student_config = model_configs(config)
    depths = (student_config.num_hidden_layers, teacher_config.num_hidden_layers)
    aligned = key_layers(config.mta, *depths) if config.mta is not None else ()
    vocabulary = min(student_config.vocab_size, teacher_config.vocab_size)
    method = choose_method(config, vocabulary, *depths)
    dtype = getattr(torch, config.train.dtype)
    length = config.data.max_length
    trusted = config.student.trust_remote_code
    student = model_shape(student_config, dtype, length, trusted)
    widths = [(state_width(student_config, k.student), state_width(teacher_config, k.teacher)) for k in aligned]
    projections = sum(ours * theirs for ours, theirs in widths)
    lora = config.student.lora
    trained = student.parameters
    if lora is not None:
        trained = adapter_size(model_outline(student_config, trusted), lora).trainable
    needs_final, depth = _teacher_depth(config, method, aligned, depths[1])
    return Workload(
        student=student,
        teacher=model_shape(cut_config(teacher_config, range(depth)), dtype, length, config.teacher.trust_remote_code)
        if depth
        else None,
        trained=trained + projections,
        adapters=lora is not None,
        projections=projections,
        key_layers=aligned,
        trajectory=tuple(method.key_layers.values()),
        trajectory_normed=method.uses_norm,
        teacher_head=needs_final,
        keeps_teacher_states=config.mta is not None and config.mta.teacher_weights == "entropy",
        writing=_writing(method, length),
        asynchronous_saves=config.train.asynchronous_saves,
        sequence_length=length,
        sequences_per_sample=2 if method.pairs else 1,
        batch_per_rank=batch_per_rank or config.train.micro_batch_size * config.train.gradient_accumulation_steps,
        element_bytes=2 if config.train.dtype == "bfloat16" else 4,
    )


def _writing(method: Method, length: int) -> Writing | None:
    options = method.rollouts
    if options is None:
        return None
    return Writing(options.batch_size, min(length, options.max_new_tokens or length))


def with_length(work: Workload, sequence_length: int) -> Workload:
    """The same step on shorter or longer sequences; a layer's bytes a token stay."""
    return replace(work, sequence_length=sequence_length)


def model_configs(config: RunConfig) -> tuple[PretrainedConfig, PretrainedConfig]:
    """The configs of teacher and student, wherever the run takes its student from."""
    teacher = _config_of(config.teacher.path, "teacher.path", config.teacher.trust_remote_code)
    source = config.student
    if source.path is not None:
        return teacher, _config_of(source.path, "student.path", source.trust_remote_code)
    if source.config is not None:
        folder = source.config.parent if source.config.name == "config.json" else source.config
        return teacher, load_config(folder, source.trust_remote_code)
    layers = source.teacher_layers
    assert layers is not None  # StudentConfig holds exactly one source
    kept = every_kth(teacher.num_hidden_layers, layers) if isinstance(layers, int) else tuple(layers)
    return teacher, cut_config(teacher, kept)


def _config_of(path: str, key: str, trust_remote_code: bool) -> PretrainedConfig:
    """The config.json of a folder or of a hub name; weights are not asked for."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return load_config(folder, trust_remote_code)
    if folder.is_absolute() or path.count("/") != 1 or path.startswith("."):
        raise UserError(f"{key}: {path}: no such model folder; planning needs a folder with the model's config.json")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{key}: {path}: no such model folder, and the hub does not give its config.json ({reason}); "
            "planning needs that one file in a folder"
        ) from None


def _teacher_depth(config: RunConfig, method: Method, aligned: Sequence[KeyLayer], num_layers: int) -> tuple[bool, int]:
    """Whether the teacher's final state is read, and how many of its layers run; 0 where it does not run at all."""
    if reads_final_state(config, method):
        return True, num_layers
    layers = {layer.teacher for layer in aligned} | set(method.key_layers)
    return False, max(layers, default=0)
