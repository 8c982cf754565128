"""Pairs made anew at each epoch: stopped between parts, resumed on other ranks, as long as what is trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import assert_same_run, run_command, train, write_config

from mta_ds.config import dump, load, validate
from mta_ds.engine import RunConfig
from mta_ds.engine.regenerate import EpochPairs, Watch
from mta_ds.errors import UserError
from mta_ds.models import load_pretrained, load_tokenizer

REJECTED = {
    "loss": {"method": "distillm2", "regenerate": "rejected"},
    "generation": {"max_new_tokens": 8, "num_shards": 3},
}


def epoch_pairs(pair: Path, run_dir: Path, **changes: object) -> EpochPairs:
    config = load(write_config(pair, run_dir, **(REJECTED | changes)), RunConfig)
    return EpochPairs(config, load_tokenizer(pair / "student"), load_pretrained(pair / "student", "float32"), None, {})


def watch(*answers: bool) -> Watch:
    """Stops where ``answers`` says so, and nowhere after the last."""
    coming = iter(answers)
    return Watch(lambda: next(coming, False), lambda _: None)


def epoch_folder(run_dir: Path, epoch: int = 0) -> Path:
    """Where the only text of an epoch lies."""
    (folder,) = (run_dir / "epochs").glob(f"*/epoch-{epoch:04d}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stop_between_parts_loses_none(pair: Path, tmp_path: Path) -> None:
    whole, stopped = (epoch_pairs(pair, tmp_path / name) for name in ("whole", "stopped"))
    expected = whole.dataset(0, watch(), begins=True)
    folder = stopped.folder(0)
    times: dict[Path, int] = {}
    for complete in (1, 2, 3, 4, 5, 6):  # a start makes one part, the answers' first
        assert stopped.dataset(0, watch(True), begins=True) is None
        parts = sorted([*folder.glob("rejected/part-*.jsonl"), *folder.glob("spans/part-*.parquet")])
        assert len(parts) == complete and (folder / "pairs.jsonl").is_file() == (complete > 3)
        assert all(times.get(part, part.stat().st_mtime_ns) == part.stat().st_mtime_ns for part in parts)
        times = {part: part.stat().st_mtime_ns for part in parts}
    found = stopped.dataset(0, watch(True), begins=True)  # nothing is left to make, so nothing is asked
    assert found is not None and expected is not None
    assert found.summary == expected.summary and found.summary.with_spans > 12
    assert contents(folder / "rejected") == contents(whole.folder(0) / "rejected")
    assert (folder / "pairs.jsonl").read_bytes() == (whole.folder(0) / "pairs.jsonl").read_bytes()


def test_parts_do_not_depend_on_the_ranks(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two ranks in turn, as if alone: between them they make every part once."""
    made = []
    for rank in range(2):
        pairs = epoch_pairs(pair, tmp_path / "two")
        monkeypatch.setattr("mta_ds.engine.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("mta_ds.engine.distributed.world_size", lambda: 2)
        monkeypatch.setattr("mta_ds.engine.distributed.from_rank_zero", lambda look: [0, 1, 2])
        monkeypatch.setattr("mta_ds.engine.distributed.on_rank_zero_first", lambda work: work())
        folder = pairs.folder(0)
        before = set(folder.glob("rejected/part-*.jsonl"))
        assert pairs._answer(folder, 0, watch())
        made.append({path.name for path in set(folder.glob("rejected/part-*.jsonl")) - before})
    assert made == [{"part-00000-of-00003.jsonl", "part-00002-of-00003.jsonl"}, {"part-00001-of-00003.jsonl"}]


def test_more_parts_than_records(pair: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join((pair / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:2]))
    dataset = epoch_pairs(pair, tmp_path, data__train=[str(few)]).dataset(0, watch(), begins=True)
    assert dataset is not None and dataset.summary.records == 2


def test_pairs_that_are_gone_in_the_middle_of_an_epoch(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pairs\.jsonl: is gone, and the models have moved on"):
        epoch_pairs(pair, tmp_path).dataset(0, watch(), begins=False)


def test_a_run_stopped_while_it_writes_goes_on_with_other_ranks(pair: Path, tmp_path: Path) -> None:
    changes = REJECTED | {"train__steps": 7}  # the second epoch begins with the seventh step
    undisturbed = train(pair, tmp_path / "undisturbed", 1, **changes)
    path = write_config(pair, tmp_path / "stopped", **changes)
    two = ("train.micro_batch_size=2", "--nproc", 2)
    first = run_command("train", path, "train.max_minutes=1e-9", *two, check=False)
    assert first.returncode == 75, first.stderr[-2000:]
    answers = epoch_folder(tmp_path / "stopped") / "rejected"
    assert len(list(answers.glob("part-*.jsonl"))) == 2 and not (answers / "manifest.json").exists()
    beat = json.loads((tmp_path / "stopped" / "heartbeat" / "rank-00001.json").read_text())
    assert (beat["step"], beat["phase"]) == (0, "stopped")
    assert_same_run(train(pair, tmp_path / "stopped", 1, **changes), undisturbed)
    # what the second epoch was written with is a checkpoint, though none was asked for
    assert [path.name for path in sorted((tmp_path / "stopped" / "checkpoints").iterdir())] == [
        "step-00000006",
        "step-00000007",
    ]


def test_text_of_another_run_of_the_folder_is_not_taken(pair: Path, tmp_path: Path) -> None:
    """Before its first checkpoint nothing else says what a run is: a stopped one's text may be of another model."""
    first = epoch_pairs(pair, tmp_path)
    dataset = first.dataset(0, watch(), begins=True)
    assert dataset is not None
    for other in (
        epoch_pairs(pair, tmp_path, generation={"max_new_tokens": 7, "num_shards": 3}),
        replace(first, inputs={"initial weights or configuration of the student": "another"}),
    ):
        assert other.folder(0) != first.folder(0) and other.dataset(0, watch(True), begins=True) is None
    again = epoch_pairs(pair, tmp_path).dataset(0, watch(), begins=False)
    assert again is not None and again.key == dataset.key


def test_responses_are_as_long_as_what_is_trained_on(pair: Path, tmp_path: Path) -> None:
    plain = load(write_config(pair, tmp_path), RunConfig)
    assert (plain.generation.max_prompt_length, plain.generation.max_length) == (256, 512)
    config = load(write_config(pair, tmp_path, **REJECTED), RunConfig)
    assert (config.generation.max_prompt_length, config.generation.max_length) == (64, 96)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml", RunConfig) == config
    del (values := config.model_dump())["generation"]
    assert validate(values, RunConfig, "x").generation.max_length == 96


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"max_prompt_length": 63}, r"generation\.max_prompt_length: 63, but .* behind 64 tokens"),
        ({"max_length": 97}, r"generation\.max_length: 97, but training cuts at 96"),
        ({"inputs": ["others.jsonl"]}, r"generation\.inputs: .* leave it out"),
        ({"model": "student"}, r"generation\.model: .* leave it out"),
        ({"output": "elsewhere"}, r"generation\.output: .* leave it out"),
    ],
)
def test_settings_that_would_be_ignored_or_train_on_other_text(
    pair: Path, tmp_path: Path, generation: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words) as raised:
        load(write_config(pair, tmp_path, **(REJECTED | {"generation": generation})), RunConfig)
    assert "\n" not in str(raised.value)
    alone = {"max_length": 600} | generation | {"max_prompt_length": 63}
    load(write_config(pair, tmp_path, generation=alone), RunConfig)  # as a stage of its own it is fine
