"""Labelled bracketing F1 as EVALB counts it with COLLINS.prm.

Brackets are (label, start, end) over the words that are left when punctuation is deleted; ROOT and TOP are no
brackets; a bracket that occurs twice counts twice; PRT counts as ADVP; grammatical functions ("NP-SBJ") are cut
off. Punctuation is what the gold tree tags as such, so that both trees lose the same words.

    python examples/parser/bracket_f1.py GOLD.mrg PREDICTED.mrg
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import nltk

Bracket = tuple[str, int, int]

DELETED_TAGS = frozenset({"TOP", "-NONE-", ",", ":", "``", "''", "."})
ROOTS = frozenset({"", "ROOT", "TOP", "S1", "VROOT"})
EQUAL_LABELS = {"PRT": "ADVP"}


@dataclass
class Counts:
    """Brackets in both trees, in the gold tree and in the predicted one, by label."""

    matched: Counter[str] = field(default_factory=Counter)
    gold: Counter[str] = field(default_factory=Counter)
    predicted: Counter[str] = field(default_factory=Counter)

    def add(self, gold: Counter[Bracket], predicted: Counter[Bracket]) -> None:
        """Count one sentence."""
        for total, brackets in ((self.matched, gold & predicted), (self.gold, gold), (self.predicted, predicted)):
            for (label, _, _), number in brackets.items():
                total[label] += number

    def f1(self, label: str | None = None) -> float:
        """F1 in percent, of one label or of all; 0 where there is nothing to find."""
        matched, gold, predicted = (
            total.total() if label is None else total[label] for total in (self.matched, self.gold, self.predicted)
        )
        return 200.0 * matched / (gold + predicted) if gold + predicted else 0.0


def brackets(tree: nltk.Tree, deleted: Iterable[bool]) -> Counter[Bracket]:
    """The multiset of labelled brackets of ``tree``, with word positions counted over the words not ``deleted``."""
    kept = [0]
    for is_deleted in deleted:
        kept.append(kept[-1] + (not is_deleted))
    found: Counter[Bracket] = Counter()
    _collect(tree, 0, kept, found)
    return found


def _collect(tree: nltk.Tree, start: int, kept: list[int], found: Counter[Bracket]) -> int:
    """Add the brackets under ``tree``, whose first word is number ``start``; returns the number after its last."""
    if len(tree) == 1 and isinstance(tree[0], str):
        return start + 1
    end = start
    for child in tree:
        end = _collect(child, end, kept, found)
    label = tree.label()
    label = label.split("-")[0].split("=")[0]
    if label not in ROOTS and kept[start] < kept[end]:
        found[EQUAL_LABELS.get(label, label), kept[start], kept[end]] += 1
    return end


def score(gold: Iterable[nltk.Tree], predicted: Iterable[nltk.Tree]) -> Counts:
    """Count the brackets of parallel trees over the same words.

    Raises:
        ValueError: a predicted tree has another number of words, or there are more trees on one side.
    """
    counts = Counts()
    for number, (gold_tree, predicted_tree) in enumerate(zip(gold, predicted, strict=True), start=1):
        deleted = [tag in DELETED_TAGS for _, tag in gold_tree.pos()]
        if len(predicted_tree.leaves()) != len(deleted):
            raise ValueError(
                f"tree {number}: {len(deleted)} words in the gold tree, {len(predicted_tree.leaves())} predicted"
            )
        counts.add(brackets(gold_tree, deleted), brackets(predicted_tree, deleted))
    return counts


def main() -> None:
    from treebank import read_trees

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("gold", type=Path)
    arguments.add_argument("predicted", type=Path)
    options = arguments.parse_args()
    counts = score(read_trees(options.gold), read_trees(options.predicted))
    for label in (None, "NP", "VP"):
        print(f"{label or 'all'} F1 {counts.f1(label):.2f}")


if __name__ == "__main__":
    main()
