"""What the stages around training hand on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import write_config

from mta_ds.config import load
from mta_ds.engine import RunConfig, evaluate_run, generate_run, stages


@pytest.mark.parametrize(("model", "expected"), [("teacher", "4bit"), ("student", None)])
def test_a_quantised_teacher_answers_quantised(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, expected: str | None
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(stages, "write_responses", lambda *_, **options: seen.update(options))
    monkeypatch.setattr(stages, "evaluate", lambda *_, **options: seen.update(scored=options["quantization"]))
    teacher = {"path": str(pair / "teacher"), "quantization": "4bit"}
    config = load(write_config(pair, tmp_path, teacher=teacher, generation={"model": model}), RunConfig)
    generate_run(config)
    evaluate_run(config, pair / "student", "before")
    assert seen["quantization"] == expected and seen["scored"] == "4bit"
