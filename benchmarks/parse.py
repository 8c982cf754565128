"""The offline parse against benepar's own spaCy pipeline, and against the bare encoder: same model, same sentences.

    python benchmarks/parse.py                                  # some ten minutes on two cores
    python benchmarks/parse.py --cases bundled --json rows.json

Documents are about four sentences of the demo's records. benepar's pipeline parses one document at a time on all
threads, from texts to its own objects; ours is the whole stage, from a file of records to a merged store on disk, with
a worker process a core. Neither has the start of processes and the loading of models in it. The bare encoder runs over
the same sub-words in the same batches on one core in fp32, and is compared with what one of our workers does to its
units in fp32 alone. Our stage runs as it does by default (bf16 first where the CPU has it) and in fp32 alone.
The MiniLM-size model is the bundled one with three layers more, of random weights that change its states little: so
decisions are as close as a trained parser's are, and not as close as those of noise.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import torch
from benepar.nkutil import HParams
from common import Row, bounded, has_fast_bfloat16, machine_row, options, pin_threads, report

from mta_ds.spans import parse as stage
from mta_ds.spans.benepar_model import build_chart_parser, lent_tokenizer_method, load_model
from mta_ds.spans.benepar_parser import BeneparParser
from mta_ds.spans.parser import BUNDLED, FP32, Sentence, load_parser
from mta_ds.spans.pool import ParserPool, UnitParser, lean_memory
from mta_ds.spans.rows import Field, batches
from mta_ds.spans.segment import segment

DEMO = BUNDLED.parent / "demo"
SENTENCES_A_DOCUMENT = 4
AT_LEAST = {"bundled": 5.0, "minilm": 4.0}  # times benepar's sentences/s
ABOVE_ENCODER = 1.35  # of the MiniLM-size model
DEFAULT = "default"


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
    """The bundled model with six encoder layers instead of three; the others change states little."""
    shutil.copytree(BUNDLED, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 6
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    parser = build_chart_parser(
        {**config["benepar"], "hparams": HParams(**config["benepar"]["hparams"]), "pretrained_model_path": str(folder)}
    )
    parser.load_state_dict(torch.load(folder / "benepar_model.bin", weights_only=True), strict=False)
    layers = parser.pretrained_model.encoder.layer
    last = layers[2].output.LayerNorm
    for layer in layers[3:]:
        for half in (layer.attention.output, layer.output):
            half.dense.weight.data.mul_(0.1)
            # the norm of what is normalised already, up to each token's own mean and deviation
            half.LayerNorm.weight.data.fill_(float((last.weight.square().mean() + last.bias.var()).sqrt()))
            half.LayerNorm.bias.data.fill_(float(last.bias.mean()))
    torch.save(parser.state_dict(), folder / "benepar_model.bin")
    return folder


def benepar_pipeline(model: Path) -> Callable[[list[str]], list[Any]]:
    """benepar's own spaCy pipeline over documents, one at a time as it is."""
    import spacy
    from benepar.integrations.spacy_plugin import BeneparComponent

    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    with lent_tokenizer_method():
        component = BeneparComponent(str(model))
    return lambda texts: [component(doc) for doc in nlp.pipe(texts)]


def bare_encoder(parser: BeneparParser, texts: list[str]) -> Callable[[], None]:
    """The encoder's forward over the same sub-words in the batches that our parser makes."""
    inputs = []
    for unit in batches(to_fields(texts)):
        sentences = list(dict.fromkeys(part.sentence for field in unit for part in segment(field.text)))
        inputs += _encoder_inputs(parser, sentences)
    encoder = parser.model.pretrained_model

    @torch.inference_mode()
    def run() -> None:
        for batch in inputs:
            encoder(**batch)

    return run


def _encoder_inputs(parser: BeneparParser, sentences: list[Sentence]) -> list[dict[str, Any]]:
    encoded = parser.encoder.encode([(sentence.words, sentence.space_after) for sentence in sentences])
    found = []
    for numbers in parser.batches(encoded):
        batch = parser.encoder.collate([encoded[number] for number in numbers])
        found.append({name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch})
    return found


def to_fields(texts: list[str]) -> list[Field]:
    """One field a document."""
    return [Field(str(i), "text", text) for i, text in enumerate(texts)]


class Stage:
    """``mta-ds parse`` over one file, with a parser and workers that are there already."""

    def __init__(self, spec: str, pool: ParserPool, texts: list[str], folder: Path) -> None:
        self._spec, self._pool, self._parser = spec, pool, load_parser(spec)
        self._folder, self._numbers = folder, count()
        self._source = folder / "records.jsonl"
        rows = (json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
        self._source.write_text("".join(rows), encoding="utf-8")

    def __call__(self) -> Path:
        """Parse into a new store, and merge it; its folder."""
        output = self._folder / str(next(self._numbers))
        with (
            patch.object(stage, "open_pool", lambda *_: nullcontext(self._pool)),
            patch.object(stage, "load_parser", lambda *_: self._parser),
        ):
            stage.parse(stage.ParseConfig(inputs=(str(self._source),), output=output, parser=self._spec))
        return output


def constituents(store: Path) -> list[set[tuple[int, int, str]]]:
    """(start word, end word, label) of each document's."""
    rows = pq.read_table(store / "part-00000-of-00001.parquet")["constituents"].to_pylist()
    return [{(c["start_word"], c["end_word"], c["label"]) for c in row} for row in rows]


def benepars_constituents(doc: Any) -> set[tuple[int, int, str]]:
    """The same of a document that benepar's component has parsed."""
    data = doc._._constituent_data
    found = zip(data.starts, data.ends, data.labels, strict=True)
    return {(int(a), int(b), "::".join(data.label_vocab[label])) for a, b, label in found if data.label_vocab[label]}


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def case(name: str, model: Path, texts: list[str], threads: int, repeats: int) -> list[Row]:
    """One model: rounds of benepar, our stage, one worker's part of it and the bare encoder, in turns."""
    fields, results = to_fields(texts), dict[str, Any]()
    theirs = benepar_pipeline(model)
    with lean_memory():  # as in a worker
        parser = BeneparParser(load_model(model), in_fp32=True)
    parse_unit = UnitParser(parser)
    encoder = bare_encoder(parser, texts)
    with ExitStack() as stack:
        stages = {}
        for dtype, spec in {DEFAULT: str(model), "fp32 alone": f"{FP32}{model}"}.items():
            pool = stack.enter_context(ParserPool(spec, threads))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stages[dtype] = Stage(spec, pool, texts, folder)
        work: dict[str, tuple[int, Callable[[], object]]] = {
            "benepar": (threads, lambda: theirs(texts)),
            **{dtype: (1, whole) for dtype, whole in stages.items()},
            "one": (1, lambda: [parse_unit(unit) for unit in batches(fields)]),
            "encoder": (1, encoder),
        }
        times: dict[str, list[float]] = {key: [] for key in work}
        for measured in range(repeats + 1):
            for key, (num_threads, run) in work.items():
                torch.set_num_threads(num_threads)
                taken = seconds(lambda key=key, run=run: results.update({key: run()}))
                times[key] += [taken] if measured else []
        results.update({dtype: constituents(results[dtype]) for dtype in stages})
    return case_rows(name, times, results, sum(len(segment(text)) for text in texts), threads)


def case_rows(
    name: str, times: dict[str, list[float]], results: dict[str, Any], num_sentences: int, threads: int
) -> list[Row]:
    """The figures; the promise over benepar's pipeline is made where the CPU has bf16."""

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    def rate(key: str, who: str) -> Row:
        return Row(f"{name}: {who}", num_sentences / statistics.median(times[key]), "sentences/s")

    rows = [rate("benepar", f"benepar's spaCy pipeline, {threads} threads")]
    for dtype in (DEFAULT, "fp32 alone"):
        ours = results[dtype]
        differ = sum(a != benepars_constituents(doc) for a, doc in zip(ours, results["benepar"], strict=True))
        least = AT_LEAST[name] if dtype == DEFAULT and has_fast_bfloat16() else None
        rows += [
            rate(dtype, f"mta-ds parse, {threads} workers, {dtype}"),
            bounded(f"{name}: mta-ds parse / benepar's pipeline, {dtype}", ratio("benepar", dtype), ">=", least),
            bounded(
                f"{name}: documents whose trees differ from benepar's, of {len(ours)}, {dtype}", differ, "<=", 1, ""
            ),
        ]
    above = ABOVE_ENCODER if name == "minilm" else None
    label = f"{name}: one worker's time / the bare encoder's, one core, fp32"
    return [*rows, bounded(label, ratio("one", "encoder"), "<=", above)]


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
