"""BERT as the parser runs it against transformers' own, in odd sizes."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from mta_ds.spans.bert import FastBert, is_plain_bert


def bert(num_layers: int, activation: str = "gelu") -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 20, "vocab_size": 50}
    config = BertConfig(num_hidden_layers=num_layers, hidden_act=activation, **sizes)
    model = BertModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def inputs(lengths: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = len(lengths), max(lengths)
    mask = (torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(50, shape, generator=generator)
    types = torch.randint(2, shape, generator=generator)
    # more positions than there are, and the same one twice
    index = torch.randint(min(lengths), (shape[0], shape[1] + 2), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}, index


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [1, 9, 4]])
@pytest.mark.parametrize("num_layers", [0, 1, 3])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("typed", [True, False])
def test_is_transformers_up_to_rounding(lengths: list[int], num_layers: int, activation: str, typed: bool) -> None:
    model = bert(num_layers, activation)
    batch, index = inputs(lengths)
    batch = batch if typed else {name: value for name, value in batch.items() if name != "token_type_ids"}
    found = FastBert(model)(batch, index)
    hidden = model.double()(**batch).last_hidden_state
    expected = hidden.gather(1, index[:, :, None].expand(-1, -1, 24))
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_products_in_bf16_are_near_and_sums_stay_in_fp32() -> None:
    model = bert(2)
    batch, index = inputs([6, 4])
    expected = FastBert(model)(batch, index)
    found = FastBert(model, torch.bfloat16)(batch, index)
    in_bf16 = model.bfloat16()(**batch).last_hidden_state.gather(1, index[:, :, None].expand(-1, -1, 24))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() < (in_bf16 - expected).norm()


def test_only_plain_bert_is_taken() -> None:
    assert is_plain_bert(bert(1))
    assert not is_plain_bert(BertModel(BertConfig(**bert(1).config.to_diff_dict() | {"is_decoder": True})))
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 20, "num_hidden_layers": 1}
    assert not is_plain_bert(RobertaModel(RobertaConfig(**sizes)))
    assert not is_plain_bert(None)
