"""Load Benepar's own ChartParser from disk, safely and under a current transformers, and score spans with it.

benepar 0.2.0 was written against transformers 4 and trusts what a checkpoint holds. Its classes are used as they
are; what is around them is replaced: weights are read with ``weights_only=True``, nothing is ever downloaded, and
the one tokenizer method that transformers 5 dropped is lent to benepar while it builds itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benepar.nkutil import HParams
from benepar.parse_chart import ChartParser
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mta_ds.errors import UserError
from mta_ds.files import sha256

WEIGHTS = "benepar_model.bin"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
_METHOD = "build_inputs_with_special_tokens"
_lending = threading.Lock()


def _build_inputs_with_special_tokens(tokenizer: Any, token_ids: list[int]) -> list[int]:
    """The special tokens of ``tokenizer`` around ``token_ids``, read off one encoded word."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    content = [index for index, special in enumerate(mask) if not special]
    return [*ids[: content[0]], *token_ids, *ids[content[-1] + 1 :]]


@contextmanager
def lent_tokenizer_method() -> Iterator[None]:
    """Within the block every tokenizer has the method that benepar's Retokenizer calls in its constructor."""
    with _lending:
        if hasattr(PreTrainedTokenizerBase, _METHOD):
            yield
            return
        setattr(PreTrainedTokenizerBase, _METHOD, _build_inputs_with_special_tokens)
        try:
            yield
        finally:
            delattr(PreTrainedTokenizerBase, _METHOD)


def build_chart_parser(config: dict[str, Any]) -> ChartParser:
    """Construct benepar's ChartParser from its keyword arguments, under any supported transformers."""
    with lent_tokenizer_method():
        return ChartParser(**config)


class LoadedModel(NamedTuple):
    """A Benepar model ready to parse: in fp32, in eval mode, without gradients."""

    model: ChartParser
    name: str
    fingerprint: str  # SHA-256 over weights, configuration and tokenizer


def load_model(path: Path) -> LoadedModel:
    """Load a folder in the format of Benepar's releases (``benepar_en3``) or a single-file training checkpoint.

    Raises:
        UserError: nothing is there, it is no Benepar model, it holds code instead of weights, or its weights do not
            fit its encoder.
    """
    if os.path.isdir(path):  # unlike a Path's own, false for a name that is too long
        config, state_dict, files = _read_folder(path)
    elif os.path.isfile(path):
        config, state_dict, files = _read_checkpoint(path)
    else:
        raise UserError(
            f"parser {path}: no such file or folder; give a Benepar folder or checkpoint, "
            "or none at all for the bundled model"
        )
    model = _build(path, config)
    _load_weights(path, model, state_dict)
    return LoadedModel(model.eval().requires_grad_(False), path.resolve().name, _fingerprint(files))


def _read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[Path]]:
    config_file, weights_file = path / "config.json", path / WEIGHTS
    for file in (config_file, weights_file):
        if not file.is_file():
            raise UserError(f"parser {path}: not a Benepar model folder, it has no {file.name}")
    config = _read_json(config_file).get("benepar")
    if not isinstance(config, dict):
        raise UserError(f"parser {config_file}: no 'benepar' section; is this the folder of a plain encoder?")
    files = [file for file in path.iterdir() if file.suffix in {".json", ".txt", ".model", ".bin"}]
    return {**config, "pretrained_model_path": str(path)}, _read_weights(weights_file), files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"parser {file}: not valid JSON: {_first_line(error)}") from None
    return values if isinstance(values, dict) else {}


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[Path]]:
    data = _read_weights(path)
    if not isinstance(data.get("config"), dict) or not isinstance(data.get("state_dict"), dict):
        raise UserError(f"parser {path}: not a Benepar checkpoint, it has no 'config' and 'state_dict'")
    config, files = dict(data["config"]), [path]
    hparams = config.get("hparams", {})
    if isinstance(hparams, dict) and hparams.get("use_pretrained"):
        # A checkpoint of this kind only names its encoder, whose configuration and tokenizer are needed.
        encoder = Path(str(hparams.get("pretrained_model", "")))
        folder = next((place for place in (path.parent / encoder, encoder) if (place / "config.json").is_file()), None)
        if folder is None:
            raise UserError(
                f"parser {path}: its encoder '{encoder}' is no local folder; put the encoder's config and tokenizer "
                f"files at {path.parent / encoder}"
            )
        config["pretrained_model_path"] = str(folder)
        files += [file for file in folder.iterdir() if file.suffix in {".json", ".txt", ".model"}]
    return config, data["state_dict"], files


def _read_weights(path: Path) -> dict[str, Any]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"parser {path}: refused: it is no PyTorch weights file, or it holds objects or code beside its weights"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"parser {path}: cannot be read as PyTorch weights: {_first_line(error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"parser {path}: not a Benepar model, it holds a {type(data).__name__} instead of weights")
    return data


def _build(path: Path, config: dict[str, Any]) -> ChartParser:
    folder = config.get("pretrained_model_path")
    if folder is not None:
        _check_encoder(path, Path(str(folder)))
    try:
        hparams = {"force_root_constituent": True, **config["hparams"]}
        return build_chart_parser({**config, "hparams": HParams(**hparams)})
    # Everything here is the content of the user's files, and what they lack can surface as any of these.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise UserError(f"parser {path}: not a complete Benepar model: {_first_line(error)}") from None


def _check_encoder(path: Path, folder: Path) -> None:
    """Raise UserError for an encoder without a tokenizer, and for one with code."""
    # Without its files transformers would give an empty tokenizer.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"parser {path}: no tokenizer in {folder}; it needs one of {', '.join(_TOKENIZER_FILES)}")
    # benepar lets transformers ask, in the middle of a batch job, whether to run it.
    for file in sorted(folder.glob("*config*.json")):
        if "auto_map" in _read_json(file):
            raise UserError(f"parser {path}: refused: {file.name} names code of its own (auto_map) to be run")


def _load_weights(path: Path, model: ChartParser, state_dict: dict[str, Tensor]) -> None:
    """Load every weight, in the model's own precision; only what transformers itself drops may be left over."""
    encoder = model.pretrained_model
    ignorable = [r"position_ids$", *(getattr(encoder, "_keys_to_ignore_on_load_unexpected", None) or ())]
    try:
        missing, unexpected = model.load_state_dict(state_dict, strict=False)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()).partition("size mismatch")[2] or _first_line(error)
        raise UserError(f"parser {path}: its weights do not match its encoder or config:{reason[:200]}") from None
    unexpected = [name for name in unexpected if not any(re.search(pattern, name) for pattern in ignorable)]
    for kind, names in (("lacks", missing), ("has besides", unexpected)):
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"parser {path}: its weights do not match its encoder or config: {kind} {names[0]}{rest}")
    if broken := [name for name, value in model.named_parameters() if not value.isfinite().all()]:
        raise UserError(f"parser {path}: its weights are damaged: {broken[0]} has values that are no finite numbers")
    if encoder is not None and len(model.retokenizer.tokenizer) > encoder.get_input_embeddings().num_embeddings:
        raise UserError(f"parser {path}: the tokenizer has more entries than the encoder; do they belong together?")


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


class Body(NamedTuple):
    """What may stand for a model's own layers: the pretrained encoder, read at positions, and those above it."""

    pretrained: Callable[[dict[str, Any], Tensor], Tensor] | None = None
    transformer: Callable[[Tensor, Tensor], Tensor] | None = None


_OWN = Body()


def annotate(model: ChartParser, batch: dict[str, Any], body: Body = _OWN) -> Tensor:
    """Word vectors [B, longest + 2, d_model] of a padded batch: the first half of ``ChartParser.forward``."""
    valid = batch["valid_token_mask"]
    if model.char_encoder is not None:
        content = model.char_encoder(batch["char_ids"], valid)
    else:
        # Padding words have index -100; what is read for them is zeroed.
        index = batch["words_from_tokens"].clamp_min(0)
        features = (body.pretrained or partial(read_states, model.pretrained_model))(batch, index)
        content = model.project_pretrained(features.masked_fill_(~valid[:, :, None], 0))
    annotations: Tensor = content
    if model.encoder is None:
        return annotations
    annotations = (body.transformer or model.encoder)(model.add_timing(model.morpho_emb_dropout(content)), valid)
    # Position and content are interleaved halves; a fencepost takes an even share of both from either side.
    return torch.cat([annotations[..., 0::2], annotations[..., 1::2]], -1)


def read_states(pretrained: PreTrainedModel, batch: dict[str, Any], index: Tensor) -> Tensor:
    """Last hidden states [B, W, d] in fp32 at the positions ``index`` [B, W] of a padded batch."""
    names = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask")
    hidden: Tensor = pretrained(**{name: batch[name] for name in names if name in batch}).last_hidden_state
    return hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[-1])).float()


def fencepost_features(model: ChartParser, annotations: Tensor) -> Tensor:
    """What the label head's first linear layer makes of each fencepost, without its bias: [B, longest + 1, hidden].

    A span's vector is the difference of its two fenceposts' and the layer is linear, so it is applied once to each
    fencepost instead of once to each span.
    """
    half = model.d_model // 2
    fenceposts = torch.cat([annotations[:, :-1, :half], annotations[:, 1:, half:]], -1)
    return functional.linear(fenceposts, model.f_label[0].weight)


def label_scores(model: ChartParser, left: Tensor, right: Tensor) -> Tensor:
    """Scores [M, labels - 1] of all labels but the empty one, whose score is 0, for spans between two fenceposts.

    Args:
        left, right: [M, hidden] rows of :func:`fencepost_features`.
    """
    first, norm, _, last = model.f_label
    hidden = (right - left).add_(first.bias)
    hidden = functional.layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return functional.linear(hidden.relu_(), last.weight, last.bias)
