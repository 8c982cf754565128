"""Token weights (MTA eqs. 5-7) of one record under one model: what a layer attends to, token by token."""

from __future__ import annotations

from typing import Any, NamedTuple

from mta_ds.data import DataConfig, Dropped, Record, Template, encode, render
from mta_ds.errors import UsageError, UserError

_WHOLE = 1 << 30  # tokens: nothing is cut off


class Token(NamedTuple):
    """One token; ``start`` and ``end`` are characters of its field, "" being the template around the fields."""

    text: str
    field: str
    start: int
    end: int
    weight: float


class RecordWeights(NamedTuple):
    """The weights of a record's tokens; they sum to 1 over the sequence."""

    model: str
    layer: int
    tokens: list[Token]

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return len(self.tokens)


def record_weights(
    record: Record, model: str, layer: int | None = None, template: Template = "minillm"
) -> RecordWeights:
    """Run a model over the record, rendered as training renders it, and weigh its tokens.

    Args:
        model: a model folder or hub name.
        layer: transformers' numbering, from 1; the last unless given.
        template: the run's ``data.template``.

    Raises:
        UserError: no such model, a record that the template does not fit, or one that training would drop.
        UsageError: the model has no such layer.
    """
    import torch

    from mta_ds.losses import token_weights
    from mta_ds.models import CausalBody, decoder_layers, load_pretrained, load_tokenizer, resolve_model

    path = resolve_model(model)
    tokenizer = load_tokenizer(path)
    ids, places = _sequence(record, template, tokenizer)
    loaded = load_pretrained(path, "float32").eval()
    num_layers = len(decoder_layers(loaded))
    layer = num_layers if layer is None else layer
    if not 1 <= layer <= num_layers:
        raise UsageError(f"--layer {layer}: {model} has layers 1 to {num_layers}")
    length = min(len(ids), getattr(loaded.config, "max_position_embeddings", None) or len(ids))
    body = CausalBody(loaded, [layer])
    body.register_taps()
    states: list[torch.Tensor] = []
    inputs = torch.tensor([ids[:length]])
    with torch.no_grad():
        body(inputs, torch.ones_like(inputs), lambda _, hidden: states.append(hidden[0]))
    weights = token_weights(states[0], torch.tensor([0, length])).tolist()
    return RecordWeights(path.name, layer, [Token(*place, weight=w) for place, w in zip(places, weights, strict=False)])


def _sequence(record: Record, template: Template, tokenizer: Any) -> tuple[list[int], list[tuple[str, str, int, int]]]:
    """The ids that training sees, and each one's text and place: (text, field, start, end)."""
    config = DataConfig(template=template, max_length=_WHOLE, max_prompt_length=_WHOLE)
    example = encode(record, config, tokenizer, None)
    if isinstance(example, Dropped):
        raise UserError(f"{record.where}: record {record.id} is {example.reason}, training drops it; leave --model out")
    ids: list[int] = example.input_ids.tolist()
    places = []
    for part in render(record, template, tokenizer):
        encoding = tokenizer(part.text, add_special_tokens=False, return_offsets_mapping=True)
        for start, end in encoding["offset_mapping"]:
            places.append(_place(part.text, part.pieces, start, end))
        if part.ends_with_eos:
            places.append((tokenizer.eos_token, "", 0, 0))
    opening = [(tokenizer.bos_token, "", 0, 0)] * (len(ids) - len(places))  # a tokenizer's own first token
    return ids, [*opening, *places]


def _place(text: str, pieces: Any, start: int, end: int) -> tuple[str, str, int, int]:
    """A token of a part; in a field, if all of it but leading white space is the field's."""
    first = start + len(text[start:end]) - len(text[start:end].lstrip())
    for piece in pieces:
        inside = max(start, piece.start)
        if inside <= first and inside < end <= piece.start + piece.length:
            moved = piece.field_start - piece.start
            return text[start:end], piece.field, inside + moved, end + moved
    return text[start:end], "", 0, 0
