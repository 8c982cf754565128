from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mta_ds.spans.markup import _is_table_rule, regions


def not_prose(text: str) -> list[str]:
    return [text[start:end].strip("\r\n") for start, end, is_prose in regions(text) if not is_prose]


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab1|-`~ \t\n\r\u2028>*=.({;😀"), max_size=80))
def test_regions_cover_the_text(text: str) -> None:
    found = list(regions(text))
    assert "".join(text[start:end] for start, end, _ in found) == text
    assert all(start < end for start, end, _ in found)


@pytest.mark.parametrize(
    "block",
    [
        "```\nsome words\n\nmore words\n```",
        "```python\nprint('a')\n```",
        "~~~~ c\n```\nint x;\n~~~~",
        "  ````md\n```\nprose\n```\n  ````",
        "> ```\n> quoted code\n> ```",
        "- ```sh\n  make all\n  ```",
        "```print(1)\nx = 2```",
        "```only this line```",
        "| a | b |\n|---|---|\n| one | two |",
        "name | age\n--- | :-:\nBob|3",
        "| one | two |\n| three | four |",
        "one | two | three\nfour | five | six",
        "+------+------+\n| one  | two  |\n+------+------+",
        "=====",
        "***",
        "┌────┬────┐",
        "1,024  3.5  77.1  0.002  12",
        "00000010: 4865 6c6c 6f20 776f",
        "    def f(x):\n        y = x + 1\n        return y",
        "\tfor (int i = 0; i < n; i++) {\n\t\tsum += a[i];\n\t}",
        "    $ pip install something\n    $ run it now",
        "    import os\n\n    print(os.name)",
        "    SELECT name FROM people\n    WHERE age > 3;",
    ],
)
def test_blocks_that_are_no_prose(block: str) -> None:
    text = f"Some prose before it.\n\n{block}\n\nAnd some after it.\n"
    lines = [line for line in block.split("\n") if line]
    for variant in (text, text.replace("\n", "\r\n")):
        assert [line for line in not_prose(variant) if line] == lines


def test_a_fence_that_nothing_closes_goes_on_to_the_end() -> None:
    assert not_prose("Look:\n```\na\nb c d") == ["```", "a", "b c d"]


@pytest.mark.parametrize(
    "text",
    [
        "Call `f(x)` and ``g`` or ```h``` now.",
        "Use | to pipe.\nThat is all.",
        "P(A | B) is large\nP(B | A) is small",
        "Either a|b or c|d\nand then e|f",
        "Home | About | Contact",
        "1945",
        "1937, 1954, 1976 and 2018.",
        "$1,000.00",
        "12/05/2020",
        "2 + 2 = 4",
        "Yes",
        "A",
        "?!",
        "1.",
        "- 3 cats",
        "Wait... what?! No!!! (Really?)",
        "🙂🙂🙂🙂",
        "👩‍👩‍👧‍👦 👍🏽",
        "हिन्दी में लिखा हुआ",
        "你好。再见！",
        "    An indented paragraph of prose, (as some write it),\n    goes on here.",
        "    - a nested item\n    - another: with more",
        "\tHe said that it was so.",
        "    He returned (home); then he slept.\n    She did not: she read.",
        "- item\n\n    its second paragraph",
        "Text before\n    x = 1;",
        "I ~~struck~~ this",
        "For you: if you want:\n\n    for all of us it is a day of rest",
    ],
)
def test_prose_stays_prose(text: str) -> None:
    assert not_prose(text) == []


# As one pattern, which takes the square of a line's length where it does not match.
TABLE_RULE = re.compile(r"[\s>]*(?=[^|]*\|)(?=[^-]*-)\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$")


@settings(max_examples=2000)
@given(st.text(st.sampled_from("||---:: >\tx\u2003"), max_size=14), st.sampled_from(["", "\n", "\r\n", "\u2028"]))
def test_a_rule_of_a_table_is_what_the_pattern_says(line: str, end: str) -> None:
    assert _is_table_rule(line + end) == (TABLE_RULE.match(line + end) is not None)


@pytest.mark.parametrize("line", ["|-", "-|", "> | :-: | --- |", "|---|:-:|\n", "--- | --:"])
def test_rules_of_tables(line: str) -> None:
    assert _is_table_rule(line) and TABLE_RULE.match(line)


@pytest.mark.parametrize("line", ["|", "---", "||-", "-||", "| x | - |", "|-:-|", "| > |-|", ""])
def test_lines_that_are_no_rules_of_tables(line: str) -> None:
    assert not _is_table_rule(line) and not TABLE_RULE.match(line)
