from __future__ import annotations

from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from mta_ds.evaluation.generation import GenerationConfig, end_tokens, generate

PROMPTS = ["The cat", "Water boils at one hundred degrees", "a", "the old dog watched it"]


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def greedy_by_hand(model, prompt, num_tokens, ends, num_known):
    ids = list(prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1, :num_known]
        ids.append(int(logits.argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def test_greedy_equals_one_token_at_a_time(make_model, tokenizer, prompts):
    model = make_model(0, extra_rows=64)
    config = GenerationConfig(max_new_tokens=12, batch_size=3)
    expected = [greedy_by_hand(model, p, 12, end_tokens(model, tokenizer), len(tokenizer)) for p in prompts]
    assert generate(model, tokenizer, prompts, config) == expected


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_left_padding_is_invisible_to_learned_positions(family, tokenizer, prompts):
    torch.manual_seed(1)
    if family == "gpt2":
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
        model = GPT2LMHeadModel(config).eval()
    else:
        config = OPTConfig(
            vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        model = OPTForCausalLM(config).eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    together = generate(model, tokenizer, prompts, GenerationConfig(max_new_tokens=10, batch_size=4))
    alone = generate(model, tokenizer, prompts, GenerationConfig(max_new_tokens=10, batch_size=1))
    assert together == alone


@pytest.fixture(scope="module")
def learned_positions(tokenizer):
    """A GPT-2 of 64 positions that hardly ever ends a response."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    weight = model.get_input_embeddings().weight
    torch.nn.init.normal_(weight, std=0.5)
    with torch.no_grad():
        weight[tokenizer.eos_token_id] = 0
    return model


@pytest.mark.parametrize(
    ("lengths", "limits", "batches"),
    [
        ((50, 4, 4), {}, [1, 2]),  # the row of 50 would be carried on to position 110
        ((20, 16, 9), {"max_new_tokens": 44}, [3]),
        ((21, 16, 9), {"max_new_tokens": 44}, [1, 2]),
        ((40, 39, 38, 24), {"max_length": 63}, [2, 1, 1]),
    ],
)
def test_no_row_is_carried_past_the_last_position(learned_positions, tokenizer, lengths, limits, batches):
    random = torch.Generator().manual_seed(2)
    prompts = [torch.randint(5, len(tokenizer), (length,), generator=random).tolist() for length in lengths]
    config = GenerationConfig(**{"max_length": 64, "batch_size": 4} | limits)
    seen: list[int] = []
    responses = generate(learned_positions, tokenizer, prompts, config, on_batch=seen.append)
    alone = [generate(learned_positions, tokenizer, [prompt], config)[0] for prompt in prompts]
    assert seen == batches and responses == alone
    assert [len(response) for response in responses] == [config.budget(length) for length in lengths]


def test_rotary_positions_end_nowhere(make_model, tokenizer):
    model, seen = make_model(0), []
    prompts = [[5] * (model.config.max_position_embeddings - 4), [6] * 3]
    config = GenerationConfig(max_length=1000, max_new_tokens=9)
    responses = generate(model, tokenizer, prompts, config, on_batch=seen.append)
    assert seen == [2] and all(responses)


def test_sampling_depends_on_seed_and_key_not_on_the_batch(make_model, tokenizer, prompts):
    model = make_model(0)

    def sample(seed, batch_size, chosen=(0, 1, 2, 3)):
        config = GenerationConfig(max_new_tokens=8, do_sample=True, seed=seed, batch_size=batch_size)
        return generate(model, tokenizer, [prompts[i] for i in chosen], config, keys=chosen)

    assert sample(10, 4) == sample(10, 1)
    assert sample(10, 4) != sample(20, 4)
    assert sample(10, 2, chosen=(3, 1)) == [sample(10, 4)[3], sample(10, 4)[1]]


def test_sampling_follows_the_distribution(make_model, tokenizer, prompts):
    model = make_model(3)
    with torch.no_grad():
        expected = model(torch.tensor([prompts[0]])).logits[0, -1].softmax(-1)
    num = 4000
    config = GenerationConfig(max_new_tokens=1, do_sample=True, batch_size=500)
    drawn = Counter(ids[0] for ids in generate(model, tokenizer, [prompts[0]] * num, config))
    frequency = torch.tensor([drawn[i] / num for i in range(len(tokenizer))])
    assert float((frequency - expected).abs().max()) < 4 * (0.25 / num) ** 0.5  # 4 standard errors, at most


def test_top_k_one_and_tiny_top_p_are_greedy(make_model, tokenizer, prompts):
    model = make_model(0)
    greedy = generate(model, tokenizer, prompts, GenerationConfig(max_new_tokens=6))
    for limit in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        sampled = GenerationConfig.model_validate({"max_new_tokens": 6, "do_sample": True} | limit)
        assert generate(model, tokenizer, prompts, sampled) == greedy


def test_stops_at_any_end_token_and_keeps_it(make_model, tokenizer, prompts):
    model = make_model(0)
    config = GenerationConfig(max_new_tokens=12)
    free = generate(model, tokenizer, prompts, config)
    stop = free[1][3]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    assert end_tokens(model, tokenizer) == tuple(sorted((tokenizer.eos_token_id, stop)))
    for before, after in zip(free, generate(model, tokenizer, prompts, config), strict=True):
        assert after == (before[: before.index(stop) + 1] if stop in before else before)


def test_budget_is_each_prompts_own(make_model, tokenizer, prompts):
    model = make_model(0)
    longest = max(map(len, prompts))
    responses = generate(model, tokenizer, prompts, GenerationConfig(max_length=longest + 2, batch_size=4))
    ends = end_tokens(model, tokenizer)
    for prompt, response in zip(prompts, responses, strict=True):
        assert len(prompt) + len(response) == longest + 2 or response[-1] in ends


def test_no_repeat_ngram(make_model, tokenizer, prompts):
    model = make_model(0)
    for prompt, response in zip(
        prompts,
        generate(model, tokenizer, prompts, GenerationConfig(max_new_tokens=40, no_repeat_ngram_size=2)),
        strict=True,
    ):
        pairs = list(zip(ids := prompt + response, ids[1:], strict=False))
        assert len(pairs) == len(set(pairs))


def test_the_models_own_settings_do_not_shape_the_text_and_are_kept(make_model, tokenizer, prompts):
    model = make_model(0)
    config = GenerationConfig(max_new_tokens=10)
    plain = generate(model, tokenizer, prompts, config)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0
    own = model.generation_config
    model.train()
    assert generate(model, tokenizer, prompts, config) == plain
    assert model.generation_config is own
    assert model.training


def test_progress_counts_prompts(make_model, tokenizer, prompts):
    seen: list[int] = []
    generate(make_model(0), tokenizer, prompts, GenerationConfig(max_new_tokens=1, batch_size=3), on_batch=seen.append)
    assert seen == [3, 1]


@pytest.mark.parametrize("bad", [[], [5] * 20])
def test_prompt_without_room(make_model, tokenizer, prompts, bad):
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        generate(make_model(0), tokenizer, [prompts[0], bad], GenerationConfig(max_length=20))


@pytest.mark.parametrize("bad", [{"temperature": 0}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"batch_size": 0}])
def test_settings_are_checked(bad):
    with pytest.raises(ValidationError):
        GenerationConfig.model_validate(bad)
