from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mta_ds.data import Units
from mta_ds.errors import UserError
from mta_ds.evaluation.report import performance, scores, summary, write_report
from mta_ds.evaluation.tree import ParsedExample

HOSTILE = "</p></svg><script>alert(1)</script>\x00\x1b\u202e{{ 7*7 }} & \"quoted\" 'too' 😀"


def evaluation(loss: float, kl: float | None, rouge: float, std: float | None = None) -> dict:
    return {"loss": loss, "kl": kl, "rouge_l": {"mean": rouge, "std": std}, "settings": {"dtype": "float32"}}


def write_run(run_dir: Path, texts: dict[str, str]) -> None:
    (run_dir / "evaluation").mkdir(parents=True)
    rows = [{"step": s, "samples": s, "loss": 5.0 / s, "base": 4.0 / s, "dsa/2": 0.1, "hid/2": 0.2} for s in (1, 2, 3)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    perf = [{"step": s, "seconds": 2.0, "tokens_per_second": 500.0, "peak_memory_bytes": 2**30} for s in (1, 2, 3)]
    (run_dir / "perf.jsonl").write_text("".join(json.dumps(row) + "\n" for row in perf))
    (run_dir / "config.yaml").write_text("seed: 0  # <not a tag>\n")
    (run_dir / "environment.json").write_text('{"world_size": 2}')
    for name, scored in (("before", evaluation(5.0, 4.0, 5.0)), ("after", evaluation(2.5, 1.0, 20.0))):
        row = {
            "record_id": "r1",
            "pass": "greedy",
            "fields": {"instruction": texts["instruction"]},
            "text": texts[name],
        }
        row |= {"rouge_l": 12.0, "references": [texts["reference"]]}
        (run_dir / "evaluation" / f"{name}.generations.jsonl").write_text(json.dumps(row) + "\n")
        scored["generations"] = f"{name}.generations.jsonl"
        (run_dir / "evaluation" / f"{name}.json").write_text(json.dumps(scored))


class Page(HTMLParser):
    """Collects tags and checks that each closes what it should."""

    VOID = frozenset({"meta", "br", "rect", "use", "path"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not [name for name, _ in attributes if name in {"src", "onload", "onclick"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


TEXTS = {"instruction": "Say hello.", "before": "the the", "after": "Hello!", "reference": "Hello there."}


def test_a_whole_run_on_one_page(tmp_path):
    write_run(tmp_path / "run-7", TEXTS)
    page = read(write_report(tmp_path / "run-7"))
    assert "3 optimizer steps on 2 ranks: held-out KL to the teacher fell from 4.000 to 1.000" in page.words
    assert "ROUGE-L rose from 5.00 to 20.00" in page.words
    for text in (*TEXTS.values(), "run-7", "−75 %", "Training loss", "500", "1.00 GiB", "seed: 0", "world_size"):
        assert text in page.words
    assert page.tags.count("svg") == 3
    assert "script" not in page.tags and "link" not in page.tags


def test_text_of_records_never_becomes_markup(tmp_path):
    write_run(tmp_path / "run", dict.fromkeys(TEXTS, HOSTILE))
    units = Units(
        text_hash=b"0" * 16,
        num_chars=len(HOSTILE),
        sentences=np.array([0, 1], dtype=np.int32),
        words=np.array([[0, len(HOSTILE)]], dtype=np.int32),
        tags=[HOSTILE],
        constituents=np.array([[0, 1, 1]], dtype=np.int32),
        labels=[HOSTILE],
    )
    whole = np.array([[0, len(HOSTILE)]])
    page = read(write_report(tmp_path / "run", ParsedExample(HOSTILE, units, whole, whole)))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.words
    assert "{{ 7*7 }}" in page.words
    assert "\x00" not in page.words and "\x1b" not in page.words


def test_a_lone_surrogate_does_not_stop_the_report(tmp_path):
    write_run(tmp_path / "run", TEXTS | {"after": "half a pair: \ud83d"})
    assert "half a pair: ?" in read(write_report(tmp_path / "run")).words


def test_a_run_without_evaluations_leaves_their_sections_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n{"step": 2, "loss": 3.0}\n{"step": 3, "lo')
    page = read(write_report(tmp_path))
    assert "2 optimizer steps: the training loss went from 4.000 to 3.000." in page.words
    assert "Before and after" not in page.words and "Texts" not in page.words


def test_an_evaluation_without_training_or_texts(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "after.json").write_text(json.dumps(evaluation(2.0, None, 20.0, 0.5)))
    page = read(write_report(tmp_path))
    assert "20.00 ± 0.50" in page.words
    assert "Held-out KL" not in page.words


def test_not_a_run_folder(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "missing")
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        write_report(tmp_path)


def test_table_tells_better_from_worse():
    table = scores({"before": evaluation(2.0, 1.0, 20.0), "after": evaluation(2.5, 0.5, 10.0), "teacher": {}})
    assert [(row.name, row.improved) for row in table] == [
        ("Held-out KL to the teacher", True),
        ("Held-out loss", False),
        ("ROUGE-L", False),
    ]
    assert table[1].change == "+0.500" and table[1].percent == "+25 %"
    told = summary([], {"before": evaluation(2, 1, 3), "after": evaluation(2, 1, 3), "teacher": {}}, {})
    assert told == (
        "Evaluation only: held-out KL to the teacher stayed at 1.000, held-out loss stayed at 2.000 and "
        "ROUGE-L stayed at 3.00."
    )


def test_performance_of_a_long_run():
    told = dict(performance([{"seconds": 2.0, "tokens_per_second": 1e6, "peak_memory_bytes": 3 * 2**29}] * 4000))
    assert told["time in steps"] == "2 h 13 min"
    assert told["peak memory of the first rank"] == "1.50 GiB"
    assert told["tokens per second, all ranks (median)"] == "1,000,000"
