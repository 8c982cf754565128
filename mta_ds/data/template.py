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
Half = Literal["chosen", "rejected"]

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

_MARK = "\ue000\ue001"  # private use: no content and no template has it
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


def render(
    record: Record, template: Template, tokenizer: Any, with_response: bool = True, half: Half = "chosen"
) -> list[Part]:
    """The parts of ``record``, prompts and responses in turn.

    A response that was cut off by a length limit (``record.unfinished``) has no EOS and no end token after it.

    Args:
        with_response: False gives what a model is asked to continue: everything before the last response.
        half: which response of a preference record.

    Raises:
        UserError: the template does not fit the record's format, or the tokenizer has no chat template.
    """
    if record.format == "text":
        return [_response(record, "text")] if with_response else [Part("", False, ())]
    if template == "chat":
        return _render_chat(record, tokenizer, with_response, half)
    prompt, response = _prompt_and_response(record, half)
    text = _Text()
    if template == "plain":
        for field in prompt:
            text.literal("\n" if text.value else "").field(field, record.fields.get(field, ""))
    else:
        literals = _WITH_INPUT if len(prompt) > 1 else _WITHOUT_INPUT
        for literal, field in zip(literals, prompt, strict=False):
            text.literal(literal).field(field, record.fields.get(field, ""))
        text.literal(literals[-1])
    parts = [Part(text.value, False, tuple(text.pieces))]
    return [*parts, _response(record, response)] if with_response and response in record.fields else parts


def changed_fields(record: Record, parts: Sequence[Part], pairs: bool = False) -> int:
    """The number of fields whose text the template changed or left out, so that their units have no place.

    Args:
        pairs: the parts are those of both halves of a preference record, else of the chosen one.
    """
    placed = {piece.field for part in parts for piece in part.pieces}
    meant = {field for field, text in record.fields.items() if text.strip()}
    if record.format == "preference" and not pairs:
        meant.discard("rejected")
    return len(meant - placed)


class _Text:
    """A string that remembers which of its characters are which field."""

    def __init__(self) -> None:
        self.value = ""
        self.pieces: list[Piece] = []

    def literal(self, text: str) -> _Text:
        self.value += text
        return self

    def field(self, name: str, text: str) -> _Text:
        if text:
            self.pieces.append(Piece(name, 0, len(self.value), len(text)))
        return self.literal(text)


def _prompt_and_response(record: Record, half: Half) -> tuple[list[str], str]:
    """Field names of a single-turn record: the prompt's in order (an empty text is no field), and the response's."""
    fields, roles = record.fields, record.roles
    if roles:
        if roles not in (("user",), ("user", "assistant")):
            raise UserError(f"{record.where}: a conversation of turns {' '.join(roles)} needs data.template: chat")
        prompt, response = [*fields][:1], [*fields, ""][1]
    elif record.format == "instruction" or not fields.keys().isdisjoint(("instruction", "input")):
        prompt, response = ["instruction", "input"] if "input" in fields else ["instruction"], "output"
    else:
        prompt, response = ["prompt"], "response"
    return prompt, half if record.format == "preference" else response


def _response(record: Record, field: str) -> Part:
    text = record.fields[field]
    return Part(text, True, (Piece(field, 0, 0, len(text)),), ends_with_eos=field not in record.unfinished)


def _render_chat(record: Record, tokenizer: Any, with_response: bool, half: Half) -> list[Part]:
    if not tokenizer.chat_template:
        raise UserError("data.template: chat: the tokenizer has no chat template; use minillm or plain")
    messages = _messages(record, half)
    if with_response:
        is_cut = any(piece.field in record.unfinished for piece in messages[-1].pieces)
        return _split_turns(messages, _place(record, tokenizer, messages), tokenizer, is_cut)
    if messages[-1].role == "assistant":
        messages = messages[:-1]
    placed = _place(record, tokenizer, messages, generation=True)
    pieces = (_moved(*pair) for pair in zip(messages, placed.contents, strict=True))
    return [Part(placed.text, False, tuple(piece for found in pieces for piece in found))]


def _messages(record: Record, half: Half) -> list[_Message]:
    response: str
    if record.roles:
        turns = zip(record.roles, record.fields.items(), strict=False)  # a preference has two fields more
        messages = [_Message(role, text, (Piece(name, 0, 0, len(text)),)) for role, (name, text) in turns]
        response = half if record.format == "preference" else ""
    else:
        prompt, response = _prompt_and_response(record, half)
        user = _Text()
        for field in prompt:
            user.literal("\n\n" if user.value else "").field(field, record.fields.get(field, ""))
        messages = [_Message("user", user.value, tuple(user.pieces))]
    if text := record.fields.get(response):
        messages.append(_Message("assistant", text, (Piece(response, 0, 0, len(text)),)))
    return messages


class _Place(NamedTuple):
    """Where a message's content lies in a rendered conversation."""

    start: int
    end: int
    shift: int | None
    """Where the content's first character is or, trimmed away, would be; None: the template changed the content."""


class _Placed(NamedTuple):
    """A rendered conversation; a content without a place was not found in it."""

    text: str
    contents: Sequence[_Place | None]


def _place(record: Record, tokenizer: Any, messages: Sequence[_Message], generation: bool = False) -> _Placed:
    """Render twice: for real, and with marks for contents, which shows what the template writes around them."""
    try:
        whole = _apply(tokenizer, messages, generation)
    except Exception as error:  # a template may raise anything of jinja's, or its own
        roles = " ".join(message.role for message in messages)
        raise UserError(f"{record.where}: the chat template refuses turns {roles}: {error}") from None
    literals = _literals(tokenizer, messages, generation)
    return _Placed(whole, _between(whole, messages, literals) or _searched(whole, messages, tokenizer, generation))


def _literals(tokenizer: Any, messages: Sequence[_Message], generation: bool) -> list[str]:
    """What the template writes before, between and after the contents; empty for one that writes no content once."""
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    try:
        skeleton = _apply(
            tokenizer, [m._replace(content=mark) for m, mark in zip(messages, marks, strict=True)], generation
        )
    except Exception:  # it insists on something in a content
        return []
    literals, cursor = [], 0
    for mark in marks:
        at = skeleton.find(mark, cursor)
        if at < 0 or skeleton.count(mark) != 1:
            return []
        literals.append(skeleton[cursor:at])
        cursor = at + len(mark)
    return [*literals, skeleton[cursor:]]


def _between(whole: str, messages: Sequence[_Message], literals: Sequence[str]) -> list[_Place]:
    """The contents between the literals; empty where these do not stand as the marks had it."""
    if not literals or not whole.startswith(literals[0]):
        return []
    places, cursor = [], len(literals[0])
    for i, (message, literal) in enumerate(zip(messages, literals[1:], strict=True)):
        end = _content_end(whole, cursor, message.content, literal, is_last=i == len(messages) - 1)
        if end < cursor:
            return []
        core, rendered = message.content.strip(), whole[cursor:end]
        if not core or rendered.count(core) != 1:
            places.append(_Place(cursor, end, cursor if rendered == message.content else None))
        else:
            at = cursor + rendered.index(core)
            # the template may put more before this content than before a mark, such as an empty thought
            start = cursor if rendered.strip() == core else at
            places.append(_Place(start, end, at - message.content.index(core)))
        cursor = end + len(literal)
    return places


def _content_end(whole: str, start: int, content: str, literal: str, is_last: bool) -> int:
    """Where a content ends that begins at ``start``: as it is, or trimmed, else wherever the next literal stands."""
    for form in (content, content.strip(), content.rstrip(), content.lstrip()):
        end = start + len(form)
        if whole.startswith(form + literal, start) and (not is_last or end + len(literal) == len(whole)):
            return end
    if is_last:
        return len(whole) - len(literal) if whole.endswith(literal) else -1
    return whole.find(literal, start)


def _searched(whole: str, messages: Sequence[_Message], tokenizer: Any, generation: bool) -> list[_Place | None]:
    """For templates that write other things around some contents: each in its own frame, else where it stands."""
    places: list[_Place | None] = []
    cursor = 0
    for i, message in enumerate(messages):
        core = message.content.strip()
        framed = _framed(whole, messages, i, tokenizer, generation)
        first, last = framed or (cursor, len(whole))
        at = whole.find(core, max(first, cursor), last) if core else -1
        if at >= 0:
            places.append(_Place(at, at + len(core), at - message.content.index(core)))
        else:
            places.append(_Place(first, last, None) if framed and first >= cursor else None)
        found = places[-1]
        cursor = found.end if found else cursor
    return places


def _framed(
    whole: str, messages: Sequence[_Message], i: int, tokenizer: Any, generation: bool
) -> tuple[int, int] | None:
    """Where message ``i`` lies by what the template writes around a mark in its place; None if that differs."""
    marked = [m._replace(content=_MARK) if j == i else m for j, m in enumerate(messages)]
    try:
        before, found, after = _apply(tokenizer, marked, generation).partition(_MARK)
    except Exception:  # it insists on something in a content
        return None
    start, end = len(before), len(whole) - len(after)
    fits = found and _MARK not in after and whole.startswith(before) and whole.endswith(after)
    return (start, end) if fits and start <= end else None


def _split_turns(messages: Sequence[_Message], placed: _Placed, tokenizer: Any, is_cut: bool) -> list[Part]:
    """Cut a conversation into prompts and responses; a response holds its turn's end token.

    A response starts where generation would: what a template writes between its generation prompt and a content (an
    empty thought, a space) is the model's to write.

    Args:
        is_cut: the last response ends with its content, as a length limit cut it off there.
    """
    parts: list[Part] = []
    start = 0
    waiting: list[Piece] = []
    for i, (message, place) in enumerate(zip(messages, placed.contents, strict=True)):
        if place is None:
            continue
        pieces = _moved(message, place)
        if message.role != "assistant":
            waiting += pieces
            continue
        stops_here = is_cut and i == len(messages) - 1
        end, has_end = (place.end, True) if stops_here else _turn_end(placed.text, place.end, tokenizer)
        asked = _generation_start(placed.text, messages[:i], tokenizer)
        first = asked if start <= asked <= place.start else place.start
        parts.append(_part(placed.text, start, first, waiting))
        parts.append(_part(placed.text, first, end, pieces, is_response=True, ends_with_eos=not has_end))
        start, waiting = end, []
    return [*parts, _part(placed.text, start, len(placed.text), waiting)] if waiting or not parts else parts


def _generation_start(text: str, before: Sequence[_Message], tokenizer: Any) -> int:
    """Where the generation prompt after the messages ``before`` ends in ``text``; -1 if ``text`` does not have it."""
    try:
        prompt = _apply(tokenizer, before, generation=True)
    except Exception:  # a conversation that no template lets an assistant begin
        return -1
    return len(prompt) if text.startswith(prompt) else -1


def _part(
    text: str, start: int, end: int, pieces: Sequence[Piece], is_response: bool = False, ends_with_eos: bool = False
) -> Part:
    inside = tuple(piece._replace(start=piece.start - start) for piece in pieces)
    return Part(text[start:end], is_response, inside, ends_with_eos)


def _moved(message: _Message, place: _Place | None) -> list[Piece]:
    """The pieces of a message's content, where they lie in the conversation, cut to what the template kept of them."""
    if place is None or place.shift is None:
        return []
    moved = []
    for field, field_start, start, length in message.pieces:
        first = max(start + place.shift, place.start)
        last = min(start + place.shift + length, place.end)
        if first < last:
            moved.append(Piece(field, field_start + first - (start + place.shift), first, last - first))
    return moved


def _turn_end(text: str, end: int, tokenizer: Any) -> tuple[int, bool]:
    """Where an assistant's turn ends: after the end token that follows its content, if one does."""
    specials = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    # a special token that opens the next turn is no end of this one
    ends = {token for token in specials if _END_TOKEN.search(token)} | {tokenizer.eos_token}
    pattern = "|".join(re.escape(token) for token in sorted(ends, key=len, reverse=True))
    match = re.compile(rf"\s*(?:{pattern})").match(text, end)
    return (match.end(), True) if match else (end, False)


def _apply(tokenizer: Any, messages: Sequence[_Message], generation: bool) -> str:
    """The conversation as the template writes it; with ``generation`` up to where an answer would begin."""
    plain = [{"role": m.role, "content": m.content} for m in messages]
    text: str = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generation)
    if not generation or text != tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=False):
        return text
    # a template that knows no generation prompt, but may still announce the speaker
    answered = [*plain, {"role": "assistant", "content": _MARK}]
    before, found, _ = tokenizer.apply_chat_template(answered, tokenize=False).partition(_MARK)
    header = before[len(text) :] if found and before.startswith(text) else ""
    return text + header if header.strip() else text
