"""The one YAML of a run: each section belongs to the module that it configures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mta_ds.config import Section
from mta_ds.data import DataConfig
from mta_ds.evaluation import EvaluationConfig, GenerateConfig
from mta_ds.losses import DistiLLM2Config, KDConfig, LossConfig, MTAConfig
from mta_ds.models.loading import Dtype, StudentConfig, TeacherConfig
from mta_ds.spans.parse import ParseConfig

# What may change between a checkpoint and its resumption: every step that was done would have been the same.
# So may non_finite: a run that stopped at a NaN is meant to go on with "skip". Batch sizes and parts of generation may
# not: in another batch logits differ in their last digits, which tips draws, in bfloat16 in most responses.
_FREE = (
    *("log_every", "validate_every", "save_every", "keep_last", "keep_every", "asynchronous_saves"),
    *("max_minutes", "stop_grace_seconds", "non_finite", "wandb_project"),
    *("micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),  # their product is held elsewhere
    *("verify_weights", "deterministic"),
)


class TrainConfig(Section):
    """Optimisation, precision, and what is kept of a run."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; give this or ``epochs``."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training records; give this or ``steps``."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Sequences a rank runs at once."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    length_grouping: int | None = Field(default=None, ge=2)
    """So many records that follow one another are of similar length, which saves padding; best as many as a step has
    sequences. Null draws every record at random."""
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate of the student; the projections have ``mta.projection_lr``."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    weight_decay: float = Field(default=0.01, ge=0)
    """On matrices; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""
    dtype: Dtype = "float32"
    """Of both models: bfloat16 on GPUs; on a CPU float32, unless its bf16 products are known to be fast."""
    gradient_checkpointing: bool = False
    """Recompute the student's layers in backward: less memory for about a third more student time."""
    verify_weights: bool = False
    """Compare the hash of every loaded tensor of both models with its file's; reads the files once more."""
    deterministic: bool = False
    """On GPUs, torch's deterministic algorithms: what was interrupted then ends with the same bits on as many GPUs of
    the same kind, for slower backward passes. A CPU always computes so."""
    dropout: bool = False
    """Keep the student's own dropout; off, the student sees what the teacher sees."""
    seed: int = 0
    log_every: int = Field(default=1, ge=1)
    validate_every: int | None = Field(default=None, ge=1)
    """Steps between validations on ``data.validation``; the first is before step 1, the last after the end."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; one is always written at the end and on a stop signal."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that stay."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints of steps divisible by this stay for ever."""
    asynchronous_saves: bool = True
    """Copy weights and moments to CPU memory and write them while training goes on: 12 bytes of a rank's parameters."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Save, stop and exit 75 after this long, as a batch job's own time limit."""
    stop_grace_seconds: float = Field(default=60, gt=0)
    """Time from SIGTERM or SIGUSR1 to exit 75: a stop that takes longer ends without its checkpoint."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project; the package wandb must be installed."""
    non_finite: Literal["stop", "skip"] = "stop"
    """On a NaN or Inf in a loss or a gradient: stop and say where, or leave the step out and count it."""
    spike_factor: float | None = Field(default=None, gt=1)
    """Leave out a step whose loss is more than this many times the median of the last 64; off unless given."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class RunConfig(Section):
    """A whole run: ``mta-ds parse | generate | check | train | evaluate CONFIG`` read their sections from it."""

    run_dir: Path
    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig
    mta: MTAConfig | None = MTAConfig()
    """Multi-Granular Trajectory Alignment; null switches it off."""
    loss: LossConfig = KDConfig()
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    generation: GenerateConfig = Field(default={}, validate_default=True)
    parse: ParseConfig | None = None

    @field_validator("generation", mode="before")
    @classmethod
    def _as_long_as_what_is_trained_on(cls, value: Any, others: ValidationInfo) -> Any:
        """Text that is trained on at once has the limits of the training records, unless it has its own."""
        data = others.data.get("data")
        if isinstance(value, dict) and data is not None and _regenerates(others.data.get("loss")):
            return {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length} | value
        return value

    @model_validator(mode="after")
    def _answers_to_the_training_records(self) -> RunConfig:
        if not self.regenerates:
            return self
        ours, data = self.generation, self.data
        for name in ("inputs", "output", "model"):
            if getattr(ours, name) != GenerateConfig.model_fields[name].default:
                raise ValueError(
                    f"generation.{name}: loss.regenerate has the run's own models answer data.train; leave it out"
                )
        if ours.max_prompt_length != data.max_prompt_length:
            raise ValueError(
                f"generation.max_prompt_length: {ours.max_prompt_length}, but responses are trained on behind "
                f"{data.max_prompt_length} tokens (data.max_prompt_length); leave it out"
            )
        if ours.max_length > data.max_length:
            raise ValueError(
                f"generation.max_length: {ours.max_length}, but training cuts at {data.max_length} (data.max_length); "
                "leave it out or make it smaller"
            )
        return self

    @model_validator(mode="after")
    def _spans_for_mta(self) -> RunConfig:
        if self.mta is not None and self.data.spans is None and not self.regenerates:
            raise ValueError("data.spans: MTA needs a span store ('mta-ds parse' makes one), or set mta: null")
        return self

    @model_validator(mode="after")
    def _weights_to_verify(self) -> RunConfig:
        if self.train.verify_weights and self.teacher.quantization is not None:
            raise ValueError("train.verify_weights: a quantised teacher's weights are not its files'; leave one out")
        return self

    @model_validator(mode="after")
    def _validation_to_adapt_to(self) -> RunConfig:
        if self.loss.adapts and not self.data.validation:
            raise ValueError(f"data.validation: {self.loss.method} adapts to a held-out loss; name records for it")
        return self

    @property
    def regenerates(self) -> bool:
        """Whether the training records are written anew at each epoch."""
        return _regenerates(self.loss)

    def training_hash(self) -> str:
        """Hash of what must not change between a checkpoint and its resumption, the batch size aside."""
        values = self.model_dump(mode="json", include={"teacher", "student", "data", "mta", "loss", "train"})
        if self.regenerates:
            values["generation"] = self.generation.model_dump(mode="json")
            if self.mta is not None:
                values["parser"] = self.parse.parser if self.parse is not None else None
        kept = {"validate_every"} if self.loss.adapts else set()
        for free in {*_FREE} - kept:
            del values["train"][free]
        if (rollouts := values["loss"].get("rollouts")) is not None:  # any number of parsers finds the same spans
            rollouts["parser_workers"] = bool(rollouts["parser_workers"])
        for model in ("teacher", "student"):
            del values[model]["deepspeed"]
        del values["student"]["mlp_chunk"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _regenerates(loss: LossConfig | None) -> bool:
    return isinstance(loss, DistiLLM2Config) and loss.regenerate is not None
