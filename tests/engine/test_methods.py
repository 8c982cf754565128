"""Every base method in real training runs: one rank equals two, a stopped run ends as one that was not, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import assert_same_run, read_metrics, run_command, train, write_config

from mta_ds.config import load
from mta_ds.engine import RunConfig, check
from mta_ds.engine.train import train as train_here
from mta_ds.engine.train import validate_every
from mta_ds.errors import UserError
from mta_ds.losses import DistiLLMConfig, KDConfig

FDD = {"method": "fdd", "divergence": "fkl"}
ROLLOUTS = {"max_new_tokens": 12, "ahead": 1, "batch_size": 3}
# half of the steps fresh, half of them replayed once the buffer is full, which it is after the second rollout
DISTILLM = {"method": "distillm", "initial_phi": 1.0, "schedule": "constant", "buffer_size": 8, "rollouts": ROLLOUTS}
METHODS = {
    "fdd": {"loss": FDD},
    "fdd-normed-alone": {"loss": FDD | {"final_norm": True, "num_layers": 2, "stride": 1}, "mta": None},
    "distillm": {"loss": DISTILLM, "train__steps": 6},
    "gkd": {"loss": {"method": "gkd", "on_policy_share": 1.0, "rollouts": ROLLOUTS | {"ahead": 0}}},
    "gkd-unparsed": {"loss": {"method": "gkd", "on_policy_share": 1.0, "rollouts": ROLLOUTS | {"parser_workers": 0}}},
    "distillm2": {"loss": {"method": "distillm2", "gap_steps": 2}},
    # the second epoch begins with the seventh step
    "distillm2-anew": {
        "loss": {"method": "distillm2", "regenerate": "both"},
        "generation": {"max_length": 80, "max_prompt_length": 64, "max_new_tokens": 12, "num_shards": 2},
        "train__steps": 8,
    },
}


@pytest.fixture(scope="session")
def preferences(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The pair's records, each with another one's response as the rejected half, and their span store."""
    folder = tmp_path_factory.mktemp("preferences")
    rows = [json.loads(line) for line in (pair / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    file = folder / "pairs.jsonl"
    with open(file, "w", encoding="utf-8") as out:
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
            prompt = {key: value for key, value in row.items() if key != "output"}
            out.write(json.dumps(prompt | {"chosen": row["output"], "rejected": other["output"]}) + "\n")
    run_command("parse", "--input", file, "--input", pair / "heldout.jsonl", "--output", folder / "spans")
    return {"data__train": [str(file)], "data__spans": str(folder / "spans")}


@pytest.fixture(scope="session")
def one_rank(pair: Path, preferences, tmp_path_factory: pytest.TempPathFactory):
    """The run of a method on one rank, made once: (folder, metrics, weights)."""
    runs: dict[str, tuple] = {}

    def run(name: str) -> tuple:
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            runs[name] = (folder, *train(pair, folder, 1, **changes_of(name, preferences)))
        return runs[name]

    return run


def changes_of(name: str, preferences: dict[str, object]) -> dict[str, object]:
    return METHODS[name] | (preferences if name == "distillm2" else {})


@pytest.mark.parametrize("name", ["fdd", "fdd-normed-alone", "distillm", "gkd", "distillm2", "distillm2-anew"])
def test_one_rank_equals_two(pair: Path, preferences, one_rank, tmp_path: Path, name: str) -> None:
    two = train(pair, tmp_path, 2, **changes_of(name, preferences), train__micro_batch_size=2)
    assert_same_run(two, one_rank(name)[1:])


def test_sequences_come_from_everywhere(one_rank) -> None:
    rows = [row for row in one_rank("distillm")[1] if "loss" in row]
    assert any(row["source/student"] for row in rows) and any(row["source/buffer"] for row in rows)
    assert all(row["source/student"] and row["dsa"] > 0 for row in one_rank("gkd")[1] if "loss" in row)


def test_mta_passes_over_what_nobody_parsed(one_rank) -> None:
    rows = [row for row in one_rank("gkd-unparsed")[1] if "loss" in row]
    assert all(row["source/student"] and row["loss"] == row["base"] > 0 == row["dsa"] for row in rows)


@pytest.mark.parametrize("name", ["distillm", "gkd", "distillm2"])
def test_every_method_runs_without_mta(pair: Path, preferences, one_rank_group, tmp_path: Path, name: str) -> None:
    """In this process, which is quicker."""
    changes = changes_of(name, preferences) | {"mta": None, "data__spans": None, "train__asynchronous_saves": False}
    if name == "distillm":
        changes |= {"loss": DISTILLM | {"phi_step": 0, "buffer_size": 4}, "train__steps": 5}
    assert train_here(load(write_config(pair, tmp_path, **changes | {"data__validation": []}), RunConfig))
    rows = read_metrics(tmp_path)
    assert all(row["loss"] == row["base"] > 0 == row["dsa"] == row["hid"] for row in rows)
    if name != "distillm2":
        assert sum(row["source/student"] + row["source/buffer"] for row in rows) == len(rows)


def test_terms_are_logged(one_rank) -> None:
    assert all(row["base"] > row["fdd"] > 0 for row in one_rank("fdd")[1] if "loss" in row)
    rows = [row for row in one_rank("distillm2")[1] if "loss" in row]
    assert all(row["dsa"] > 0 for row in rows) and rows[-1]["method/gap_steps"] == 2


@pytest.mark.parametrize("name", ["distillm", "distillm2-anew"])
def test_a_stopped_run_ends_as_one_that_was_not(pair: Path, preferences, one_rank, tmp_path: Path, name: str) -> None:
    folder, *undisturbed = one_rank(name)
    changes = changes_of(name, preferences)
    path = write_config(pair, tmp_path, **changes)
    for _ in range(2):  # a step each
        assert run_command("train", path, "train.max_minutes=1e-9", "--nproc", 1, check=False).returncode == 75
    assert_same_run(train(pair, tmp_path, 1, **changes), undisturbed, tolerance=0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_each_epoch_has_pairs_of_its_own(one_rank) -> None:
    folder, metrics, _ = one_rank("distillm2-anew")
    epochs = sorted((folder / "epochs").glob("*/epoch-*/pairs.jsonl"))[:2]
    first, second = ({row["id"]: row for row in map(json.loads, path.read_text().splitlines())} for path in epochs)
    both = first.keys() & second.keys()
    assert len(both) > 12
    for half in ("chosen", "rejected"):
        assert sum(first[record][half] != second[record][half] for record in both) > len(both) // 2
    assert all(row["dsa"] > 0 for row in metrics if "loss" in row)


@pytest.mark.parametrize(
    ("loss", "train", "may_change"),
    [
        ({"method": "kd"}, {"validate_every": 5, "non_finite": "skip"}, True),
        ({"method": "kd"}, {"verify_weights": True, "deterministic": True}, True),
        ({"method": "distillm"}, {"validate_every": 5}, False),  # φ grows at validations
        ({"method": "distillm"}, {"save_every": 5, "non_finite": "skip"}, True),
        ({"method": "distillm", "rollouts": {"parser_workers": 3}}, {}, True),
        ({"method": "distillm", "rollouts": {"parser_workers": 0}}, {}, False),
        ({"method": "distillm", "rollouts": {"batch_size": 8}}, {}, False),  # rounding tips draws
    ],
)
def test_what_may_change_on_resumption(loss: dict, train: dict, may_change: bool) -> None:
    base = {"run_dir": "r", "teacher": {"path": "t"}, "student": {"path": "s"}, "mta": None}
    base |= {"data": {"train": ["x.jsonl"], "validation": ["y.jsonl"]}}
    before = RunConfig(**base, loss={"method": loss["method"]}, train={"steps": 9})
    after = RunConfig(**base, loss=loss, train={"steps": 9} | train)
    assert (after.training_hash() == before.training_hash()) == may_change


def test_what_adapts_is_asked_of_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any method's, not DistiLLM's alone: validations that are needed, come once an epoch, and stay where they are."""
    values = {"run_dir": "r", "teacher": {"path": "t"}, "student": {"path": "s"}, "mta": None}
    alone, with_validation = ({"train": ["x.jsonl"], "validation": names} for names in ([], ["y.jsonl"]))
    train = {"steps": 9, "micro_batch_size": 4}

    def config(data: dict, **changes: object) -> RunConfig:
        return RunConfig(**values, data=data, train=train | changes)

    def due(run: RunConfig) -> int | None:
        return validate_every(SimpleNamespace(config=run, train=range(24)))

    free = config(with_validation)
    assert due(config(alone)) is due(free) is None and due(config(alone, validate_every=2)) == 2
    assert config(with_validation, validate_every=2).training_hash() == free.training_hash()
    monkeypatch.setattr(KDConfig, "adapts", property(lambda section: True))
    assert due(free) == 6 and due(config(with_validation, validate_every=2)) == 2
    assert config(with_validation, validate_every=2).training_hash() != free.training_hash()
    with pytest.raises(ValueError, match=r"data\.validation: kd adapts to a held-out loss"):
        config(alone)


def test_what_never_grows_needs_no_validation() -> None:
    assert DistiLLMConfig(method="distillm").adapts and not DistiLLMConfig(method="distillm", phi_step=0).adapts


@pytest.mark.parametrize(("mta", "is_free"), [({}, False), (None, True)])
def test_another_parser_is_another_run_where_it_parses_what_is_trained_on(mta: dict | None, is_free: bool) -> None:
    values = {"run_dir": "r", "teacher": {"path": "t"}, "student": {"path": "s"}, "mta": mta, "train": {"steps": 9}}
    values |= {"data": {"train": ["x.jsonl"]}, "loss": {"method": "distillm2", "regenerate": "both"}}
    sections = [None, {}, {"parser": "none"}]
    given = [section if section is None else {"inputs": ["x.jsonl"], "output": "o"} | section for section in sections]
    bundled, named_none, other = (RunConfig(**values, parse=section).training_hash() for section in given)
    assert bundled == named_none and (other == bundled) == is_free


def test_a_prompt_is_enough_where_both_responses_are_written(pair: Path, one_rank_group, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in (pair / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({key: value for key, value in row.items() if key != "output"}) for row in rows]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    changes = METHODS["distillm2-anew"] | {"train__steps": 1, "train__asynchronous_saves": False}
    changes |= {"mta": None, "data__spans": None, "data__validation": [], "data__train": [str(prompts)]}
    config = load(write_config(pair, tmp_path, **changes), RunConfig)
    assert train_here(config)
    (row,) = read_metrics(tmp_path)
    assert row["loss"] == row["base"] > 0
    rejected = config.loss.model_copy(update={"regenerate": "rejected"})
    with pytest.raises(UserError, match=r"no records left .*24 without a response"):
        check(config.model_copy(update={"loss": rejected, "run_dir": tmp_path / "rejected"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": {"method": "distillm"}, "data__validation": []}, "data.validation: distillm adapts"),
        ({"loss": {"method": "distillm2"}}, "chosen"),
        ({"loss": FDD | {"student_layers": [9]}}, "loss: student layer 9 does not exist"),
    ],
    ids=["validation", "pairs", "layer"],
)
def test_bad_input_is_one_line(pair: Path, tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        check(load(write_config(pair, tmp_path, **changes), RunConfig))
    assert "\n" not in str(raised.value)
