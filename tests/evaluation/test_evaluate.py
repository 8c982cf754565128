from __future__ import annotations

import copy
import hashlib
import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from mta_ds.data import DataConfig, build_dataset
from mta_ds.errors import UsageError, UserError
from mta_ds.evaluation import EvaluationConfig, evaluate
from mta_ds.evaluation.rouge import rouge_l

RECORDS = [
    {"id": "r0", "instruction": "What did the dog do?", "input": "", "output": "The old dog watched the cat."},
    {"id": "r1", "instruction": "Name a number.", "input": "", "output": ["one", "one hundred"]},
    {"id": "r2", "instruction": "Repeat this.", "input": "Water boils.", "output": "Water boils."},
    {"id": "r3", "instruction": "Say more.", "input": "", "output": "On a mountain it boils a little earlier. 😀"},
]
DATA = DataConfig(template="minillm", max_length=400, max_prompt_length=300)
GREEDY = EvaluationConfig(do_sample=False, max_length=330, max_prompt_length=300, batch_size=3)


def save(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(make_model, tokenizer, tmp_path_factory):
    """Student and teacher folders of other widths; the teacher's head is untied and padded beyond the tokenizer."""
    root = tmp_path_factory.mktemp("models")
    teacher = make_model(1, hidden=48, layers=3, extra_rows=64, tied=False)
    return save(make_model(0), tokenizer, root / "student"), save(teacher, tokenizer, root / "teacher")


@pytest.fixture
def records(tmp_path) -> tuple[str, ...]:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return (str(path),)


def run(student, teacher, tmp_path, records, config=GREEDY, data=DATA):
    data = data.model_copy(update={"validation": records})
    return evaluate(student, teacher, tmp_path / "evaluation" / "after.json", config=config, data=data)


def brute_force(dataset, student, teacher, num_known):
    """Loss and KL one record at a time, from full logits in float64."""
    loss, kl, tokens = 0.0, 0.0, 0
    for index in range(len(dataset)):
        example = dataset[index]
        ids = torch.tensor(example.input_ids, dtype=torch.int64)[None]
        labels = torch.tensor(example.labels, dtype=torch.int64)[1:]
        with torch.no_grad():
            q = student(ids).logits[0, :-1, :num_known].double().log_softmax(-1)[labels != -100]
            p = teacher(ids).logits[0, :-1, :num_known].double().log_softmax(-1)[labels != -100]
        labels = labels[labels != -100]
        loss -= float(q.gather(1, labels[:, None]).sum())
        kl += float((p.exp() * (p - q)).sum())
        tokens += len(labels)
    return loss / tokens, kl / tokens, tokens


def test_loss_and_kl_are_global_token_means(pair, tokenizer, make_model, tmp_path, records):
    result = run(*pair, tmp_path, records, GREEDY.model_copy(update={"generate": False}))
    dataset = build_dataset(records, DATA, tokenizer, None, tmp_path / "cache")
    teacher = make_model(1, hidden=48, layers=3, extra_rows=64, tied=False)
    loss, kl, tokens = brute_force(dataset, make_model(0), teacher, len(tokenizer))
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["kl"] == pytest.approx(kl, rel=1e-5)
    assert result["tokens"] == tokens
    assert result["rouge_l"] is None and result["generations"] is None


def test_a_model_is_no_distance_from_itself(pair, tmp_path, records):
    result = run(pair[0], pair[0], tmp_path, records, GREEDY.model_copy(update={"generate": False}))
    assert result["kl"] == pytest.approx(0.0, abs=1e-6)
    alone = run(pair[0], None, tmp_path, records, GREEDY.model_copy(update={"generate": False}))
    assert alone["kl"] is None and alone["loss"] == pytest.approx(result["loss"])


def test_texts_are_scored_and_kept_with_every_setting(pair, tmp_path, records):
    result = run(*pair, tmp_path, records)
    written = json.loads((tmp_path / "evaluation" / "after.json").read_text(encoding="utf-8"))
    assert written == result
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / result["generations"]).open(encoding="utf-8")]
    assert [row["record_id"] for row in rows] == ["r0", "r1", "r2", "r3"]
    assert rows[1]["references"] == ["one", "one hundred"]
    assert rows[0]["fields"] == {"instruction": "What did the dog do?"}
    expected = rouge_l([row["text"] for row in rows], [row["references"] for row in rows])
    assert result["rouge_l"] == {"mean": expected.mean, "std": None, "passes": {"greedy": expected.mean}, "texts": 4}
    assert all(row["text"] == row["text"].strip() for row in rows)
    settings = result["settings"]
    assert settings["evaluation"]["no_repeat_ngram_size"] is None
    assert settings["data"] | {"template": "minillm", "max_length": 400} == settings["data"]
    assert settings["records"][records[0]] == {records[0]: hashlib.sha256(Path(records[0]).read_bytes()).hexdigest()}
    assert set(settings["student"]["sha256"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert settings["dtype"] == "float32"
    assert "transformers" in settings["versions"]


def test_sampling_over_seeds(pair, tmp_path, records):
    config = GREEDY.model_copy(update={"do_sample": True, "seeds": (10, 20, 30)})
    first = run(*pair, tmp_path, records, config)
    scores = first["rouge_l"]["passes"]
    assert list(scores) == ["10", "20", "30"]
    assert first["rouge_l"]["mean"] == pytest.approx(statistics.fmean(scores.values()))
    assert first["rouge_l"]["std"] == pytest.approx(statistics.stdev(scores.values()))
    texts = (tmp_path / "evaluation" / first["generations"]).read_text(encoding="utf-8")
    again = run(*pair, tmp_path, records, config.model_copy(update={"batch_size": 1}))
    assert again["rouge_l"]["passes"] == pytest.approx(scores)
    assert (tmp_path / "evaluation" / again["generations"]).read_text(encoding="utf-8") == texts


def test_max_records_limits_texts_but_not_losses(pair, tmp_path, records):
    everything = run(*pair, tmp_path, records)
    some = run(*pair, tmp_path, records, GREEDY.model_copy(update={"max_records": 2}))
    assert some["rouge_l"]["texts"] == 2
    assert some["tokens"] == everything["tokens"]


def test_own_records_take_the_place_of_the_validation_set(pair, tmp_path, records):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(RECORDS[0]) + "\n")
    result = run(*pair, tmp_path, records, GREEDY.model_copy(update={"records": (str(other),)}))
    assert result["rouge_l"]["texts"] == 1


def test_the_protocol_of_the_papers_is_the_default():
    config = EvaluationConfig()
    assert (config.max_prompt_length, config.max_length) == (256, 512)
    assert {name: settings.seed for name, settings in config.passes().items()} == {
        "10": 10, "20": 20, "30": 30, "40": 40, "50": 50,
    }  # fmt: skip
    sampled = config.passes()["10"]
    assert (sampled.do_sample, sampled.temperature, sampled.top_p, sampled.top_k) == (True, 1.0, 1.0, 0)


@pytest.mark.parametrize("bad", [{"seeds": []}, {"max_records": 0}, {"seed": 3}, {"max_length": 256}])
def test_settings_are_checked(bad):
    with pytest.raises(ValidationError):
        EvaluationConfig.model_validate(bad)


def test_mistakes_get_one_line(pair, make_model, tokenizer, tmp_path, records):
    student, teacher = pair
    with pytest.raises(UsageError, match=r"evaluation\.records"):
        run(student, teacher, tmp_path, ())
    with pytest.raises(UserError, match="positions"):
        run(student, teacher, tmp_path, records, GREEDY.model_copy(update={"max_length": 601}))
    with pytest.raises(UserError, match=r"^data\.max_length: 601 tokens, but \S+/student has 600 positions"):
        run(student, teacher, tmp_path, records, data=DATA.model_copy(update={"max_length": 601}))
    short = Path(shutil.copytree(teacher, tmp_path / "short"))
    values = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 399}))
    with pytest.raises(UserError, match=r"^data\.max_length: 400 tokens, but \S+/short has 399 positions"):
        run(student, short, tmp_path, records)
    with pytest.raises(UserError, match="config"):
        run(tmp_path, teacher, tmp_path, records)
    unanswered = tmp_path / "text.jsonl"
    unanswered.write_text('{"text": "The cat sat on the mat."}\n')
    with pytest.raises(UserError, match=r"evaluation\.generate: false"):
        run(student, None, tmp_path, (str(unanswered),), data=DATA.model_copy(update={"template": "plain"}))
    renamed = copy.deepcopy(tokenizer)
    renamed.add_tokens(["<new>"])
    other = save(make_model(2, extra_rows=1), renamed, tmp_path / "other")
    with pytest.raises(UserError, match="vocabulary"):
        run(student, other, tmp_path, records)
