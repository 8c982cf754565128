"""Draw a parsed text: its constituency trees as SVG, and the text itself with the chosen units marked."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

from mta_ds.data import Units

Range = tuple[int, int]

_FONT = 13  # px
_CHARACTER = 0.56 * _FONT  # mean advance of a sans-serif letter
_GAP, _ROW, _MARGIN = 16, 44, 12  # px: between words, between levels, around the drawing
_MAX_SHOWN = 24  # characters of a word that are drawn; the rest is in its tooltip


class ParsedExample(NamedTuple):
    """A text with its parse and the units that training takes from it, as character ranges [K, 2]."""

    text: str
    units: Units
    words: np.ndarray
    phrases: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A constituent or a word in the drawing; ``level`` counts rows up from the words (0)."""

    label: str
    level: int
    x: float
    chosen: bool
    title: str
    children: tuple[Node, ...] = ()
    tag: str = ""


def marked_text(example: ParsedExample, constituents: Sequence[Range] | None = None) -> Markup:
    """The text as HTML; chosen phrases are ``span.phrase``, chosen words ``span.word``.

    Ranges may nest or even cross: the text is cut at every edge, and each piece carries the classes of all that
    covers it.

    Args:
        constituents: where given, each piece tells in ``data-c`` the positions of those over it, for a page's filters.
    """
    phrases, words = sorted(_ranges(example.text, example.phrases)), sorted(_ranges(example.text, example.words))
    ranges = [*phrases, *words, *(constituents or ())]
    first_word, first_constituent = len(phrases), len(phrases) + len(words)
    pieces = []
    for start, end, over in _pieces(len(example.text), ranges):
        marking = [ranges[i] for i in over if i < first_word]
        in_word = any(first_word <= i < first_constituent for i in over)
        classes = _classes(start, end, marking, in_word)
        attributes = {"class": " ".join(classes)} if classes or constituents is not None else {}
        if constituents is not None:
            attributes["data-c"] = " ".join(str(i - first_constituent) for i in over if i >= first_constituent)
        pieces.append(_piece(example.text[start:end], attributes))
    return Markup("").join(pieces)


def trees(example: ParsedExample, max_sentences: int | None = None) -> list[Markup]:
    """One SVG for each of the first sentences, or of all; chosen constituents and words are filled."""
    shown = islice(sentence_nodes(example), max_sentences)
    return [_draw(nodes) for nodes in shown if nodes]


def sentence_nodes(example: ParsedExample) -> Iterator[list[Node]]:
    """The top nodes of each sentence, none of one without words.

    Constituents are laid over the words they cover, each centred over its children.
    """
    units, text = example.units, example.text
    words, phrases = _ranges(text, example.words), _ranges(text, example.phrases)
    # in the order of their starts: a sentence's own stand together
    bounds = np.searchsorted(units.constituents[:, 0], units.sentences).tolist()
    for (first, last), own in zip(pairwise(units.sentences.tolist()), pairwise(bounds), strict=True):
        ranges = [(int(start), int(end)) for start, end in units.words[first:last].tolist()]
        constituents = zip(units.constituents[slice(*own)].tolist(), units.labels[slice(*own)], strict=True)
        inside = [(s - first, e - first, h, label.replace("::", "·")) for (s, e, h), label in constituents]
        above = {start: label for start, end, _, label in inside if end == start + 1}
        row = _leaves(text, ranges, units.tags[first:last], above, words)
        yield _lay_over(row, inside, ranges, text, phrases)


def _lay_over(
    row: Sequence[Node],
    constituents: Iterable[tuple[int, int, int, str]],
    ranges: Sequence[Range],
    text: str,
    chosen: set[Range],
) -> list[Node]:
    """The top nodes over a row of words, where ``constituents`` are (start word, end word, height, label)."""
    # cover[i] is the topmost node over word i so far; going up by height, it becomes a child of the next one over it.
    cover = list(row)
    for start, end, height, label in sorted(constituents, key=lambda constituent: constituent[2]):
        children = tuple(dict.fromkeys(cover[start:end]))
        x = (children[0].x + children[-1].x) / 2
        where = (ranges[start][0], ranges[end - 1][1])
        node = Node(label, height, x, where in chosen, text[slice(*where)], children)
        cover[start:end] = [node] * (end - start)
    return list(dict.fromkeys(cover))


def _pieces(length: int, ranges: Sequence[Range]) -> Iterator[tuple[int, int, list[int]]]:
    """Where a text is cut at every edge of some ranges: start, end, and the numbers of those over the piece."""
    opening: defaultdict[int, list[int]] = defaultdict(list)
    closing: defaultdict[int, list[int]] = defaultdict(list)
    for number, (start, end) in enumerate(ranges):
        opening[start].append(number)
        closing[end].append(number)
    over: set[int] = set()
    for start, end in pairwise(sorted({0, length, *opening, *closing})):
        over.update(opening[start])
        over.difference_update(closing[start])
        yield start, end, sorted(over)


def _classes(start: int, end: int, phrases: Sequence[Range], in_word: bool) -> list[str]:
    """How a piece with some chosen phrases over it is drawn."""
    classes = ["phrase", f"depth-{min(len(phrases), 3)}"] * (len(phrases) > 0)
    classes += ["opens"] * any(first == start for first, _ in phrases)
    return classes + ["closes"] * any(last == end for _, last in phrases) + ["word"] * in_word


def _piece(text: str, attributes: Mapping[str, str]) -> Markup:
    if not attributes:
        return escape(text)
    told = Markup("").join(Markup(' {}="{}"').format(*pair) for pair in attributes.items())
    return Markup("<span{}>{}</span>").format(told, text)


def _ranges(text: str, units: np.ndarray) -> set[Range]:
    """Ranges without the white space at their end that words may carry, empty ones left out."""
    trimmed = ((int(start), int(start) + len(text[start:end].rstrip())) for start, end in units.tolist())
    return {(start, end) for start, end in trimmed if end > start}


def _leaves(
    text: str, ranges: Sequence[Range], tags: Sequence[str], above: Mapping[int, str], chosen: set[Range]
) -> list[Node]:
    """The words in a row, each as wide as itself, its tag and a label that stands over it alone."""
    x, leaves = float(_MARGIN), []
    for index, (where, tag) in enumerate(zip(ranges, tags, strict=True)):
        word = text[slice(*where)]
        shown = word if len(word) <= _MAX_SHOWN else word[: _MAX_SHOWN - 1] + "…"
        width = max(_width(shown), _width(tag), _width(above.get(index, "")), 14)
        leaves.append(Node(shown, 0, x + width / 2, where in chosen, word, tag=tag))
        x += width + _GAP
    return leaves


def _width(text: str) -> float:
    """Estimated width in px: capitals and CJK are wider than small letters."""
    return sum(
        _CHARACTER * (1.8 if unicodedata.east_asian_width(c) in "WF" else 1.35 if c.isupper() else 1) for c in text
    )


def _draw(tops: Sequence[Node]) -> Markup:
    height = max(node.level for node in tops)
    leaves = [leaf for top in tops for leaf in _walk(top) if leaf.level == 0]
    width = leaves[-1].x + _width(leaves[-1].label) / 2 + _MARGIN
    bottom = _MARGIN + _FONT + height * _ROW
    nodes = [node for top in tops for node in _walk(top)]
    edges = Markup("").join(_edges(node, bottom) for node in nodes)
    labels = Markup("").join(_label(node, bottom) for node in nodes)
    total = bottom + 2 * _FONT + _MARGIN
    opening = Markup(
        '<svg class="tree" role="img" aria-label="parse tree" width="{0}" height="{1}" viewBox="0 0 {0} {1}">'
    )
    return opening.format(round(width), round(total)) + edges + labels + Markup("</svg>")


def _walk(node: Node) -> Iterable[Node]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _edges(node: Node, bottom: float) -> Markup:
    """Square edges: straight down from the child's own place, so no line crosses another constituent's label."""
    top = bottom - node.level * _ROW + 7
    path = Markup('<path d="M{:.1f} {:.1f}v8H{:.1f}V{:.1f}"/>')
    return Markup("").join(
        path.format(node.x, top, child.x, bottom - child.level * _ROW - (_FONT if child.level else 2))
        for child in node.children
    )


def _label(node: Node, bottom: float) -> Markup:
    y = bottom - node.level * _ROW
    if node.level == 0:
        y += _FONT
        tag = Markup('<text class="tag" x="{:.1f}" y="{:.1f}">{}</text>').format(node.x, y + _FONT + 2, node.tag)
        kind = "leaf"
    else:
        tag, kind = Markup(""), "label"
    half = _width(node.label) / 2 + 5
    box = Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="20" rx="5"/>').format(
        node.x - half, y - 15, 2 * half
    )
    text = Markup('<text x="{:.1f}" y="{:.1f}">{}</text>').format(node.x, y, node.label)
    classes = f"{kind} chosen" if node.chosen else kind
    opening = Markup('<g class="{}">').format(classes)
    if node.level:  # what a page's filters go by
        opening = Markup('<g class="{}" data-labels="{}" data-height="{}">').format(
            classes, node.label.replace("·", " "), node.level
        )
    return opening + Markup("<title>{}</title>{}{}</g>{}").format(node.title, box, text, tag)
