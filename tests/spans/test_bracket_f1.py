"""The bracket scorer on trees whose counts are known, and the training loss against benepar's own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import nltk
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "parser"
_spec = importlib.util.spec_from_file_location("bracket_f1", EXAMPLES / "bracket_f1.py")
assert _spec is not None and _spec.loader is not None
bracket_f1 = importlib.util.module_from_spec(_spec)
sys.modules["bracket_f1"] = bracket_f1  # dataclasses look their module up
_spec.loader.exec_module(bracket_f1)

GOLD = "(ROOT (S (NP (DT the) (NN cat)) (VP (VBD sat) (PP (IN on) (NP (DT the) (NN mat)))) (. .)))"


def counts(gold: str, predicted: str):
    return bracket_f1.score([nltk.Tree.fromstring(gold)], [nltk.Tree.fromstring(predicted)])


def test_equal_trees_score_100() -> None:
    result = counts(GOLD, GOLD)
    assert result.f1() == result.f1("NP") == result.f1("VP") == 100
    assert result.gold == {"S": 1, "NP": 2, "VP": 1, "PP": 1}


def test_one_wrong_attachment() -> None:
    predicted = "(ROOT (S (NP (DT the) (NN cat)) (VP (VBD sat)) (PP (IN on) (NP (DT the) (NN mat))) (. .)))"
    result = counts(GOLD, predicted)
    assert result.f1() == pytest.approx(80)  # 4 of 5 brackets on either side
    assert (result.f1("NP"), result.f1("VP")) == (100, 0)


def test_missing_brackets_lower_recall_only() -> None:
    predicted = "(TOP (S (NP (DT the) (NN cat)) (VBD sat) (IN on) (DT the) (NN mat) (. .)))"
    assert counts(GOLD, predicted).f1() == pytest.approx(100 * 2 * 1 * 0.4 / 1.4)


def test_punctuation_is_deleted_by_the_gold_tags() -> None:
    gold = "(ROOT (S (NP (NN a)) (, ,) (VP (VB b)) (. .)))"
    predicted = "(ROOT (S (NP (NN a) (NN ,)) (VP (VB b) (NN .))))"
    assert counts(gold, predicted).f1() == 100


def test_a_bracket_of_punctuation_alone_is_none() -> None:
    assert counts("(ROOT (S (NN a) (NP (. .))))", "(ROOT (S (NN a) (. .)))").gold == {"S": 1}


def test_duplicates_count_as_often_as_they_occur() -> None:
    result = counts("(ROOT (NP (NP (NN a) (NN b))))", "(ROOT (NP (NN a) (NN b)))")
    assert (result.matched["NP"], result.gold["NP"], result.predicted["NP"]) == (1, 2, 1)


def test_prt_counts_as_advp_and_functions_are_cut() -> None:
    assert counts("(ROOT (S-TPC (PRT (RP up)) (NN a)))", "(ROOT (S (ADVP (RP up)) (NN a)))").f1() == 100


def test_an_unlabelled_root_is_no_bracket() -> None:
    assert counts("( (S (NN a)))", "(ROOT (S (NN a)))").f1() == 100


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="tree 1: 7 words in the gold tree, 1 predicted"):
        counts(GOLD, "(ROOT (S (NN a)))")
    with pytest.raises(ValueError, match="shorter"):
        bracket_f1.score([nltk.Tree.fromstring(GOLD)], [])


def test_nothing_to_find_is_zero() -> None:
    assert counts("(ROOT (NN a))", "(ROOT (NN a))").f1() == 0


def test_command(tmp_path: Path) -> None:
    (tmp_path / "gold.mrg").write_text(GOLD + "\n", encoding="utf-8")
    command = [sys.executable, str(EXAMPLES / "bracket_f1.py"), *[str(tmp_path / "gold.mrg")] * 2]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "all F1 100.00\nNP F1 100.00\nVP F1 100.00\n"
