"""The bundled demo records: enough, distinct, well formed, and the held-out ones really held out."""

from __future__ import annotations

import json
import re
import unicodedata
from itertools import combinations
from pathlib import Path

import mta_ds

FOLDER = Path(mta_ds.__file__).parent / "assets" / "demo"


def read(split: str) -> list[dict[str, str]]:
    text = (FOLDER / f"{split}.jsonl").read_bytes().decode("utf-8")  # strict: broken UTF-8 is an error
    return [json.loads(line) for line in text.splitlines()]


TRAIN, HELDOUT = read("train"), read("heldout")
ALL = TRAIN + HELDOUT


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_counts_and_ids():
    assert len(TRAIN) >= 250
    assert len(HELDOUT) >= 40
    for split, records in (("train", TRAIN), ("heldout", HELDOUT)):
        assert [r["id"] for r in records] == [f"demo-{split}-{i:03d}" for i in range(len(records))]


def test_records_are_well_formed():
    for record in ALL:
        assert list(record) == ["id", "instruction", "input", "output"], record["id"]
        assert record["instruction"] and record["output"], record["id"]
        for text in record.values():
            assert text == text.strip(), record["id"]
            assert unicodedata.normalize("NFC", text) == text, record["id"]
            assert not any(unicodedata.category(c) in {"Cc", "Cs", "Co", "Cn"} and c != "\n" for c in text), record[
                "id"
            ]


def test_outputs_have_the_length_of_an_answer():
    lengths = [len(words(record["output"])) for record in ALL]
    assert min(lengths) >= 5
    assert max(lengths) <= 100
    assert sum(25 <= n <= 95 for n in lengths) >= 0.9 * len(lengths)


def test_variety():
    assert sum(bool(r["input"]) for r in ALL) >= 50
    for sign in ("```", "\n- ", "\n1. ", '"', "?", ";", "→", "🌱"):
        assert any(sign in record["output"] or record["output"].startswith(sign.strip("\n")) for record in ALL), sign


def test_no_two_records_ask_the_same():
    questions = [" ".join(words(f"{r['instruction']} {r['input']}")) for r in ALL]
    assert len(set(questions)) == len(questions)
    instructions = {" ".join(words(r["instruction"])) for r in TRAIN}
    assert not instructions & {" ".join(words(r["instruction"])) for r in HELDOUT}


def test_no_two_outputs_are_alike():
    bags = [(record["id"], set(words(record["output"]))) for record in ALL]
    alike = [(a, b) for (a, x), (b, y) in combinations(bags, 2) if len(x & y) > 0.6 * len(x | y)]
    assert alike == []
