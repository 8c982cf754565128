"""Configuration: overrides, round trip, and the one line that a mistake gets."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from mta_ds.config import Section, dump, load
from mta_ds.errors import UsageError


class Inner(Section):
    lambda_dsa: float = 2.0
    layers: tuple[int, ...] | None = None


class Outer(Section):
    name: str
    mta: Inner | None = Inner()
    targets: tuple[str, ...] | Literal["all"] = "all"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_are_yaml_and_reach_into_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nmta: {lambda_dsa: 3}\n")
    config = load(path, Outer, ["mta.layers=[1, 2]", "name=b"])
    assert config == Outer(name="b", mta=Inner(lambda_dsa=3, layers=(1, 2)))
    assert load(path, Outer, ["mta=null"]).mta is None
    assert load(write(tmp_path, "name: a\nmta: null"), Outer, ["mta.lambda_dsa=1"]).mta == Inner(lambda_dsa=1)


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    config = Outer(name="ü: {x}", mta=Inner(layers=(3,)))
    assert load(write(tmp_path, dump(config)), Outer) == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("name: a\nmta: {lamda_dsa: 1}", [], "mta.lamda_dsa: unknown key; did you mean 'lambda_dsa'?"),
        ("nmae: a", [], r"nmae: unknown key; did you mean 'name'\?"),
        ("name: a\nzzzzz: 1", [], "valid keys: name, mta"),
        ("mta: {}", [], "name: required key is missing"),
        ("name: a\nmta: {lambda_dsa: much}", [], "mta.lambda_dsa: .*got 'much'"),
        ("name: a\ntargets: q", [], "targets: should be a list or 'all', got 'q'$"),
        ("name: a\ntargets: [3]", [], "targets.0: should be a valid string, got 3"),
        ("name: a\nmta: {layers: 3}", [], "mta.layers: should be a list, got 3$"),
        ("name: a\nmta: 3", [], "mta: should be a mapping, got 3$"),
        ("- a", [], "top level must be a mapping"),
        ("a: [", [], "not valid YAML"),
        ("name: a", ["name"], "write it as section.key=value"),
        ("name: a", ["name=[x"], "not valid YAML"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(write(tmp_path, text), Outer, overrides)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such config file"):
        load(tmp_path / "none.yaml", Outer)


def test_a_file_of_settings_overrides_in_its_place(tmp_path: Path) -> None:
    class Part(Section):
        a: int = 1
        b: int = 2

    class Whole(Section):
        part: Part = Part()

    run, changes = tmp_path / "run.yaml", tmp_path / "changes.yaml"
    run.write_text("part: {a: 5, b: 6}")
    changes.write_text("part: {a: 7}")
    assert load(run, Whole, [f"@{changes}"]).part == Part(a=7, b=6)
    assert load(run, Whole, ["part.a=8", f"@{changes}", "part.b=9"]).part == Part(a=7, b=9)
    with pytest.raises(UsageError, match=r"nowhere\.yaml: no such config file"):
        load(run, Whole, [f"@{tmp_path / 'nowhere.yaml'}"])
