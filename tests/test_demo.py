"""The demo's configuration for every method, what a demo shares with another, and the pairs that it makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mta_ds import demo
from mta_ds.cli import main
from mta_ds.config import load
from mta_ds.engine import RunConfig
from mta_ds.losses.methods import METHODS


def config_of(run_dir: Path, method: str, *overrides: str) -> RunConfig:
    path = run_dir / "demo.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(demo.render_config(run_dir, 2, method))
    return load(path, RunConfig, overrides)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_demo(tmp_path: Path, method: str) -> None:
    config = config_of(tmp_path, method)
    assert config.loss.method == method and config.mta is not None and config.train.steps == 2
    assert config.parse is not None and config.parse.output == config.data.spans
    assert config.parse.inputs == (*config.data.train, *config.data.validation)
    # as many sequences a step whatever the method
    assert config.train.micro_batch_size * (2 if method == "distillm2" else 1) == 4


def test_every_method_has_its_own_folder() -> None:
    assert [str(demo.default_run_dir(method)) for method in ("kd", "gkd")] == ["runs/demo", "runs/demo-gkd"]


def test_an_unknown_method(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mta-ds", "demo", "--method", "minillm"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--method minillm: choose kd, fdd, distillm, distillm2, gkd" in capsys.readouterr().err


def test_teacher_and_spans_of_another_demo_are_shared(tmp_path: Path) -> None:
    own, other = tmp_path / "demo-fdd", tmp_path / "demo"
    assert config_of(own, "fdd").teacher.path == str(own / "teacher")
    for name in ("teacher", "spans"):
        (other / name).mkdir(parents=True)
    config = config_of(own, "fdd")
    assert (config.teacher.path, config.data.spans) == (str(other / "teacher"), other / "spans")
    pairs = config_of(tmp_path / "demo-distillm2", "distillm2")  # its text is its own
    assert (pairs.teacher.path, pairs.data.spans) == (str(other / "teacher"), tmp_path / "demo-distillm2" / "spans")
    (own / "teacher").mkdir()  # what a run has begun with it keeps
    assert config_of(own, "fdd").teacher.path == str(own / "teacher")


def test_teacher_and_student_answer_the_first_prompts(pair: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "NUM_PAIRS", 6)
    models = [f"teacher.path={pair}/teacher", f"student={{path: {pair}/student}}", "data.template=minillm"]
    limits = ["generation.max_prompt_length=64", "generation.max_length=96", "generation.max_new_tokens=5"]
    config = config_of(tmp_path, "distillm2", *models, *limits)
    demo.make_pairs(config)
    (path,) = config.data.train
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [f"demo-train-{i:03d}" for i in range(6)]
    assert all(row["chosen"] != row["rejected"] for row in rows)
    # once the student has been trained it would answer differently: the pairs stay
    written = Path(path).stat().st_mtime_ns
    demo.make_pairs(config.model_copy(update={"student": config.student.model_copy(update={"path": "/nowhere"})}))
    assert Path(path).stat().st_mtime_ns == written
