"""Records to text: MiniLLM's template, a tokenizer's chat template, or plain; knowing which characters are which field.

A rendered record is a list of parts. Each part is tokenized by itself, so the tokens of a prompt do not depend on the
response that follows, as in generation. A part that is a response has labels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mta_ds.errors import UserError
from mta_ds.spans.records import Record

Template = Literal["minillm", "chat", "plain"]

_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n",
    "\n\n### Response:\n",
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n",
    "\n\n### Input:\n",
    "\n\n### Response:\n",
)

_END_TOKEN = re.compile(r"end|eo[tsm]|/s", re.IGNORECASE)


class Piece(NamedTuple):
    """Characters of a part that are a field's."""

    field: str
    field_start: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Part:
    """A string that is tokenized in one go."""

    text: str
    is_response: bool
    pieces: tuple[Piece, ...]
    ends_with_eos: bool = False
    """Whether the tokenizer's EOS follows, as an id; templates with an end token of their own have it in the text."""


class _Message(NamedTuple):
    """One turn: its content is one field, or several that are joined."""

    role: str
    content: str
    pieces: tuple[Piece, ...]


def render(record: Record, template: Template, tokenizer: Any, with_response: bool = True) -> list[Part]:
    """The parts of ``record``, prompts and responses in turn.

    Args:
        with_response: False gives what a model is asked to continue: everything before the last response.

    Raises:
        UserError: the template does not fit the record's format, or the tokenizer has no chat template.
    """
    if record.format == "text":
        return [_response(record, "text")] if with_response else [Part("", False, ())]
    if template == "chat":
        return _render_chat(record, tokenizer, with_response)
    prompt, response = _prompt_and_response(record)
    text = _Text()
    if template == "plain":
        for field in prompt:
            text.literal("\n" if text.value else "").field(field, record.fields[field])
    else:
        literals = _WITH_INPUT if len(prompt) > 1 else _WITHOUT_INPUT
        for literal, field in zip(literals, prompt, strict=False):
            text.literal(literal).field(field, record.fields[field])
        text.literal(literals[-1])
    parts = [Part(text.value, False, tuple(text.pieces))]
    return [*parts, _response(record, response)] if with_response and response in record.fields else parts


def changed_fields(record: Record, parts: Sequence[Part]) -> list[str]:
    """Fields whose text the template changed or left out, so that their units have no place."""
    placed = {piece.field for part in parts for piece in part.pieces}
    return [field for field in record.fields if field not in placed]


class _Text:
    """A string that remembers which of its characters are which field."""

    def __init__(self) -> None:
        self.value = ""
        self.pieces: list[Piece] = []

    def literal(self, text: str) -> _Text:
        self.value += text
        return self

    def field(self, name: str, text: str) -> _Text:
        self.pieces.append(Piece(name, 0, len(self.value), len(text)))
        return self.literal(text)


def _prompt_and_response(record: Record) -> tuple[list[str], str]:
    """Field names of a single-turn record: the prompt's in order, and the response's."""
    if record.format == "instruction":
        return [f for f in ("instruction", "input") if f in record.fields], "output"
    if record.format == "prompt":
        return ["prompt"], "response"
    if record.format == "preference":
        return ["prompt"], "chosen"
    roles = record.roles
    if roles in (("user",), ("user", "assistant")):
        return ["messages.0"], "messages.1"
    raise UserError(f"{record.where}: a conversation of turns {' '.join(roles)} needs data.template: chat")


def _response(record: Record, field: str) -> Part:
    text = record.fields[field]
    return Part(text, True, (Piece(field, 0, 0, len(text)),), ends_with_eos=True)


def _render_chat(record: Record, tokenizer: Any, with_response: bool) -> list[Part]:
    if not tokenizer.chat_template:
        raise UserError("data.template: chat: the tokenizer has no chat template; use minillm or plain")
    messages = _messages(record)
    if not with_response:
        if messages[-1].role == "assistant":
            messages = messages[:-1]
        whole = _apply(tokenizer, messages, generation=True)
        return [Part(whole, False, _locate(messages, whole))]
    return _split_turns(messages, _placed(tokenizer, messages), tokenizer)


def _messages(record: Record) -> list[_Message]:
    if record.format == "messages":
        turns = zip(record.roles, record.fields.items(), strict=True)
        return [_Message(role, text, (Piece(name, 0, 0, len(text)),)) for role, (name, text) in turns]
    prompt, response = _prompt_and_response(record)
    user = _Text()
    for field in prompt:
        user.literal("\n\n" if user.value else "").field(field, record.fields[field])
    messages = [_Message("user", user.value, tuple(user.pieces))]
    if text := record.fields.get(response):
        messages.append(_Message("assistant", text, (Piece(response, 0, 0, len(text)),)))
    return messages


class _Placed(NamedTuple):
    """A rendered conversation and where each message's content lies in it (None: the template changed it)."""

    text: str
    contents: list[tuple[int, int, int] | None]
    """Start in the text, start in the content, length."""


def _placed(tokenizer: Any, messages: Sequence[_Message]) -> _Placed:
    """Render twice: with marks for contents, which shows the template around them, and for real."""
    whole = _apply(tokenizer, messages)
    marks = [f" \ue000{i}\ue001 " for i in range(len(messages))]
    try:
        skeleton = _apply(tokenizer, [m._replace(content=mark) for m, mark in zip(messages, marks, strict=True)])
    except UserError:
        return _searched(whole, messages)
    text, contents, cursor = "", [], 0
    for message, mark in zip(messages, marks, strict=True):
        core = mark.strip()
        at = skeleton.find(core, cursor)
        if at < 0 or skeleton.count(core) != 1:
            return _searched(whole, messages)
        # a template that trims contents has eaten the mark's spaces
        left, right = skeleton[at - 1 : at] == " ", skeleton[at + len(core) : at + len(core) + 1] == " "
        content = message.content if left else message.content.lstrip()
        skipped = len(message.content) - len(content)
        content = content if right else content.rstrip()
        text += skeleton[cursor : at - left]
        contents.append((len(text), skipped, len(content)))
        text += content
        cursor = at + len(core) + right
    text += skeleton[cursor:]
    return _Placed(text, list(contents)) if text == whole else _searched(whole, messages)


def _searched(whole: str, messages: Sequence[_Message]) -> _Placed:
    """For templates that treat some contents specially: find each content, in order, where it stands unchanged."""
    contents: list[tuple[int, int, int] | None] = []
    cursor = 0
    for message in messages:
        core = message.content.strip()
        at = whole.find(core, cursor)
        if at < 0 or not core:
            contents.append(None)
            continue
        contents.append((at, message.content.index(core), len(core)))
        cursor = at + len(core)
    return _Placed(whole, contents)


def _split_turns(messages: Sequence[_Message], placed: _Placed, tokenizer: Any) -> list[Part]:
    """Cut a conversation into prompts and responses; a response holds its turn's end token."""
    parts: list[Part] = []
    start = 0
    waiting: list[Piece] = []
    for message, found in zip(messages, placed.contents, strict=True):
        if found is None:
            continue
        at, skipped, length = found
        pieces = [_shift(piece, at - skipped, at, length) for piece in message.pieces]
        if message.role != "assistant":
            waiting += [piece for piece in pieces if piece.length > 0]
            continue
        end, has_end = _turn_end(placed.text, at + length, tokenizer)
        before = tuple(piece._replace(start=piece.start - start) for piece in waiting)
        parts.append(Part(placed.text[start:at], False, before))
        inside = tuple(piece._replace(start=piece.start - at) for piece in pieces if piece.length > 0)
        parts.append(Part(placed.text[at:end], True, inside, ends_with_eos=not has_end))
        start, waiting = end, []
    rest = tuple(piece._replace(start=piece.start - start) for piece in waiting)
    return [*parts, Part(placed.text[start:], False, rest)] if waiting or not parts else parts


def _shift(piece: Piece, by: int, first: int, length: int) -> Piece:
    """A piece of a message's content, moved into the conversation and cut to what the template kept of it."""
    start = max(piece.start + by, first)
    end = min(piece.start + by + piece.length, first + length)
    return Piece(piece.field, piece.field_start + start - (piece.start + by), start, end - start)


def _turn_end(text: str, end: int, tokenizer: Any) -> tuple[int, bool]:
    """Where an assistant's turn ends: after the end token that follows its content, if one does."""
    specials = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    # a special token that opens the next turn is no end of this one
    ends = {token for token in specials if _END_TOKEN.search(token)} | {tokenizer.eos_token}
    pattern = "|".join(re.escape(token) for token in sorted(ends, key=len, reverse=True))
    match = re.compile(rf"\s*(?:{pattern})").match(text, end)
    return (match.end(), True) if match else (end, False)


def _locate(messages: Sequence[_Message], whole: str) -> tuple[Piece, ...]:
    found = _searched(whole, messages).contents
    return tuple(
        _shift(piece, place[0] - place[1], place[0], place[2])
        for message, place in zip(messages, found, strict=True)
        if place is not None
        for piece in message.pieces
    )


def _apply(tokenizer: Any, messages: Sequence[_Message], generation: bool = False) -> str:
    plain = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text: str = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # a template may raise anything of jinja's, or its own
        raise UserError(f"the chat template refuses turns {' '.join(m.role for m in messages)}: {error}") from None
    return text
