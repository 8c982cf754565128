"""Which lines of a text are no prose: code blocks, Markdown tables, rules and tables of figures.

A constituency parser has nothing sensible to say about them, so they get words and no constituents. The rules err
towards prose: code inside a sentence, quotations and nested lists that are indented, short figures all stay prose.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence

# After list marks and quotation marks; what follows backticks must not close them again on the same line.
_FENCE = re.compile(r"\s*(?:(?:>|[-*+]|\d{1,9}[.)])\s+|>)*(?P<fence>`{3,}(?=[^`]*$)|~{3,})")
_FENCED_LINE = re.compile(r"\s*(`{3,9})[^`].*\1\s*$")
_INDENTED = re.compile(r"(?: {4}| {0,3}\t)\s*\S")
_CODE = re.compile(
    r"""
      .* [;{}] \s* $                                                    # ends like a statement or a block
    | [\w.\[\]'"*&]+ (?:,\s*[\w.\[\]]+)* \s* (?:[-+*/%|&^:]|<<|>>)? = (?!=) \s* \S   # assigns
    | (?:await\s+|return\s+)? [\w.]+ (?:\[[^\]]*\])* \( .* [),(\[{] \s* $ # calls, over several lines perhaps
    | (?:def|class|if|elif|else|for|while|try|except|finally|with|async|match|case) \b .* : \s* $
    | (?:def|class|func|function|fn|struct) \s+ \w+ \s* [({<:]
    | (?:import|include|using|package) \s+ [\w.]+ ;? \s* $ | from \s+ [\w.]+ \s+ import \b
    | return \s+ [\w.]+ (?: \s* [-+*/%.(\[,] .* )? $ | (?:pass|break|continue|return|end|fi|done) $
    | (?:\$|>>>|\.\.\.|In\s\[\d+\]:) \s | \#!?[\w/]* (?:include|define|/bin/) | // | /\* | @\w+ | </?\w[^>]*> | <!--
    | (?:SELECT|INSERT\s+INTO|CREATE\s+TABLE|FROM|WHERE|GROUP\s+BY|ORDER\s+BY) \b
    | (?:sudo|pip|npm|git|docker|apt-get|curl|cd|ls|mkdir) \s+ [-\w./]+ (?: \s+ \S+ )? $
    | [)\]}]+ [,;]? \s* $
    """,
    re.VERBOSE,
)
_BAR = re.compile(r"(?<!\\)\|")
_OUTER_BARS = re.compile(r"\s*(?:>\s*)*\|.*\|\s*$", re.DOTALL)
_ASIDE = re.compile(r"`[^`\n]*`|\([^()\n]*\)")  # a bar inside is no edge of a cell
_QUOTES = re.compile(r"\A[\s>]+")
_RULE_CELL = re.compile(r":?-+:?")
_GRID_RULE = re.compile(r"\s*\+[-=+:]+\+\s*$")
_WORD = re.compile(r"[^\W\d_]{3}")
_SHORT_RULE = 3  # signs without any digit that make a rule
_FIGURES = 12  # characters, fewer may be a date, a price, a sum: an answer


def regions(text: str) -> Iterator[tuple[int, int, bool]]:
    """The text in order as (start, end, is prose): lines of prose together, every other line by itself."""
    lines = text.splitlines(keepends=True)
    marks = [False] * len(lines)
    for mark in (_mark_fences, _mark_tables, _mark_indented_code, _mark_figures):
        mark(lines, marks)
    begin = start = 0
    for line, marked in zip(lines, marks, strict=True):
        end = start + len(line)
        if marked:
            if begin < start:
                yield begin, start, True
            yield start, end, False
            begin = end
        start = end
    if begin < start:
        yield begin, start, True


def _mark_fences(lines: Sequence[str], marks: list[bool]) -> None:
    """Blocks between fences, with these; a block that nothing closes goes on to the end."""
    fence = ""
    for number, line in enumerate(lines):
        if fence:
            marks[number] = True
            # Models also close a block at the end of its last line.
            if line.rstrip().endswith(fence):
                fence = ""
        elif opening := _FENCE.match(line):
            marks[number] = True
            fence = opening["fence"]
        else:
            marks[number] = _FENCED_LINE.match(line) is not None


def _mark_tables(lines: Sequence[str], marks: list[bool]) -> None:
    """Two or more consecutive lines of cells; with a |---|---| rule any bar makes a cell."""
    number = 0
    while number < len(lines):
        end = number
        while end < len(lines) and not marks[end] and (_BAR.search(lines[end]) or _GRID_RULE.match(lines[end])):
            end += 1
        for first, last in _tables(lines[number:end]):
            marks[number + first : number + last] = [True] * (last - first)
        number = max(end, number + 1)


def _tables(lines: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of table rows among consecutive lines that have bars."""
    rule = next((n for n, line in enumerate(lines) if _is_table_rule(line)), None)
    if rule is not None and len(lines) > 1:
        yield max(rule - 1, 0), len(lines)
        lines = lines[: max(rule - 1, 0)]
    start = 0
    for number, is_row in enumerate([*map(_is_row, lines), False]):
        if not is_row:
            if number - start > 1:
                yield start, number
            start = number + 1


def _is_table_rule(line: str) -> bool:
    """|---|:-:| with or without the bars at its ends, but with one at least; quoted or not."""
    body = _QUOTES.sub("", line).rstrip()
    cells = body.removeprefix("|").removesuffix("|").split("|")
    return "|" in body and all(_RULE_CELL.fullmatch(cell.strip()) for cell in cells)


def _is_row(line: str) -> bool:
    if _OUTER_BARS.match(line) or _GRID_RULE.match(line):
        return True
    return " | " in _ASIDE.sub("", line).strip()


def _mark_indented_code(lines: Sequence[str], marks: list[bool]) -> None:
    """Indented lines after a blank one of which at least half look like code; blank lines may part them."""
    block: list[int] = []
    after_blank = True
    for number, line in enumerate([*lines, "end"]):
        blank = not line.strip()
        indented = number < len(lines) and not marks[number] and _INDENTED.match(line) is not None
        if indented and (block or after_blank):
            block.append(number)
        elif not blank:
            if 2 * sum(_CODE.match(lines[n].strip()) is not None for n in block) >= max(len(block), 1):
                for n in block:
                    marks[n] = True
            block = []
        after_blank = blank


def _mark_figures(lines: Sequence[str], marks: list[bool]) -> None:
    """Rules, and longer lines with hardly a letter."""
    for number, line in enumerate(lines):
        if not marks[number]:
            marks[number] = _is_figures(line)


def _is_figures(line: str) -> bool:
    if _WORD.search(line):
        return False
    characters = "".join(line.split())
    if len(characters) < _SHORT_RULE or 5 * sum(map(str.isalpha, characters)) > len(characters):
        return False
    if 4 * sum(map(_is_sign, characters)) < 3 * len(characters):
        return False
    return len(characters) >= _FIGURES or not any(map(str.isalnum, characters))


@functools.lru_cache(maxsize=4096)
def _is_sign(character: str) -> bool:
    """Punctuation, digits, mathematics and what boxes are drawn with; not emoji, not marks of a script."""
    category = unicodedata.category(character)
    return category[0] in "PN" or category in ("Sm", "Sc", "Sk") or "\u2500" <= character <= "\u259f"
