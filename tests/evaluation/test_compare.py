from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mta_ds.errors import UserError
from mta_ds.evaluation.compare import differences, run_names, write_comparison

HOSTILE = "$\\frac{1}{2$ </svg><script>alert(1)</script>"


def write_run(folder: Path, loss: float, *, kl: float | None = None, rouge: float | None = None, **config) -> Path:
    folder.mkdir(parents=True)
    rows = [{"step": 0, "validation/loss": 5.0, "validation/kl": 4.0}]
    rows += [{"step": s, "loss": loss / s, "base": loss / s, "lr": 1e-4, "grad_norm": 1.0} for s in range(1, 6)]
    if kl is not None:
        rows.append({"step": 5, "validation/loss": 3.0, "validation/kl": kl})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump({"run_dir": str(folder)} | config))
    (folder / "environment.json").write_text(json.dumps({"world_size": 2, "training_hash": folder.name}))
    (folder / "perf.jsonl").write_text(json.dumps({"step": 1, "seconds": 2.0, "tokens_per_second": 100 * loss}))
    if rouge is not None:
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "after.json").write_text(json.dumps({"loss": 2.0, "rouge_l": {"mean": rouge}}))
    return folder


def cells(page: str, row: str) -> list[str]:
    """The texts of a table's row."""
    line = page[page.index(f'<th scope="row">{row}<') :]
    line = line[: line.index("</tr>")]
    return [cell.partition("</td>")[0] for cell in line.split("<td class=")[1:]]


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", 4.0, kl=2.0, rouge=10.0, mta=None, train={"lr": 1e-4, "seed": 0})
    b = write_run(tmp_path / "b", 3.0, kl=1.0, rouge=20.5, mta={"lambda_dsa": 2.0}, train={"lr": 5e-5, "seed": 0})
    page = write_comparison([a, b, a], tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert "<h1>2 runs compared</h1>" in page
    assert cells(page, "Held-out KL to the teacher") == ['"cell">2.0000', '"cell good strong">1.0000']
    assert cells(page, "ROUGE-L") == ['"cell">10.00', '"cell good strong">20.50']
    assert cells(page, "Training loss") == ['"cell">1.8267', '"cell">1.3700']
    assert cells(page, "tokens per second, all ranks (median)") == ['"cell">400', '"cell">300']
    assert cells(page, "train.lr") == ['"cell">0.0001', '"cell">5e-05']
    assert cells(page, "mta") == ['"cell">–', '"cell">set']
    for same in ("run_dir", "train.seed", "mta.lambda_dsa", "world_size", "training_hash"):
        assert f">{same}<" not in page
    for title in ("Training loss", "Base loss", "Held-out loss", "Held-out KL", "Learning rate", "Gradient norm"):
        assert f"<b>{title}</b>" in page
    assert "<b>DSA</b>" not in page


def test_names_that_are_alike_are_told_apart() -> None:
    folders = [Path(name) for name in ("/x/a/run", "/x/b/run", "/y/b/run", "/x/other")]
    assert run_names(folders) == ["a/run", "x/b/run", "y/b/run", "other"]


def test_what_differs_by_dotted_key() -> None:
    rows = differences([{"loss": {"method": "kd"}}, {"loss": {"method": "gkd", "beta": 0.5}}, {}])
    assert [(row.name, row.cells) for row in rows] == [
        ("loss.method", ["kd", "gkd", "–"]),
        ("loss.beta", ["–", "0.5", "–"]),
    ]
    assert differences([{"train": {"lr": 1.0}}] * 2) == []


def test_a_name_never_becomes_markup_or_mathematics(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "")
    runs = [write_run(tmp_path / name, 4.0, note=HOSTILE), write_run(tmp_path / "_b", 3.0)]
    page = write_comparison(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page and "$\\frac{1}{2$" in page


def test_more_runs_than_colours(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{i}", 4.0 + i) for i in range(10)]
    page = write_comparison(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('stroke-dasharray="5 2"') >= 2 and "None: every setting" in page


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 4.0)
    with pytest.raises(UserError, match="missing: no such run folder"):
        write_comparison([run, tmp_path / "missing"], tmp_path / "page.html")
    with pytest.raises(UserError, match="neither metrics"):
        write_comparison([run, tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
