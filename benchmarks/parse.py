"""The offline parse against benepar's own spaCy pipeline, and against the bare encoder: same model, same sentences.

    python benchmarks/parse.py                                  # some five minutes on two cores
    python benchmarks/parse.py --cases bundled --json rows.json

Documents are about four sentences of the demo's records. benepar's pipeline parses one document at a time on all
threads; ours are worker processes with a core each, as ``mta-ds parse`` starts them, without their start. The bare
encoder runs over the same sub-words in the same batches on one core, and is compared with one of our workers.
The MiniLM-size model has random weights: its trees mean nothing, and both sides must agree on them all the same.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benepar.nkutil import HParams
from common import Row, bounded, machine_row, options, pin_threads, report

from mta_ds.spans.benepar_model import _lent_tokenizer_method, build_chart_parser, load_model
from mta_ds.spans.parser import _BATCH_POSITIONS, BUNDLED, BeneparParser, Sentence, _batches
from mta_ds.spans.pool import ParserPool
from mta_ds.spans.rows import Field, Parsed, batches, parse_fields
from mta_ds.spans.segment import segment

DEMO = BUNDLED.parent / "demo"
SENTENCES_A_DOCUMENT = 4
AT_LEAST = {"bundled": 5.0, "minilm": 4.0}  # times benepar's sentences/s
ABOVE_ENCODER = 1.35  # of the MiniLM-size model


def documents(num_documents: int) -> list[str]:
    """Texts of about four sentences each, from the demo's records."""
    texts = []
    for path in (DEMO / "train.jsonl", DEMO / "heldout.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            texts += [value for key, value in json.loads(line).items() if key != "id" and isinstance(value, str)]
    sentences = [text[part.ranges[0][0] : part.ranges[-1][1]] for text in texts for part in segment(text)]
    sentences = sorted({" ".join(sentence.split()) for sentence in sentences if len(sentence.split()) > 2})
    random.Random(0).shuffle(sentences)
    grouped = [
        " ".join(sentences[i : i + SENTENCES_A_DOCUMENT]) for i in range(0, len(sentences), SENTENCES_A_DOCUMENT)
    ]
    return grouped[:num_documents]


def minilm_size(folder: Path) -> Path:
    """The bundled model with six encoder layers and random weights."""
    shutil.copytree(BUNDLED, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 6
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    parser = build_chart_parser(
        {**config["benepar"], "hparams": _hparams(config), "pretrained_model_path": str(folder)}
    )
    torch.save(parser.state_dict(), folder / "benepar_model.bin")
    return folder


def _hparams(config: dict[str, Any]) -> Any:

    return HParams(**config["benepar"]["hparams"])


def benepar_pipeline(model: Path) -> Callable[[list[str]], list[Any]]:
    """benepar's own spaCy pipeline over documents, one at a time as it is."""
    import spacy
    from benepar.integrations.spacy_plugin import BeneparComponent

    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    with _lent_tokenizer_method():
        component = BeneparComponent(str(model))
    return lambda texts: [component(doc) for doc in nlp.pipe(texts)]


def bare_encoder(parser: BeneparParser, texts: list[str]) -> Callable[[], None]:
    """The encoder's forward over the same sub-words in the batches that our parser makes."""
    inputs = []
    for unit in batches(to_fields(texts)):
        sentences = list(dict.fromkeys(part.sentence for field in unit for part in segment(field.text)))
        inputs += _encoder_inputs(parser, sentences)
    encoder = parser._model.pretrained_model

    @torch.inference_mode()
    def run() -> None:
        for batch in inputs:
            encoder(**batch)

    return run


def _encoder_inputs(parser: BeneparParser, sentences: list[Sentence]) -> list[dict[str, Any]]:
    encoded = parser._encoder.encode([(sentence.words, sentence.space_after) for sentence in sentences])
    found = []
    for numbers in _batches([one.cost for one in encoded], _BATCH_POSITIONS):
        batch = parser._encoder.collate([encoded[number] for number in numbers])
        found.append({name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch})
    return found


def to_fields(texts: list[str]) -> list[Field]:
    """One field a document."""
    return [Field(str(i), "text", text) for i, text in enumerate(texts)]


def trees_that_differ(docs: list[Any], parsed: list[Parsed]) -> int:
    """Documents whose constituents are not the same."""
    ours = [row for part in parsed for row in part.table["constituents"].to_pylist()]
    differing = 0
    for doc, row in zip(docs, ours, strict=True):
        data = doc._._constituent_data
        theirs = {
            (int(start), int(end), "::".join(data.label_vocab[label]))
            for start, end, label in zip(data.starts, data.ends, data.labels, strict=True)
            if data.label_vocab[label]
        }
        differing += theirs != {(c["start_word"], c["end_word"], c["label"]) for c in row}
    return differing


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def case(name: str, model: Path, texts: list[str], threads: int, repeats: int) -> list[Row]:
    """One model: rounds of benepar, our workers, one worker, the bare encoder, in turns."""
    fields = to_fields(texts)
    num_sentences = sum(len(segment(text)) for text in texts)
    theirs, parser = benepar_pipeline(model), BeneparParser(load_model(model))
    encoder = bare_encoder(parser, texts)
    times: dict[str, list[float]] = {key: [] for key in ("benepar", "ours", "one", "encoder")}
    results: dict[str, Any] = {}

    def ours() -> None:
        results["ours"] = list(pool.map(batches(fields)))

    with ParserPool(str(model), threads) as pool:
        for measured in range(repeats + 1):
            torch.set_num_threads(threads)
            round_times = {"benepar": seconds(lambda: results.update(docs=theirs(texts))), "ours": seconds(ours)}
            torch.set_num_threads(1)
            round_times["one"] = seconds(lambda: [parse_fields(unit, parser) for unit in batches(fields)])
            round_times["encoder"] = seconds(encoder)
            for key, value in round_times.items():
                times[key] += [value] if measured else []

    def rate(key: str) -> float:
        return num_sentences / statistics.median(times[key])

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    return [
        Row(f"{name}: benepar's spaCy pipeline, {threads} threads", rate("benepar"), "sentences/s"),
        Row(f"{name}: ours, {threads} workers", rate("ours"), "sentences/s"),
        bounded(f"{name}: ours / benepar's pipeline, sentences/s", ratio("benepar", "ours"), ">=", AT_LEAST[name]),
        bounded(
            f"{name}: one worker's time / the bare encoder's on one core",
            ratio("one", "encoder"),
            "<=",
            ABOVE_ENCODER if name == "minilm" else None,
        ),
        bounded(
            f"{name}: documents whose trees differ", trees_that_differ(results["docs"], results["ours"]), "<=", 1, ""
        ),
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(AT_LEAST), default=list(AT_LEAST))
    parser.add_argument("--documents", type=int, default=400)
    chosen = parser.parse_args()
    pin_threads(chosen.threads)
    texts = documents(chosen.documents)
    rows = [machine_row(chosen.threads), Row("documents", float(len(texts)))]
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.cases:
            model = BUNDLED if name == "bundled" else minilm_size(Path(folder) / "minilm")
            rows += case(name, model, texts, chosen.threads, chosen.repeats)
    report("Parse", rows, chosen.json)


if __name__ == "__main__":
    main()
