"""Read treebank trees (PTB brackets, one a line) as the examples that benepar trains on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nltk
from benepar.integrations.spacy_plugin import SentenceWrapper
from benepar.parse_base import BaseInputExample
from benepar.ptb_unescape import guess_space_after

_UNESCAPED = {
    "-LRB-": "(",
    "-RRB-": ")",
    "-LSB-": "[",
    "-RSB-": "]",
    "-LCB-": "{",
    "-RCB-": "}",
    "``": '"',
    "''": '"',
}
_ESCAPED_BY_TAG = {"-LRB-": "-LRB-", "-RRB-": "-RRB-", "``": "``", "''": "''"}


@dataclasses.dataclass
class TreeExample(BaseInputExample):
    """A sentence with its gold (or silver) tree; ``words`` are normalised as they are when text is parsed."""

    words: list[str]
    space_after: list[bool]
    tree: nltk.Tree

    def leaves(self) -> list[str]:
        return list(self.tree.leaves())

    def pos(self) -> list[tuple[str, str]]:
        return list(self.tree.pos())


def example_from_tree(tree: nltk.Tree, space_after: list[bool] | None = None) -> TreeExample:
    """The example of one tree; where white space stood is guessed by benepar's rules unless given."""
    words = [_UNESCAPED.get(leaf, leaf) for leaf in tree.leaves()]
    if space_after is None:
        # A quotation mark's tag says whether it opens or closes, which its bare form does not.
        escaped = [_ESCAPED_BY_TAG.get(tag, leaf) for leaf, tag in tree.pos()]
        space_after = guess_space_after(escaped)
    normalize = SentenceWrapper.TEXT_NORMALIZATION_MAPPING
    return TreeExample([normalize.get(word, word) for word in words], space_after, tree)


def read_trees(path: Path) -> list[nltk.Tree]:
    """Every tree of a file with one bracketed tree a line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [nltk.Tree.fromstring(line) for line in lines if line.strip()]
