"""``mta-ds parse`` as a user meets it: options that would do nothing are mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mta_ds.cli import main
from mta_ds.spans.parse import ParseConfig, parse


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mta-ds", "parse", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def config(tmp_path: Path) -> ParseConfig:
    """A store whose second part of two is missing."""
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"id": str(i), "text": f"It is {i}."}) + "\n" for i in range(4)))
    config = ParseConfig(inputs=(str(source),), output=tmp_path / "s", parser="none", num_shards=2)
    assert parse(config, 0) is None
    return config


@pytest.mark.parametrize("option", [["--num-shards", 2], ["--parser", "none"], ["--shard-index", 0], ["--workers", 1]])
@pytest.mark.parametrize("of", ["--merge", "--status"])
def test_neither_merge_nor_status_parses(config, monkeypatch, capfd, of, option) -> None:
    assert run(monkeypatch, of, "--output", config.output, *option) == 2
    assert f"mta-ds parse {of}: {option[0]} would do nothing there; leave it out" in capfd.readouterr().err


@pytest.mark.parametrize("option", [["--input", "a"], ["--max-reject-share", 0.5], ["--report", "page"], ["--merge"]])
def test_status_says_what_is_there_and_no_more(config, monkeypatch, capfd, option) -> None:
    assert run(monkeypatch, "--status", "--output", config.output, *option) == 2
    assert f"{option[0]} would do nothing there" in capfd.readouterr().err
    assert run(monkeypatch, "--status", "--output", config.output) == 0
    assert "1 of 2 parts are missing: 1" in capfd.readouterr().out


def test_merge_takes_what_a_merge_needs(config, monkeypatch, capfd, tmp_path) -> None:
    arguments = ["--merge", "--output", config.output]
    assert run(monkeypatch, *arguments, "--input", config.inputs[0]) == 1
    assert "1 of 2 parts are missing: 1; nothing to merge yet" in capfd.readouterr().err
    parse(config, 1)
    (config.output / "manifest.json").unlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    page = tmp_path / "page.html"
    arguments = ["--merge", "--output=~/s", "--max-reject-share", 0.5, "--report", page]
    assert run(monkeypatch, *arguments) == 0
    assert "span store complete: 4 records" in capfd.readouterr().out and page.is_file()
