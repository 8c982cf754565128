"""Templates: exact text, what is labelled, where each field lies; single and many turns, odd templates."""

from __future__ import annotations

import pytest
from support import train_tokenizer

from mta_ds.data import DataConfig, Example, encode, encode_prompt, render
from mta_ds.data.template import Part, changed_fields
from mta_ds.errors import UserError
from mta_ds.spans.records import Record, parse_row

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
# earlier answers lose what they say before "</think>", as some templates do
STRIPPING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def record(**row: object) -> Record:
    parsed = parse_row(row, "test:1")
    assert isinstance(parsed, Record), parsed
    return parsed


def conversation(*turns: str, first: str = "user") -> Record:
    roles = ["system", "user", "assistant"][0 if first == "system" else 1 :]
    cycle = roles + ["user", "assistant"] * len(turns)
    return record(messages=[{"role": r, "content": t} for r, t in zip(cycle, turns, strict=False)])


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer("user assistant system What is this? A test, with words. ### Instruction: Response" * 20)
    made.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    made.chat_template = CHATML
    return made


def assert_pieces_are_the_fields(record: Record, parts: list[Part]) -> None:
    for part in parts:
        for field, field_start, start, length in part.pieces:
            assert part.text[start : start + length] == record.fields[field][field_start : field_start + length]


def test_minillm_template_is_exact(tokenizer) -> None:
    with_input = record(instruction="Add.", input="1 2", output="3")
    prompt, response = render(with_input, "minillm", tokenizer)
    assert prompt.text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert (response.text, response.is_response, response.ends_with_eos) == ("3", True, True)
    (prompt, _) = render(record(instruction="Add.", output="3"), "minillm", tokenizer)
    assert prompt.text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert_pieces_are_the_fields(with_input, render(with_input, "minillm", tokenizer))


def test_plain_joins_prompt_and_response_and_labels_all_of_a_text(tokenizer) -> None:
    parts = render(record(prompt="Once upon", response=" a time"), "plain", tokenizer)
    assert [(p.text, p.is_response) for p in parts] == [("Once upon", False), (" a time", True)]
    (part,) = render(record(text="Only text."), "minillm", tokenizer)
    assert (part.text, part.is_response) == ("Only text.", True)


def test_chat_of_one_turn(tokenizer) -> None:
    ours = record(instruction="Sum up.", input="Long text.", output="Short.")
    prompt, response = render(ours, "chat", tokenizer)
    assert prompt.text == "<|start|>user\nSum up.\n\nLong text.<|end|>\n<|start|>assistant\n"
    assert response.text == "Short.<|end|>" and not response.ends_with_eos
    assert_pieces_are_the_fields(ours, [prompt, response])


@pytest.mark.parametrize("template", [CHATML, TRIMMING])
@pytest.mark.parametrize(
    "turns",
    [
        ("What is this?", "A test."),
        ("user", "assistant", "user", "user"),
        ("same", "same", "same", "same"),
        ("  spaces around ", " \nanswer\n ", "again ", " and again"),
        ("😀 é", "naïve 👩‍👩‍👧", "שלום", "مرحبا"),
        ("Question without an answer", "An answer", "and one more"),
    ],
)
def test_every_assistant_turn_is_labelled_and_nothing_else(tokenizer, template: str, turns: tuple[str, ...]) -> None:
    tokenizer.chat_template = template
    ours = conversation(*turns)
    parts = render(ours, "chat", tokenizer)
    tokenizer.chat_template = CHATML
    answers = [t.strip() if template == TRIMMING else t for t in turns[1::2]]
    assert [p.text for p in parts if p.is_response] == [f"{a}<|end|>" for a in answers]
    whole = "".join(
        f"<|start|>{role}\n{text.strip() if template == TRIMMING else text}<|end|>\n"
        for role, text in zip(ours.roles, turns, strict=True)
    )
    # what follows the last answer is said by nobody
    assert whole.startswith("".join(p.text for p in parts)) and len(whole) - sum(len(p.text) for p in parts) <= 1
    assert_pieces_are_the_fields(ours, parts)
    assert {piece.field for part in parts for piece in part.pieces} == set(ours.fields)


@pytest.mark.parametrize("question", ["One?", "user", "assistant", "First."])
def test_a_template_that_changes_an_earlier_answer(tokenizer, question: str) -> None:
    tokenizer.chat_template = STRIPPING
    ours = conversation(question, "<think>hm</think>First.", "Two?", "<think>ah</think>Second.")
    parts = render(ours, "chat", tokenizer)
    tokenizer.chat_template = CHATML
    assert [p.text for p in parts if p.is_response] == ["First.<|end|>", "<think>ah</think>Second.<|end|>"]
    assert parts[0].text == f"<|start|>user\n{question}<|end|>\n<|start|>assistant\n"
    placed = {piece.field for part in parts for piece in part.pieces}
    assert placed == {"messages.0", "messages.2", "messages.3"} and changed_fields(ours, parts) == 1
    assert_pieces_are_the_fields(ours, parts)


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        # the user's text between literals that end and begin with a space, trimmed
        ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %} "
         "{{ m.content | trim }} <|end|>{% endif %}{% endfor %}", "[INST] Ask: [/INST]", " Yes! <|end|>"),
        # a system message of the template's own
        ("Be kind.\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
         "Be kind.\nuser:  Ask: \nassistant: ", "\nYes! "),
        # other literals when a content says something: the model's to write
        ("{% for m in messages %}{% if 'Yes' in m.content %}!{% endif %}{{ m.content | trim }}<|end|>{% endfor %}",
         "Ask:<|end|>", "!Yes!<|end|>"),
    ],
)  # fmt: skip
def test_odd_templates(tokenizer, template: str, prompt: str, response: str) -> None:
    tokenizer.chat_template = template
    ours = conversation(" Ask: ", "\nYes! ")
    parts = render(ours, "chat", tokenizer)
    tokenizer.chat_template = CHATML
    assert [part.text for part in parts] == [prompt, response]
    assert not changed_fields(ours, parts)
    assert_pieces_are_the_fields(ours, parts)


def test_texts_that_are_empty(tokenizer) -> None:
    (prompt, _) = render(record(instruction="", output="3"), "minillm", tokenizer)
    assert prompt.text.endswith("request.\n\n### Instruction:\n\n\n### Response:\n")
    (prompt, _) = render(record(instruction="", input="1", output="3"), "minillm", tokenizer)
    assert prompt.text.endswith("context. Write a response that appropriately completes the request.\n\n"
                                "### Instruction:\n\n\n### Input:\n1\n\n### Response:\n")  # fmt: skip
    turns = [{"role": r, "content": c} for r, c in (("system", ""), ("user", "Hi"), ("assistant", "Hello"))]
    ours = record(messages=turns)
    assert [p.text for p in render(ours, "plain", tokenizer)] == ["Hi", "Hello"]
    assert_pieces_are_the_fields(ours, render(ours, "chat", tokenizer))


def test_preferences_train_on_the_chosen_response(tokenizer) -> None:
    ours = record(prompt="Ask", chosen="good", rejected="bad")
    for template in ("minillm", "chat", "plain"):
        parts = render(ours, template, tokenizer)
        assert parts[-1].is_response and parts[-1].text.startswith("good") and not changed_fields(ours, parts)
        assert not any("bad" in part.text for part in parts)


PROMPTS = [
    {"prompt": "Ask"},
    {"instruction": "Add.", "input": "1 2"},
    {"instruction": "Go."},
    {"messages": [{"role": "user", "content": "Hi"}]},
]
RESPONSE = {"prompt": "response", "instruction": "output"}


@pytest.mark.parametrize("template", ["minillm", "plain", "chat"])
@pytest.mark.parametrize("row", PROMPTS, ids=lambda row: next(iter(row)))
def test_each_half_of_a_preference_is_rendered_like_a_record_of_its_own(tokenizer, template, row: dict) -> None:
    both = record(**row, chosen="good", rejected="bad")
    for half, text in (("chosen", "good"), ("rejected", "bad")):
        if "messages" in row:
            alone = record(messages=[*row["messages"], {"role": "assistant", "content": text}])
        else:
            alone = record(**row, **{RESPONSE[next(iter(row))]: text})
        ours, expected = render(both, template, tokenizer, half=half), render(alone, template, tokenizer)
        assert [(p.text, p.is_response, p.ends_with_eos) for p in ours] == [
            (p.text, p.is_response, p.ends_with_eos) for p in expected
        ]
        assert [piece.field for piece in ours[1].pieces] == [half]
        assert_pieces_are_the_fields(both, ours)
        asked = [render(r, template, tokenizer, with_response=False) for r in (both, alone)]
        assert asked[0] == asked[1] and len(asked[0]) == 1


def test_a_conversation_before_a_preference(tokenizer) -> None:
    turns = [{"role": r, "content": t} for r, t in (("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"))]
    ours = record(messages=turns, chosen="So long", rejected="No")
    parts = render(ours, "chat", tokenizer, half="rejected")
    assert [p.text for p in parts if p.is_response] == ["Hello<|end|>", "No<|end|>"]
    assert_pieces_are_the_fields(ours, parts)
    (asked,) = render(ours, "chat", tokenizer, with_response=False)
    assert asked.text == "".join(p.text for p in parts[:-1])
    with pytest.raises(UserError, match=r"needs data\.template: chat"):
        render(ours, "minillm", tokenizer)


@pytest.mark.parametrize("template", ["minillm", "plain", "chat"])
def test_a_response_that_was_cut_off_has_no_end(tokenizer, template) -> None:
    whole = render(record(prompt="Ask", response="good"), template, tokenizer)
    cut = render(record(prompt="Ask", response="good", ended=False), template, tokenizer)
    assert cut[0] == whole[0] and (cut[1].text, cut[1].ends_with_eos) == ("good", False)
    assert whole[1].ends_with_eos or whole[1].text == "good<|end|>"
    ours = record(prompt="Ask", chosen="good", rejected="bad", ended={"chosen": True, "rejected": False})
    assert render(ours, template, tokenizer)[1:] == [
        Part(whole[1].text, True, (whole[1].pieces[0]._replace(field="chosen"),), whole[1].ends_with_eos)
    ]
    (_, rejected) = render(ours, template, tokenizer, half="rejected")
    assert (rejected.text, rejected.ends_with_eos) == ("bad", False)


def test_only_the_last_turn_can_be_cut_off(tokenizer) -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(["a", "b", "c", "d"])]
    parts = render(record(messages=turns, ended=False), "chat", tokenizer)
    assert [(p.text, p.ends_with_eos) for p in parts if p.is_response] == [("b<|end|>", False), ("d", False)]


def test_the_prompt_of_a_conversation_knows_its_fields(tokenizer) -> None:
    ours = conversation("Hi", "Hello", "Who are you?", "A test")
    (part,) = render(ours, "chat", tokenizer, with_response=False)
    assert part.text.endswith("Who are you?<|end|>\n<|start|>assistant\n")
    assert [piece.field for piece in part.pieces] == ["messages.0", "messages.1", "messages.2"]
    assert_pieces_are_the_fields(ours, [part])


def test_a_template_without_an_end_token_gets_eos(tokenizer) -> None:
    tokenizer.chat_template = NO_END
    parts = render(conversation("Hi", "Hello", "Bye", "So long"), "chat", tokenizer)
    tokenizer.chat_template = CHATML
    answers = [(p.text, p.ends_with_eos) for p in parts if p.is_response]
    assert answers == [("Hello", True), ("So long", True)]


def test_formats_that_do_not_fit(tokenizer) -> None:
    with pytest.raises(UserError, match=r"test:1: .*needs data\.template: chat"):
        render(conversation("a", "b", "c", "d"), "minillm", tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"test:1: the chat template refuses turns user assistant: .*alternate"):
        render(conversation("a", "b"), "chat", tokenizer)
    tokenizer.chat_template = CHATML
    bare = train_tokenizer("a b c")
    with pytest.raises(UserError, match="no chat template"):
        render(conversation("a", "b"), "chat", bare)


@pytest.mark.parametrize("template", ["minillm", "chat", "plain"])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Do it.", "input": "This.", "output": "Done."},
        {"prompt": "Say", "response": "what?"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    ],
)
def test_generation_starts_where_training_does(tokenizer, template, row: dict) -> None:
    ours, config = record(**row), DataConfig(template=template)
    example = encode(ours, config, tokenizer, None)
    assert isinstance(example, Example)
    prompt = encode_prompt(ours, config, tokenizer)
    assert prompt == example.input_ids[: example.prompt_length].tolist()
    labels = example.labels[example.prompt_length :]
    assert (labels == example.input_ids[example.prompt_length :]).all() and labels[-1] == tokenizer.eos_token_id
    assert (example.labels[: example.prompt_length] == -100).all()
    assert list(example.input_ids).count(tokenizer.eos_token_id) == (2 if template == "chat" else 1)


# strips thoughts from earlier answers and writes an empty one into a last answer without, as Qwen3's template does
THINKING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] != 'assistant' %}{{ m['content'] }}"
    "{% elif not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% elif '</think>' in m['content'] %}{{ m['content'] }}"
    "{% else %}<think>\n\n</think>\n\n{{ m['content'] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def test_an_answer_that_lost_its_thought_is_still_labelled(tokenizer) -> None:
    tokenizer.chat_template = THINKING
    parts = render(conversation("q", "<think>x</think>ans", "q2", "<think>y</think>ans2"), "chat", tokenizer)
    tokenizer.chat_template = CHATML
    assert [p.text for p in parts if p.is_response] == ["ans<|end|>", "<think>y</think>ans2<|end|>"]


# no generation prompt, and each speaker is announced
HEADERS = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"

# the generation prompt ends at the bracket, the answer is written after a space, as in Llama-2's template
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|start|>[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} <|end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "answers"),
    [(THINKING, ["", "<think>\n\n</think>\n\n"]), (BRACKETS, [" ", " "]), (HEADERS, ["", ""])],
)
def test_what_a_template_writes_before_an_answer_is_the_models_to_write(tokenizer, template: str, answers) -> None:
    tokenizer.chat_template = template
    try:
        ours = conversation("What now?", "Hello there", "And then?", "So long")
        responses = [part for part in render(ours, "chat", tokenizer) if part.is_response]
        example = encode(ours, DataConfig(template="chat"), tokenizer, None)
        asked = encode_prompt(ours, DataConfig(template="chat"), tokenizer)
    finally:
        tokenizer.chat_template = CHATML
    for part, extra, content in zip(responses, answers, ["Hello there", "So long"], strict=True):
        assert part.text.startswith(extra + content)
        (piece,) = part.pieces
        assert part.text[piece.start : piece.start + piece.length] == content
    assert isinstance(example, Example)
    assert example.input_ids[: len(asked)].tolist() == asked
    assert (example.labels[len(asked) :] == example.input_ids[len(asked) :]).all()
    assert example.labels[len(asked) - 1] == -100
