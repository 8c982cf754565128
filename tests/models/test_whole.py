"""A whole model out of two ranks' partitions: the values it has, adapters merged, and the text that it writes.

As a program, with the folder of a pair: one of the ranks.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from support import CPU_TEST
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mta_ds.engine import distributed
from mta_ds.errors import UserError
from mta_ds.evaluation import GenerationConfig, generate
from mta_ds.launch.local import rank_environment
from mta_ds.models import (
    LoraConfig,
    adapter_parameters,
    inject_adapters,
    load_pretrained,
    load_tokenizer,
    plain_parameters,
    student_config,
    whole_copy,
)


def test_a_whole_model_is_itself(pair: Path) -> None:
    model = load_pretrained(pair / "student", "float32")
    with whole_copy(model) as copy:
        assert copy is model


def test_two_ranks_partitions(pair: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(pair)],
            env=rank_environment(rank, 2, port) | {"PYTHONPATH": ":".join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=550)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told[0][-2000:]


def test_a_copy_that_its_gpu_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=40, **sizes))
    for parameter in model.parameters():  # as a partition says it
        parameter.ds_id, parameter.ds_numel = 0, 10**9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**10))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2 * 10**9)
    told = r"LlamaForCausalLM: whole, .* 84\.0 GB, and 2\.0 GB of this rank's GPU"
    with pytest.raises(UserError, match=told) as error, whole_copy(model):
        pass
    assert "\n" not in str(error.value)


def check_copies(folder: Path) -> None:
    """On one rank: partition a model, with and without adapters, and compare its whole copy with the model itself."""
    tokenizer = load_tokenizer(folder)
    config = student_config(CPU_TEST, "float32", 1, 1, 2, 1.0)
    prompts, settings = [[5, 6, 7], [8, 9]], GenerationConfig(max_length=16)
    for lora in (None, LoraConfig(r=2, alpha=7)):
        model, plain = load_pretrained(folder, "float32", config), load_pretrained(folder, "float32")
        if lora is not None:
            for each in (model, plain):
                inject_adapters(each, lora, seed=0, base="")
                disturb(each)
        deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
        expected = {name: value() for names, value in plain_parameters(plain) for name in names}
        with whole_copy(model) as copy:
            assert type(copy) is type(plain) and not copy.training
            found = dict(copy.named_parameters(remove_duplicate=False))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
            tied = plain.config.tie_word_embeddings
            assert (copy.get_output_embeddings().weight is copy.get_input_embeddings().weight) == tied
            ours = generate(copy, tokenizer, prompts, settings)  # ranks need not meet in here
        assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
        if lora is None:
            assert ours == generate(plain, tokenizer, prompts, settings)


def disturb(model: PreTrainedModel) -> None:
    """B is zero at first, and would hide that adapters were left out."""
    parameters = list(adapter_parameters(model).values())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0), torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


if __name__ == "__main__":
    distributed.initialise()
    for name in ("teacher", "student"):  # untied and tied
        check_copies(Path(sys.argv[1]) / name)
    distributed.shutdown()
