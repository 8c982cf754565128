"""Parse sentences of plain text with a trained parser, as silver trees to train a smaller one on.

python examples/parser/silver.py --parser teacher --texts dolly_train.jsonl --sentences 15000 --output silver.mrg
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import spacy
from encoder import texts_in_records

from mta_ds.files import write_atomic
from mta_ds.spans.parser import Parse, Sentence, load_parser

ESCAPED = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}


def sentences_of(texts: list[str], min_words: int, max_words: int) -> Iterator[Sentence]:
    """Sentences by spaCy's rules, within the given lengths, each once."""
    rules = spacy.blank("en")
    rules.add_pipe("sentencizer")
    seen: set[Sentence] = set()
    for document in rules.pipe(texts):
        for span in document.sents:
            words = [word for word in span if not word.is_space]
            sentence = Sentence(tuple(word.text for word in words), tuple(bool(word.whitespace_) for word in words))
            if min_words <= len(words) <= max_words and sentence not in seen:
                seen.add(sentence)
                yield sentence


def bracketed(sentence: Sentence, parse: Parse) -> str:
    """The parse as one line of PTB brackets under ROOT."""
    opening: list[list[str]] = [[] for _ in sentence.words]
    closing = [0] * len(sentence.words)
    for constituent in parse.constituents:
        chain = constituent.label.split("::")
        opening[constituent.start_word] += [f"({label} " for label in chain]
        closing[constituent.end_word - 1] += len(chain)
    leaves = [
        f"{''.join(labels)}({tag} {escape(word)}){')' * number}"
        for word, tag, labels, number in zip(sentence.words, parse.tags, opening, closing, strict=True)
    ]
    return f"(ROOT {' '.join(leaves)})"


def escape(word: str) -> str:
    """A word without white space or the bracket format's own brackets."""
    if word in ESCAPED:
        return ESCAPED[word]
    return "".join({"(": "-", ")": "-"}.get(character, character) for character in word if not character.isspace())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--parser", required=True, help="folder of the trained parser")
    arguments.add_argument("--texts", type=Path, nargs="+", required=True, help="JSON lines")
    arguments.add_argument("--sentences", type=int, default=15000)
    arguments.add_argument("--min-words", type=int, default=4)
    arguments.add_argument("--max-words", type=int, default=40)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--output", type=Path, required=True)
    options = arguments.parse_args()
    parser = load_parser(options.parser)
    texts = list(texts_in_records(options.texts))
    found = [s for s in sentences_of(texts, options.min_words, options.max_words) if parser.fits(s)]
    chosen = random.Random(options.seed).sample(found, min(options.sentences, len(found)))
    lines = [bracketed(sentence, parse) for sentence, parse in zip(chosen, parser.parse(chosen), strict=True)]
    write_atomic(options.output, "\n".join(lines) + "\n")
    print(f"{options.output}: {len(lines)} of {len(found)} sentences")


if __name__ == "__main__":
    main()
