"""What tests of whole stages share: a tiny pair of models on real records and parses, and commands run for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mta_ds.data import Batch
from mta_ds.losses import MTALoss, entropy_weights
from mta_ds.models import ragged
from mta_ds.spans.parse import ParseConfig, parse

DEMO = Path(__file__).parents[1] / "mta_ds" / "assets" / "demo"
GPT2 = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "gpt2"
# everything is partitioned and nothing kept gathered, else ZeRO-3's mistakes hide in models this small
CPU_TEST = Path(__file__).parents[1] / "ds_configs" / "cpu_test.json"
SIZES = {
    "teacher": {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 6},
    "student": {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3},
}


def make_pair(root: Path) -> Path:
    """Fill ``root`` with teacher/, student/, train.jsonl, heldout.jsonl and spans/."""
    for name, count in (("train", 24), ("heldout", 5)):
        lines = (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer((root / "train.jsonl").read_text(encoding="utf-8"))
    for seed, (name, sizes) in enumerate(SIZES.items()):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            "llama",
            vocab_size=len(tokenizer) + 4 * seed,  # padded differently on each side
            num_key_value_heads=1,
            tie_word_embeddings=name == "student",
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.2,
            **sizes,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    parse(ParseConfig(inputs=(str(root / "train.jsonl"), str(root / "heldout.jsonl")), output=root / "spans"))
    return root


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


def write_config(pair: Path, run_dir: Path, **changes: object) -> Path:
    """A run's YAML for the tiny pair; ``changes`` are dotted keys with "__" for the dot."""
    values: dict = {
        "run_dir": str(run_dir),
        "teacher": {"path": str(pair / "teacher"), "deepspeed": str(CPU_TEST)},
        "student": {"path": str(pair / "student"), "deepspeed": str(CPU_TEST)},
        "data": {
            "train": [str(pair / "train.jsonl")],
            "validation": [str(pair / "heldout.jsonl")],
            "spans": str(pair / "spans"),
            "max_length": 96,
            "max_prompt_length": 64,
        },
        "mta": {"num_layers": 2, "projection_lr": 1e-3},
        "train": {"steps": 3, "micro_batch_size": 4, "lr": 1e-3, "gradient_clipping": 0.5},
    }
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_command(
    *arguments: object, check: bool = True, extra: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """``mta-ds ARGUMENTS`` in a process of its own, one thread a rank; ``extra`` goes into its environment."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} | (extra or {})
    done = subprocess.run(
        [sys.executable, "-m", "mta_ds", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def train(pair: Path, run_dir: Path, nproc: int, **changes: object) -> tuple[list[dict[str, float]], dict]:
    """A whole training run; its metrics and the weights that it exports."""
    run_command("train", write_config(pair, run_dir, **changes), "--nproc", nproc)
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    return read_metrics(run_dir), model.state_dict()


def assert_same_run(a, b, tolerance: float = 1e-5) -> None:
    """Two results of :func:`train` have the same metrics and weights."""
    for ours, theirs in zip(a[0], b[0], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), (ours["step"], name)
    for name, weight in a[1].items():
        assert torch.allclose(weight.float(), b[1][name].float(), rtol=tolerance, atol=tolerance), name


def broken_teacher(pair: Path, folder: Path) -> Path:
    """A copy of the teacher with a NaN in layer 5's MLP, which layer 6's state is the first key layer to show."""
    shutil.copytree(pair / "teacher", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.4.mlp.down_proj.weight"][3, 3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plain_losses(bodies, mta: MTALoss, batch: Batch, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """KL(p ‖ q) from full logits, and MTA from all key layers in lists: student and teacher are ``bodies``."""
    states, finals = [], []
    for body in bodies:
        seen: dict[int, torch.Tensor] = {}
        with torch.set_grad_enabled(body is bodies[0]):
            final = body(batch.input_ids, batch.attention_mask, on_layer=seen.__setitem__)
            states.append([ragged(hidden, batch.valid) for hidden in seen.values()])
            finals.append(ragged(final, batch.valid) @ body.head[:vocab_size].T)
    counted = batch.targets != -100
    log_q, log_p = (logits.log_softmax(-1) for logits in finals)
    base = (log_p.exp() * (log_p - log_q)).sum(-1)[counted].mean()
    weights = None
    if mta.config.teacher_weights == "entropy":
        weights = entropy_weights(-(log_p.exp() * log_p).sum(-1), vocab_size, batch.cu_seqlens)
        states[1] = [hidden.bfloat16().float() for hidden in states[1]]  # as the engine keeps them until then
    return base, *mta(states[0], states[1], batch.cu_seqlens, batch.spans, teacher_weights=weights)


def gpt2_backend() -> Tokenizer:
    """GPT-2's real tokenizer; the test is skipped where its files are not beside the project."""
    if not GPT2.is_dir():
        pytest.skip("GPT-2's vocabulary is not beside the project")
    merges = [tuple(line.split()) for line in (GPT2 / "merges.txt").read_text("utf-8").splitlines()[1:] if line]
    backend = Tokenizer(models.BPE(json.loads((GPT2 / "vocab.json").read_text("utf-8")), merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
