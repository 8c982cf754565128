"""The command line as a user meets it: one clear line and the right exit code for every mistake we name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support import run_command, write_config

from mta_ds.cli import main


@pytest.fixture
def mta_ds(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mta-ds", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def own_pair(pair: Path, tmp_path: Path) -> Path:
    """A copy of the pair that a test may damage."""
    return Path(shutil.copytree(pair, tmp_path / "pair"))


def assert_one_line(result: tuple[int, str, str], code: int, *words: str) -> None:
    assert result[0] == code, result
    lines = [line for line in result[2].splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in result[2], result[2]
    for word in words:
        assert word in lines[0], lines[0]


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "pyarrow", "pydantic")
    code = f"import sys, mta_ds, mta_ds.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("moment", ["importing", "encoding"])
def test_a_stop_before_the_first_step(pair: Path, tmp_path: Path, moment: str) -> None:
    """A signal while a training imports, and while it encodes its records."""
    code = """
import importlib.abc, os, signal, sys

def stop():
    os.kill(os.getpid(), signal.SIGUSR1)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "mta_ds.engine.setup" and moment == "importing":
            stop()

moment = sys.argv.pop()
sys.meta_path.insert(0, Finder())
from mta_ds.cli import main
if moment == "encoding":
    from mta_ds.engine import setup
    real = setup.load_data
    setup.load_data = lambda *arguments: (stop(), real(*arguments))[1]
main()
"""
    arguments = ["train", write_config(pair, tmp_path / "run"), moment]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 75 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_check_prints_the_plan(mta_ds, pair: Path, tmp_path: Path) -> None:
    code, out, _ = mta_ds("check", write_config(pair, tmp_path / "run"), "--nproc", 2)
    assert code == 0
    for words in ("student ← teacher", "equal, 400 ids", "24 records", "100.0 % of the records have spans", "2 ranks"):
        assert words in out, out


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"train__lrr": 1}, 2, ["train.lrr: unknown key", "did you mean 'lr'"]),
        ({"mta": {"student_layers": [2, 9]}}, 2, ["student layer 9 does not exist", "1 to 3"]),
        ({"data__train": ["/nowhere/records.jsonl"]}, 1, ["/nowhere/records.jsonl", "no such file"]),
        ({"data__spans": "/nowhere/spans"}, 1, ["/nowhere/spans", "no such span store"]),
        ({"data__spans": None}, 2, ["data.spans", "mta: null"]),
        ({"teacher__path": "/nowhere/model"}, 1, ["/nowhere/model", "no such model folder"]),
        ({"data__template": "chat"}, 1, ["no chat template", "minillm or plain"]),
        ({"loss": {"divergence": "fkl", "alpha": 0.3}}, 2, ["alpha", "fkl"]),
        ({"train__epochs": 1}, 2, ["exactly one of steps and epochs"]),
        ({"data__max_prompt_length": 1, "data__long_prompts": "drop"}, 1, ["no records left"]),
    ],
)
def test_mistakes_in_the_config(mta_ds, pair: Path, tmp_path: Path, changes: dict, code: int, words: list[str]) -> None:
    assert_one_line(mta_ds("check", write_config(pair, tmp_path / "run", **changes)), code, *words)


def test_missing_config(mta_ds) -> None:
    assert_one_line(mta_ds("train", "none.yaml"), 2, "none.yaml", "no such config file")


def test_vocabularies_that_differ(mta_ds, own_pair: Path, tmp_path: Path) -> None:
    file = own_pair / "student" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    path = write_config(own_pair, tmp_path / "run")
    assert_one_line(mta_ds("check", path), 1, "vocabularies differ")
    done = run_command("train", path, "--nproc", 2, check=False)
    assert_one_line((done.returncode, done.stdout, done.stderr), 1, "vocabularies differ")


def test_store_of_other_text(mta_ds, own_pair: Path, tmp_path: Path) -> None:
    file = own_pair / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows[3]["output"] += " And more."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert_one_line(
        mta_ds("check", write_config(own_pair, tmp_path / "run")), 1, rows[3]["id"], "output", "not the text"
    )


def test_store_of_another_parser(mta_ds, own_pair: Path, tmp_path: Path) -> None:
    section = {"inputs": [str(own_pair / "train.jsonl")], "output": str(own_pair / "spans"), "parser": "none"}
    path = write_config(own_pair, tmp_path / "run", parse=section)
    assert_one_line(mta_ds("check", path), 1, "bundled", "none", "another parser")
    assert_one_line(mta_ds("parse", path), 1, "already holds a store")


def test_damaged_and_missing_parts(mta_ds, own_pair: Path, tmp_path: Path) -> None:
    part = next((own_pair / "spans").glob("part-*.parquet"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    for cache in (own_pair / "spans").glob("cache-*"):
        shutil.rmtree(cache)
    assert_one_line(mta_ds("check", write_config(own_pair, tmp_path / "run")), 1, part.name, "damaged")
    part.unlink()
    assert_one_line(mta_ds("check", write_config(own_pair, tmp_path / "run")), 1, part.name, "missing")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{bad", [":2", "bad JSON"]),
        ('{"id": "x", "prompt": "", "response": ""}', [":2", "no text"]),
        ('{"id": "FIRST", "text": "Something else."}', [":2", "duplicate id"]),
        ("[1, 2]", [":2", "not a JSON object"]),
    ],
)
def test_bad_rows_fail_the_parse_and_are_listed(
    mta_ds, pair: Path, tmp_path: Path, line: str, words: list[str]
) -> None:
    file = tmp_path / "records.jsonl"
    good = (pair / "train.jsonl").read_text(encoding="utf-8").splitlines()
    line = line.replace("FIRST", json.loads(good[0])["id"])
    file.write_text("\n".join([good[0], line, good[1]]) + "\n", encoding="utf-8")
    arguments = ["parse", "--input", file, "--output", tmp_path / "spans", "--parser", "none"]
    assert_one_line(mta_ds(*arguments), 1, *words)
    rejected = [json.loads(row) for f in (tmp_path / "spans").glob("rejects*") for row in f.read_text().splitlines()]
    assert len(rejected) == 1 and rejected[0]["reason"]
    code, out, _ = mta_ds(*arguments, "--max-reject-share", 0.5)
    assert code == 0 and "2 records" in out and "1 rejects" in out


def test_parse_shard_by_shard_as_a_job_array(mta_ds, pair: Path, tmp_path: Path) -> None:
    arguments = ["parse", "--input", pair / "train.jsonl", "--output", tmp_path / "spans", "--parser", "none"]
    arguments += ["--num-shards", 3]
    assert "others are missing" in mta_ds(*arguments, "--shard-index", 2)[1]
    assert "others are missing" in mta_ds(*arguments, "--shard-index", 0)[1]
    assert "24 records" in mta_ds(*arguments, "--shard-index", 1)[1]
    assert_one_line(mta_ds(*arguments, "--shard-index", 3), 2, "--shard-index 3", "0 to 2")
    arguments[-1] = 2
    assert_one_line(mta_ds(*arguments), 1, "3 shards")


def test_parse_without_inputs(mta_ds, tmp_path: Path) -> None:
    assert_one_line(mta_ds("parse", "--output", tmp_path / "spans"), 2, "inputs")


def test_weights_that_do_not_match_stop_the_training(mta_ds, own_pair: Path, tmp_path: Path) -> None:
    file = own_pair / "teacher" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    path = write_config(own_pair, tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "mta_ds", "train", str(path), "--nproc", "1"], capture_output=True, text=True
    )
    assert_one_line((done.returncode, done.stdout, done.stderr), 1, "1 missing", "layers.2.mlp.up_proj.weight")


def test_overrides_reach_the_run(mta_ds, pair: Path, tmp_path: Path) -> None:
    path = write_config(pair, tmp_path / "run")
    assert "7, 1.17 epochs" in mta_ds("check", path, "train.steps=7")[1]
    assert_one_line(mta_ds("check", path, "train.steps"), 2, "section.key=value")
    assert yaml.safe_load(path.read_text())["train"]["steps"] == 3


def test_evaluate_and_report(mta_ds, pair: Path, tmp_path: Path) -> None:
    path = write_config(
        pair,
        tmp_path / "run",
        evaluation={"do_sample": False, "max_prompt_length": 64, "max_length": 72, "max_records": 2},
    )
    assert_one_line(mta_ds("evaluate", path), 1, "no model to evaluate")
    code, out, err = mta_ds("evaluate", path, "--student", pair / "student", "--name", "before")
    assert code == 0, err
    result = json.loads(Path(out.strip().splitlines()[-1]).read_text())
    assert result["kl"] > 0 and result["loss"] > 0 and 0 <= result["rouge_l"]["mean"] <= 100
    code, out, _ = mta_ds("report", tmp_path / "run")
    assert code == 0 and "<html" in Path(out.strip()).read_text()
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    runs = [tmp_path / "run", tmp_path / "other"]
    code, out, _ = mta_ds("report", *runs, "--output", tmp_path / "page.html")
    assert code == 0 and "2 runs compared" in Path(out.strip()).read_text()
    assert_one_line(mta_ds("report", *runs, tmp_path / "none"), 1, "none: no such run folder")


def test_parse_says_what_is_missing_and_reports_what_is_there(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"id": str(i), "text": f"It is {i}. We go."}) + "\n" for i in range(8)))
    store = ["--output", tmp_path / "s"]
    given = ["parse", "--input", source, *store, "--num-shards", 2, "--parser", "none"]
    assert "others are missing" in run_command(*given, "--shard-index", 1, "--workers", 1).stdout
    assert "1 of 2 parts are missing: 0" in run_command("parse", "--status", *store).stdout
    refused = run_command(*given, "--merge", check=False)
    assert refused.returncode == 2 and "--merge: --parser would do nothing there; leave it out" in refused.stderr
    failed = run_command("parse", "--input", source, *store, "--merge", check=False)
    assert failed.returncode == 1 and "1 of 2 parts are missing: 0; nothing to merge yet" in failed.stderr
    done = run_command(*given, "--report", tmp_path / "page.html")
    assert "span store complete: 8 records" in done.stdout and (tmp_path / "page.html").is_file()


GENERATION = {"max_length": 400, "max_prompt_length": 300, "max_new_tokens": 4, "num_shards": 2}


def test_generate_teacher_and_student_and_pair_them(mta_ds, pair: Path, tmp_path: Path) -> None:
    path = write_config(pair, tmp_path / "run", generation=GENERATION)
    assert "others are missing" in mta_ds("generate", path, "--shard-index", 1)[1]
    code, out, err = mta_ds("generate", path)
    assert code == 0 and f"{tmp_path}/run/generated/teacher: 24 records, 24 written" in out, err
    heldout = ["--input", pair / "heldout.jsonl", "--output", tmp_path / "heldout", "--num-shards", 1, "--seed", 3]
    assert "5 written" in mta_ds("generate", path, "--model", pair / "student", *heldout)[1]
    paired = [path, "--model", "student", "--pair-with", tmp_path / "run" / "generated" / "teacher"]
    code, out, err = mta_ds("generate", *paired, "generation.temperature=0.8")
    student = tmp_path / "run" / "generated" / "student"
    assert code == 0 and f"{student}/pairs.jsonl: 24 pairs" in out, err
    rows = [json.loads(line) for line in (student / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 24 and sum(row["chosen"] != row["rejected"] for row in rows) > 20
    manifest = json.loads((student / "manifest.json").read_text())
    assert manifest["settings"]["temperature"] == 0.8 and manifest["model"]["path"] == str(pair / "student")
    # SeqKD: the folder is training data as it stands
    assert "24 records" in mta_ds("check", path, f"data.train=[{student}]", "mta=null")[1]


def test_mistakes_of_generate(mta_ds, pair: Path, tmp_path: Path) -> None:
    path = write_config(pair, tmp_path / "run", generation=GENERATION | {"num_shards": 1})
    assert_one_line(mta_ds("generate", path, "--model", "/nowhere/model"), 1, "/nowhere/model", "no such model folder")
    assert_one_line(mta_ds("generate", path, "--shard-index", 1), 2, "--shard-index 1", "0 to 0")
    assert_one_line(mta_ds("generate", path, "generation.sede=1"), 2, "generation.sede", "did you mean 'seed'")
    assert_one_line(mta_ds("generate", path, "data.train=[]"), 2, "no prompts", "data.train")
    assert_one_line(mta_ds("generate", path, "--input", "/nowhere/a.jsonl"), 1, "/nowhere/a.jsonl", "no such file")
    assert_one_line(mta_ds("generate", path, "generation.max_length=300"), 2, "max_prompt_length (300)", "smaller")
    assert_one_line(mta_ds("generate", path, "data.template=chat"), 1, "no chat template", "minillm or plain")
    shutil.rmtree(tmp_path / "run" / "generated")
    assert mta_ds("generate", path)[0] == 0
    assert_one_line(mta_ds("generate", path, "--seed", 1), 1, "generated/teacher", "texts of seed 0 (this run has 1)")
    missing = ["--pair-with", pair / "heldout.jsonl"]
    assert_one_line(mta_ds("generate", path, *missing), 1, "heldout.jsonl", "no record in common")
