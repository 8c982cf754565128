"""Load tokenizers and causal language models from local folders, strictly, whole or into ZeRO-3 partitions.

transformers re-initialises whatever a checkpoint lacks and only logs it; a distillation run would then train against
noise for days. Here a missing, surplus or mismatched tensor is an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import Field, model_validator
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.integrations import HfDeepSpeedConfig

from mta_ds.config import Section
from mta_ds.errors import UserError
from mta_ds.models.lora import LoraConfig

Dtype = Literal["float32", "bfloat16"]
Quantization = Literal["8bit", "4bit"]
DeviceMap = Mapping[str, int | str]
"""The GPU (its number) or "cpu", for each part of a model by its name."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)

# glibc's numbers of two options of its malloc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# Models that transform logits after the head: the divergence is computed from hidden states and heads alone.
_LOGIT_TRANSFORMS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}


class TeacherConfig(Section):
    """The frozen model to distil from."""

    path: str
    """A Hugging Face model folder (or a hub name, where the machine reaches the hub)."""
    adapter: Path | None = None
    """A folder with a LoRA adapter of that model (peft's, in safetensors); merged once, into the run's cache."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON for the teacher's engine; the default partitions it under ZeRO-3 with DeepSpeed's own sizes."""
    quantization: Quantization | None = None
    """Round the decoder layers' matrices to 8 or 4 bits as they load (bitsandbytes). Every rank then holds the whole
    teacher: ZeRO-3 cannot cut such weights. Embeddings and LM head keep ``train.dtype``."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _cut_or_quantized(self) -> TeacherConfig:
        if self.quantization is not None and self.deepspeed is not None:
            raise ValueError("quantization keeps the teacher whole on every rank; remove it, or deepspeed")
        return self


class StudentConfig(Section):
    """The model to train: exactly one of ``path``, ``config`` and ``teacher_layers`` says where it comes from."""

    path: str | None = None
    """A Hugging Face model folder (or hub name)."""
    config: Path | None = None
    """A model's config.json: its weights are drawn at random (seed ``train.seed``)."""
    teacher_layers: tuple[int, ...] | int | None = None
    """Layers (from 0) of the teacher that the student starts from, or k for every k-th counted down from the top."""
    lora: LoraConfig | None = None
    """Train low-rank adapters beside the projections, the model's own weights frozen; null trains all weights."""
    mlp_chunk: int | None = Field(default=None, ge=1)
    """Run MLPs over so many tokens at a time: for long inputs, less memory against one more forward of them."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON for the student's engine (ZeRO stage 1, 2 or 3); the default is ZeRO-3."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> StudentConfig:
        given = [n for n in ("path", "config", "teacher_layers") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, config, teacher_layers; found {' and '.join(given) or 'none'}")
        return self


def resolve_model(path: str) -> Path:
    """The local folder of a model: ``path`` itself, or a hub name's cached or downloaded snapshot.

    Raises:
        UserError: no such folder, and the hub does not give it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.count("/") != 1 or path.startswith("."):
        raise UserError(f"{path}: no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # code is only run where it is trusted
        kinds = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
        return Path(snapshot_download(path, allow_patterns=kinds))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: no such model folder, and the hub does not give it ({reason})") from None


def load_config(path: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config; UserError if the folder has none or it is not a text model's."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: not a model folder, it has no config.json")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if not trust_remote_code and "custom code" in str(error):
            raise UserError(
                f"{path}: the model brings code of its own; read it, then set trust_remote_code: true beside its path"
            ) from None
        raise UserError(f"{path}/config.json: {_one_line(error)}") from None


def model_outline(config: PretrainedConfig, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """The model without its weights: modules and shapes alone, on the meta device."""
    with torch.device("meta"):
        outline: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, **options
        )
    return outline


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Tokenizer:
    """A fast tokenizer with a padding token (EOS where it has none of its own).

    Raises:
        UserError: no tokenizer in the folder, or one without character offsets (a slow tokenizer).
    """
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{path}: no tokenizer in the folder (no tokenizer.json); copy the model's own there")
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise UserError(f"{path}: cannot load the tokenizer: {_one_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{path}: a slow tokenizer has no character offsets, spans need them; save a fast one there")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token; responses could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_pretrained(
    path: Path,
    dtype: Dtype,
    deepspeed_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    """Load a causal language model and insist that every tensor of model and checkpoint met its counterpart.

    Args:
        path: a model folder with weights in safetensors (or a ``.bin`` that loads with ``weights_only``).
        dtype: of the parameters; under ZeRO-3 the DeepSpeed config's precision decides and must say the same.
        deepspeed_config: if it is stage 3, parameters are partitioned as they load and no rank holds a full copy.
        quantization: round the matrices of the decoder layers as they load, each on this rank's device; whole models
            only.
        device_map: where the parts of a whole model go, by their names.

    Raises:
        UserError: no weights; a tensor missing, surplus or of another shape; a model whose logits are not its head's
            plain product; weights that are quantised in the files, or cannot be here.
    """
    if getattr(load_config(path, trust_remote_code), "quantization_config", None) is not None:
        raise UserError(
            f"{path}/config.json: quantization_config: the weights in the files are quantised; name the folder of the "
            "model's own weights (a teacher's can be rounded as they load: teacher.quantization)"
        )
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if quantization is not None:
        options |= _quantization_options(quantization, dtype)
    if device_map is not None:
        options["device_map"] = dict(device_map)
    if is_stage3 := _is_stage3(deepspeed_config):
        # transformers reports no surplus tensor when it fills partitions; a model without memory tells all at once
        _insist_on_match(path, _from_files(path, **options, device_map={"": "meta"}, ignore_mismatched_sizes=True)[1])
    with _zero3_loading(deepspeed_config if is_stage3 else None), _freed_memory_returned():
        model, info = _from_files(path, **options)
    _insist_on_match(path, info)
    _refuse_transformed_logits(path, model)
    loaded: PreTrainedModel = model
    return loaded


def _from_files(path: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers has found out about its tensors."""
    with quiet_transformers():
        try:
            loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
                path, local_files_only=True, output_loading_info=True, **options
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{path}: cannot load the weights: {_one_line(error)}") from None
    return loaded


def _insist_on_match(path: Path, info: dict[str, Any]) -> None:
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if keys := sorted(map(str, info.get(problem) or ())):
            what = problem.partition("_")[0]
            raise UserError(
                f"{path}: weights do not match the model: {len(keys)} {what} (first: {keys[0]}); "
                "check that config.json belongs to these weights",
                on_every_rank=True,
            )


def output_head(model: PreTrainedModel) -> nn.Parameter:
    """The LM head's weight [vocabulary, hidden]; logits are its plain product with the final hidden state."""
    return model.get_output_embeddings().weight  # type: ignore[no-any-return]


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Number of ids the tokenizer can emit: models pad their heads beyond it, and those rows mean nothing."""
    ids: dict[str, int] = tokenizer.get_vocab()
    return max(ids.values()) + 1


def _quantization_options(quantization: Quantization, dtype: Dtype) -> dict[str, Any]:
    """What ``from_pretrained`` wants to hear: LLM.int8 (arXiv 2208.07339), or NF4 (arXiv 2305.14314)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("teacher.quantization needs the package bitsandbytes: pip install 'mta-ds[quantization]'")
    from transformers import BitsAndBytesConfig

    options = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": options, "device_map": {"": device}}


def _is_stage3(deepspeed_config: dict[str, Any] | None) -> bool:
    return deepspeed_config is not None and deepspeed_config.get("zero_optimization", {}).get("stage") == 3


@contextlib.contextmanager
def _zero3_loading(stage3_config: dict[str, Any] | None) -> Iterator[None]:
    """While open, ``from_pretrained`` partitions parameters as they load (transformers looks for a live config)."""
    # transformers keeps only a weak reference, and one for the whole process: alive exactly for this load, else the
    # other model of the run would be partitioned by the wrong settings, or not at all.
    live = None if stage3_config is None else HfDeepSpeedConfig(stage3_config)
    try:
        yield
    finally:
        del live


@contextlib.contextmanager
def _freed_memory_returned() -> Iterator[None]:
    """While open, glibc gives every large block back when it is freed; else it would keep much of the other partitions.

    Each layer is whole for a moment as it is made and as it is filled, and glibc's heap grows around what stays: a rank
    then holds up to twice its partition. Afterwards blocks are kept again, up to the sizes that glibc itself goes to:
    a step that maps its buffers anew each time would be slower; who sets MALLOC_MMAP_THRESHOLD_ or
    MALLOC_TRIM_THRESHOLD_ wants it all the same.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # not glibc
        yield
        return
    mapped, trimmed = (
        int(os.environ.get(f"MALLOC_{name}_THRESHOLD_", size)) for name, size in (("MMAP", 1 << 25), ("TRIM", 1 << 26))
    )
    libc.mallopt(_M_MMAP_THRESHOLD, min(mapped, 1 << 20))
    try:
        yield
    finally:
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_THRESHOLD, mapped)
        libc.mallopt(_M_TRIM_THRESHOLD, trimmed)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the load report (we raise on what it would tell) and the progress bar, one of each per rank."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _refuse_transformed_logits(path: Path, model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{path}: {type(model).__name__} has no LM head; a causal language model is needed")
    if getattr(head, "bias", None) is not None:
        raise UserError(f"{path}: the LM head of {type(model).__name__} has a bias; not supported")
    for name, neutral in _LOGIT_TRANSFORMS.items():
        if getattr(model.config, name, neutral) not in (None, neutral):
            raise UserError(f"{path}: {type(model).__name__} transforms its logits ({name}); not supported")


def _one_line(error: BaseException) -> str:
    """The first sentence of a library's message, without its line breaks."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
