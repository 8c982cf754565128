"""Weights in partitions on two real ranks: equal to the files or refused, and never a whole copy on one rank."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mta_ds.errors import UserError
from mta_ds.launch.local import rank_environment
from mta_ds.models import load_pretrained, verify_weights
from mta_ds.models.verify import tensor_hash

CHANGED = "model.layers.1.mlp.up_proj.weight"

# each rank of the test below: load partitioned, verify, see a changed file, then load what does not match
RANK = """
import json, sys
from pathlib import Path
from mta_ds.engine import distributed
from mta_ds.errors import UserError
from mta_ds.models import load_pretrained, verify_weights
from mta_ds.models.zero import teacher_config
folder, output = map(Path, sys.argv[1:])
distributed.initialise()
def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon:")).split()[1])
before = anonymous()
model = load_pretrained(folder, "float32", teacher_config(None, "float32", 1))
held = anonymous() - before
here = sum(p.ds_tensor.numel() for p in model.parameters())
compared = verify_weights(model, folder)
try:
    verify_weights(model, folder.parent / "changed")
    error = None
except UserError as found:
    error = str(found)
row = {"held": held, "here": here, "compared": compared, "error": error}
for name in ("missing", "unexpected", "mismatched"):
    try:
        load_pretrained(folder.parent / name, "float32", teacher_config(None, "float32", 1))
    except UserError as found:
        row[name] = str(found)
(output / str(distributed.rank())).write_text(json.dumps(row))
distributed.shutdown()
"""


def make_model(folder: Path, **options: int) -> AutoModelForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3} | options
    config = AutoConfig.for_model("llama", vocab_size=101, num_key_value_heads=1, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="40MB")
    return model


def change(source: Path, folder: Path, alter: Callable[[dict[str, Tensor]], None]) -> None:
    """A copy of a model whose file with ``CHANGED`` holds what ``alter`` makes of its tensors."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if CHANGED in tensors:
            alter(tensors)
            save_file(tensors, file, {"format": "pt"})


def flip_a_bit(tensors: dict[str, Tensor]) -> None:
    tensors[CHANGED].view(-1)[3:4].view(torch.int32).bitwise_xor_(1)


def add_another(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.other"] = tensors[CHANGED].clone()


def cut_a_row(tensors: dict[str, Tensor]) -> None:
    tensors[CHANGED] = tensors[CHANGED][1:].clone()


def test_two_ranks_hold_half_each_and_it_is_the_files(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 12}
    model = make_model(tmp_path / "model", **sizes)
    change(tmp_path / "model", tmp_path / "changed", flip_a_bit)
    make_model(tmp_path / "small")
    change(tmp_path / "small", tmp_path / "missing", lambda tensors: tensors.pop(CHANGED))
    change(tmp_path / "small", tmp_path / "unexpected", add_another)
    change(tmp_path / "small", tmp_path / "mismatched", cut_a_row)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    (tmp_path / "rows").mkdir()
    command = [sys.executable, "-c", RANK, str(tmp_path / "model"), str(tmp_path / "rows")]
    ranks = [subprocess.Popen(command, env=rank_environment(rank, 2, port)) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    total = sum(parameter.numel() for parameter in model.parameters())
    for rank in range(2):
        row = json.loads((tmp_path / "rows" / str(rank)).read_text())
        assert row["here"] == pytest.approx(total / 2, rel=1e-3)
        # a whole copy would be 4 · total = 160 MB; a few MB are DeepSpeed's and the file headers'
        assert row["held"] < 4 * total / 2 + 45e6 < 4 * total
        assert row["compared"] == len(list(model.parameters()))
        assert f"1 of 111 weights are not those of the files (first: '{CHANGED}'" in row["error"]
        for name, first in (("missing", CHANGED), ("unexpected", "model.layers.1.other"), ("mismatched", CHANGED)):
            assert f"weights do not match the model: 1 {name} (first: " in row[name] and first in row[name], row


@pytest.mark.parametrize("tied", [True, False])
def test_whole_models_and_tied_weights(tmp_path: Path, tied: bool) -> None:
    make_model(tmp_path / "model", tie_word_embeddings=tied)
    model = load_pretrained(tmp_path / "model", "float32")
    assert verify_weights(model, tmp_path / "model") == len(list(model.parameters()))
    with torch.no_grad():
        model.model.norm.weight[5] = torch.nan
    with pytest.raises(UserError, match=r"first: 'model\.norm\.weight' differs"):
        verify_weights(model, tmp_path / "model")


def test_the_files_are_read_in_the_models_dtype(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    assert verify_weights(load_pretrained(tmp_path / "model", "bfloat16"), tmp_path / "model") > 0


def test_another_name_in_the_files_is_no_match(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    model = load_pretrained(tmp_path / "model", "float32")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.other.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"'model\.norm\.weight' has another name"):
        verify_weights(model, tmp_path / "model")


def test_a_hash_sees_signs_of_zero_and_shapes_of_memory() -> None:
    zero = torch.zeros(3)
    assert tensor_hash(zero) != tensor_hash(-zero)
    matrix = torch.arange(6.0).reshape(2, 3)
    assert tensor_hash(matrix.T) == tensor_hash(matrix.T.contiguous()) != tensor_hash(matrix)
