"""Records to examples: BOS and EOS, lengths, and spans that name the tokens they should."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support import train_tokenizer
from tokenizers import processors

from mta_ds.data import DataConfig, Dropped, Example, UnitConfig, Units, build_dataset, encode, encode_prompt
from mta_ds.data.encode import encode_question
from mta_ds.errors import UserError
from mta_ds.spans.records import Record, parse_row, text_hash

INSTRUCTION, OUTPUT = "Name the big cat of Asia.", "The striped tiger lives in the dense forest."


def lookup(_record_id: str, _field: str, text: str) -> Units:
    """Every word an NP of its own, and one NP over each two words."""
    words, start = [], 0
    for word in text.split(" "):
        words.append((start, start + len(word)))
        start += len(word) + 1
    n = len(words)
    pairs = [(i, min(i + 2, n)) for i in range(0, n, 2)] + [(i, i + 1) for i in range(n)]
    pairs.sort(key=lambda r: (r[0], -r[1]))
    rows = np.array([(a, b, 1) for a, b in pairs], dtype=np.int32)
    bounds = np.array([0, n], dtype=np.int32)
    ranges = np.array(words, dtype=np.int32)
    return Units(text_hash(text), len(text), bounds, ranges, ["NN"] * n, rows, ["NP"] * len(rows))


def record(**row: object) -> Record:
    parsed = parse_row(row or {"instruction": INSTRUCTION, "output": OUTPUT}, "test:1")
    assert isinstance(parsed, Record)
    return parsed


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(f"{INSTRUCTION} {OUTPUT} Below is an instruction that describes a task. " * 10)


def run(tokenizer, ours: Record | None = None, **options: object) -> Example:
    example = encode(ours or record(), DataConfig(**options), tokenizer, lookup)
    assert isinstance(example, Example), example
    return example


def texts_of(tokenizer, example: Example, granularity: str) -> list[str]:
    return [tokenizer.decode(example.input_ids[a:b]).strip() for a, b in example.spans[granularity]]


def test_spans_decode_to_their_units(tokenizer) -> None:
    example = run(tokenizer, units=UnitConfig(choose="all"))
    words = INSTRUCTION.split() + OUTPUT.split()
    assert texts_of(tokenizer, example, "word") == words
    phrases = texts_of(tokenizer, example, "phrase")
    assert set(words) < set(phrases) and {"Name the", "The striped", "tiger lives"} < set(phrases)
    assert len(phrases) == len(set(map(tuple, example.spans["phrase"].tolist())))


def test_units_of_the_response_only(tokenizer) -> None:
    example = run(tokenizer, units=UnitConfig(choose="all", fields="response"))
    assert texts_of(tokenizer, example, "word") == OUTPUT.split()
    assert (example.spans["phrase"] >= example.prompt_length).all()


@pytest.mark.parametrize("template", ["minillm", "plain"])
def test_labels_are_the_response_and_eos(tokenizer, template) -> None:
    example = run(tokenizer, template=template)
    labelled = example.input_ids[example.labels != -100]
    assert (example.labels[example.labels != -100] == labelled).all()
    assert tokenizer.decode(labelled) == f"{OUTPUT}{tokenizer.eos_token}"


def test_cut_sequences_lose_the_spans_beyond(tokenizer) -> None:
    whole = run(tokenizer, units=UnitConfig(choose="all"))
    limit = len(whole.input_ids) - 4
    cut = run(tokenizer, max_length=limit, units=UnitConfig(choose="all"))
    assert cut.input_ids.tolist() == whole.input_ids[:limit].tolist()
    for granularity, spans in whole.spans.items():
        kept = spans[spans[:, 1] <= limit]
        assert len(kept) < len(spans) and cut.spans[granularity].tolist() == kept.tolist()


def test_long_prompts(tokenizer) -> None:
    whole = run(tokenizer)
    limit = whole.prompt_length - 10
    cut = run(tokenizer, max_prompt_length=limit, units=UnitConfig(choose="all"))
    assert cut.prompt_length == limit
    assert cut.input_ids[:limit].tolist() == whole.input_ids[:limit].tolist()
    assert cut.input_ids[limit:].tolist() == whole.input_ids[whole.prompt_length :].tolist()
    assert texts_of(tokenizer, cut, "word")[-len(OUTPUT.split()) :] == OUTPUT.split()
    assert encode_prompt(record(), DataConfig(max_prompt_length=limit), tokenizer) == cut.input_ids[:limit].tolist()
    dropped = encode(record(), DataConfig(max_prompt_length=limit, long_prompts="drop"), tokenizer, lookup)
    assert isinstance(dropped, Dropped) and "max_prompt_length" in dropped.reason


def question(tokenizer, ours: Record, **options: object) -> Example:
    example = encode_question(ours, DataConfig(**options), tokenizer)
    assert isinstance(example, Example), example
    return example


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": INSTRUCTION},
        {"prompt": INSTRUCTION, "response": OUTPUT},
        {"prompt": INSTRUCTION, "chosen": "", "rejected": OUTPUT},
        {"messages": [{"role": "user", "content": INSTRUCTION}]},
    ],
)
def test_a_question_is_what_generate_asks_whatever_the_answer(tokenizer, row) -> None:
    ours = record(**row)
    example = question(tokenizer, ours)
    assert example.input_ids.tolist() == encode_prompt(ours, DataConfig(), tokenizer) and example.record_id == ours.id
    assert example.prompt_length == len(example.input_ids) > 0 and (example.labels == -100).all()
    assert not any(len(spans) for spans in example.spans.values())


def test_questions_that_are_none_or_too_long(tokenizer) -> None:
    whole = question(tokenizer, record())
    limit = whole.prompt_length - 10
    assert question(tokenizer, record(), max_prompt_length=limit).input_ids.tolist() == whole.input_ids[:limit].tolist()
    config = DataConfig(max_prompt_length=limit, long_prompts="drop")
    assert encode_question(record(), config, tokenizer) == Dropped("with a prompt over max_prompt_length")
    assert encode_question(record(text=OUTPUT), config, tokenizer) == Dropped("without a prompt")
    assert encode_prompt(record(text=OUTPUT), config, tokenizer) == []


def test_a_data_set_of_prompts_alone(tokenizer, tmp_path) -> None:
    file = tmp_path / "records.jsonl"
    rows = [{"id": "q", "prompt": INSTRUCTION}, {"id": "r", "prompt": "Go.", "response": OUTPUT}, {"text": OUTPUT}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dataset = build_dataset([str(file)], DataConfig(), tokenizer, None, tmp_path / "cache", prompts_only=True)
    assert [dataset[i].record_id for i in range(len(dataset))] == ["q", "r"]
    assert dataset.prompt_lengths.tolist() == dataset.lengths.tolist()
    summary = dataset.summary
    assert (summary.records, summary.label_tokens, summary.changed_fields, summary.group) == (2, 0, 0, 1)
    assert summary.dropped == {"without a prompt": 1}
    answered = build_dataset([str(file)], DataConfig(), tokenizer, None, tmp_path / "cache")
    assert answered.key != dataset.key and answered.summary.records == 2


def test_a_unit_that_the_cut_prompt_breaks_is_dropped(tokenizer) -> None:
    whole = run(tokenizer, units=UnitConfig(choose="all"))
    for limit in range(1, whole.prompt_length):
        cut = run(tokenizer, max_prompt_length=limit, units=UnitConfig(choose="all"))
        for granularity, spans in whole.spans.items():
            prompt = spans[spans[:, 1] <= limit]
            response = spans[spans[:, 0] >= whole.prompt_length] - (whole.prompt_length - limit)
            assert cut.spans[granularity].tolist() == [*prompt.tolist(), *response.tolist()]


def test_conversations_are_cut_at_their_end_only(tokenizer) -> None:
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate([INSTRUCTION, OUTPUT] * 2)
    ]
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    whole = run(tokenizer, record(messages=turns), template="chat", max_prompt_length=2)
    cut = run(tokenizer, record(messages=turns), template="chat", max_length=len(whole.input_ids) - 9)
    assert cut.input_ids.tolist() == whole.input_ids[:-9].tolist()
    labelled = tokenizer.decode(whole.input_ids[whole.labels != -100])
    assert labelled == f"{OUTPUT}{tokenizer.eos_token}" * 2
    assert texts_of(tokenizer, whole, "word") == (INSTRUCTION.split() + OUTPUT.split()) * 2


def test_a_rollout_answers_what_generate_would(tokenizer) -> None:
    """The last turn, or the last that begins within ``max_length``."""
    texts = ["Name the cat.", "The tiger.", "And where?", "In the dense forest."]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ours = record(messages=turns)
    whole = run(tokenizer, ours, template="chat")
    prompt = tokenizer.decode(whole.input_ids[: whole.prompt_length])
    assert prompt == tokenizer.decode(encode_prompt(ours, DataConfig(template="chat"), tokenizer))
    assert prompt.endswith("The tiger.<|end|>user: And where?<|end|>assistant: ")
    cut = run(tokenizer, ours, template="chat", max_length=whole.prompt_length)
    assert tokenizer.decode(cut.input_ids[: cut.prompt_length]) == "user: Name the cat.<|end|>assistant: "
    assert (
        run(tokenizer, ours, template="chat", max_length=whole.prompt_length + 1).prompt_length == whole.prompt_length
    )


TURN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


@pytest.mark.parametrize(("half", "other"), [("chosen", "rejected"), ("rejected", "chosen")])
@pytest.mark.parametrize("empty", ["", None, " \n"])
@pytest.mark.parametrize(("template", "prompt"), [("minillm", {"prompt": "p"}), ("chat", {"messages": TURN})])
def test_a_preference_with_an_empty_half_is_named(tokenizer, half, other, empty, template, prompt) -> None:
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    ours = record(**prompt, id="r7", **{half: empty, other: "an answer"})
    config = DataConfig(template=template)
    with pytest.raises(UserError, match=rf"^test:1: record r7 has nothing in {half}; .*remove the row$"):
        encode(ours, config, tokenizer, None, half)
    assert isinstance(encode(ours, config, tokenizer, None, other), Example)  # whoever reads one half has it


def test_records_without_a_label_are_dropped(tokenizer) -> None:
    whole = run(tokenizer)
    config = DataConfig(max_length=whole.prompt_length, max_prompt_length=whole.prompt_length)
    assert isinstance(encode(record(), config, tokenizer, lookup), Dropped)
    assert isinstance(encode(record(instruction="No answer"), DataConfig(), tokenizer, lookup), Dropped)


@pytest.mark.parametrize("written", [False, True])
def test_exactly_one_bos_where_the_tokenizer_begins_with_one(written: bool) -> None:
    tokenizer = train_tokenizer("hello world " * 9)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    single = "<s> $A"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=[("<s>", bos)])
    tokenizer.chat_template = ("<s>" if written else "") + "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    ours = record(prompt="hello", response="world")
    for template in ("chat", "plain"):
        example = run(tokenizer, ours, template=template)
        assert example.input_ids.tolist().count(bos) == 1 and example.input_ids[0] == bos and example.labels[0] == -100
        assert encode_prompt(ours, DataConfig(template=template), tokenizer).count(bos) == 1


def test_a_tokenizer_without_bos_gets_none(tokenizer) -> None:
    example = run(tokenizer, record(text=OUTPUT))
    assert tokenizer.decode(example.input_ids) == f"{OUTPUT}{tokenizer.eos_token}"
    assert (example.labels == example.input_ids).all() and example.prompt_length == 0
