"""LoRA for real: a student with adapters and a teacher with one merged, against a plain PyTorch loop with peft."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import assert_same_run, plain_losses, run_command, train, write_config
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mta_ds.config import load
from mta_ds.data import SpanStore, StepLoader, build_dataset
from mta_ds.engine import RunConfig, check
from mta_ds.engine.pair import prepare_pair, teacher_folder
from mta_ds.engine.setup import set_seed, switch_dropout_off
from mta_ds.errors import UserError
from mta_ds.losses import MTALoss
from mta_ds.models import CausalBody, LoraConfig, inject_adapters, load_pretrained, load_tokenizer

STEPS = 3
LORA = {"r": 3, "alpha": 7, "dropout": 0.5}
IDS = torch.arange(12)[None]
Result = tuple[Path, list[dict[str, float]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def adapter(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA adapter of the tiny teacher."""
    folder = tmp_path_factory.mktemp("adapter")
    teacher = load_pretrained(pair / "teacher", "float32")
    adapted = peft.get_peft_model(teacher, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["v_proj"]))
    torch.manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.4)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(pair: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The reference run: one rank, four sequences a step, ZeRO-3 on both sides."""
    run_dir = tmp_path_factory.mktemp("one")
    return run_dir, *train(pair, run_dir, 1, student__lora=LORA, teacher__adapter=str(adapter))


@pytest.fixture(scope="module")
def two_ranks(pair: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The same steps, split in every way: ranks, accumulation, recomputed layers; checkpoints on the way."""
    split = {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "save_every": 1}
    changes = {f"train__{name}": value for name, value in split.items()}
    run_dir = tmp_path_factory.mktemp("two")
    return run_dir, *train(pair, run_dir, 2, student__lora=LORA, teacher__adapter=str(adapter), **changes)


def plain_loop(config: RunConfig, adapter: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The run without DeepSpeed, streaming or our adapters: peft's own models, full logits, hidden states in lists."""
    pair = prepare_pair(config)
    assert config.data.spans is not None
    store = SpanStore.open(config.data.spans)
    tokenizer = load_tokenizer(pair.student_dir)
    dataset = build_dataset(config.data.train, config.data, tokenizer, store, config.run_dir / "plain")
    loader = StepLoader(dataset, 0, config.train.seed, 4, 1, 0, 1)
    base = AutoModelForCausalLM.from_pretrained(config.teacher.path, dtype=torch.float32)
    teacher = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
    set_seed(config.train.seed)
    student = AutoModelForCausalLM.from_pretrained(pair.student_dir, dtype=torch.float32)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, target_modules="all-linear")
    adapted = peft.get_peft_model(student, lora)
    set_seed(config.train.seed)
    mta = MTALoss(16, 24, [k.granularity for k in pair.key_layers], config.mta)
    bodies = (
        CausalBody(student, [k.student for k in pair.key_layers]),
        CausalBody(teacher, [k.teacher for k in pair.key_layers]),
    )
    trained = [p for p in adapted.parameters() if p.requires_grad]
    groups = [{"params": parameters, "lr": 1e-3, "weight_decay": 0.01} for parameters in (trained, mta.parameters())]
    optimizer = torch.optim.AdamW(groups)
    for body in bodies:
        body.register_taps()
    rows = []
    for step in range(1, STEPS + 1):
        (batch,) = loader.next_step()
        base_loss, structural, _ = plain_losses(bodies, mta, batch, pair.vocab_size)
        loss = base_loss + structural
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([*trained, *mta.parameters()], 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - 1) / STEPS))).item()
        optimizer.step()
        rows.append({"step": step, "loss": loss.item(), "base": base_loss.item(), "grad_norm": norm.item()})
    return rows, adapted.merge_and_unload().state_dict()


def test_run_equals_a_plain_loop_with_peft(one_rank: Result, adapter: Path) -> None:
    run_dir, metrics, weights = one_rank
    rows, expected = plain_loop(load(run_dir / "run.yaml", RunConfig), adapter)
    logged = [row for row in metrics if "loss" in row]
    assert len(logged) == STEPS
    for ours, theirs in zip(logged, rows, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_step_does_not_depend_on_how_it_is_split(one_rank: Result, two_ranks: Result) -> None:
    assert_same_run(two_ranks[1:], one_rank[1:])


def test_zero2_stopped_and_resumed_is_the_same_run(pair: Path, one_rank: Result, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 100000}}')
    options = {"student__deepspeed": str(file), "student__lora": LORA, "teacher__adapter": str(adapter)}
    options["train__micro_batch_size"] = 2
    path = write_config(pair, tmp_path, **options)
    stopped = run_command("train", path, "train.max_minutes=1e-9", "--nproc", 2, check=False)
    assert stopped.returncode == 75, stopped.stderr
    assert_leaves_frozen_weights_out(tmp_path / "checkpoints" / "step-00000001")
    assert_same_run(train(pair, tmp_path, 2, **options), one_rank[1:])


def test_export_is_the_merged_model_and_the_adapter(pair: Path, one_rank: Result) -> None:
    export = one_rank[0] / "export"
    merged = load_pretrained(export, "float32").eval()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(export / "adapter").eval()
    assert adapted.peft_config["default"].base_model_name_or_path == str(pair / "student")
    torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=1e-5, atol=1e-5)
    start = load_pretrained(pair / "student", "float32").eval()
    assert not torch.allclose(merged(IDS).logits, start(IDS).logits, atol=1e-3)
    frozen = start.state_dict()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, frozen[name]) == ("_proj" not in name), name


def test_a_resumed_run_ends_as_one_that_was_not_stopped(two_ranks: Result, tmp_path: Path) -> None:
    undisturbed, run_dir = two_ranks[0], tmp_path / "again"
    shutil.copytree(undisturbed, run_dir)
    path = run_dir / "run.yaml"
    path.write_text(path.read_text().replace(str(undisturbed), str(run_dir)))
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(run_dir / "export")
    done = run_command("train", path, "--nproc", 2)
    assert "resumed from" in done.stderr and f"step-{STEPS - 1:08d}" in done.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (run_dir / "export" / name).read_bytes() == (undisturbed / "export" / name).read_bytes(), name


def test_checkpoints_leave_the_frozen_weights_out(two_ranks: Result) -> None:
    assert_leaves_frozen_weights_out(two_ranks[0] / "checkpoints" / f"step-{STEPS:08d}")


def assert_leaves_frozen_weights_out(checkpoint: Path) -> None:
    for shard in sorted(checkpoint.glob("shard-*")):
        names = load_file(shard).keys()
        assert all(".base_layer." not in name for name in names)
        assert any(".lora_A." in name for name in names) and any(name.startswith("exp_avg/") for name in names)


def test_check_tells_what_is_trained(
    pair: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(pair, tmp_path, student__lora=LORA, teacher__adapter=str(adapter))
    check(load(path, RunConfig))
    out = capsys.readouterr().out
    assert "LoRA adapters of 21 modules (all-linear): rank 3, alpha 7, dropout off; " in out
    student = load_pretrained(pair / "student", "float32")
    inject_adapters(student, LoraConfig(**LORA), 0, "")
    assert f"{sum(p.numel() for p in student.parameters() if p.requires_grad):,} parameters" in out
    assert f"{tmp_path}/cache/teacher-merged-" in " ".join(out.split())


def test_the_runs_teacher_is_the_merged_one_everywhere(pair: Path, adapter: Path, tmp_path: Path) -> None:
    config = load(write_config(pair, tmp_path, teacher__adapter=str(adapter)), RunConfig)
    folder = teacher_folder(config)
    assert prepare_pair(config).teacher_dir == folder
    base = AutoModelForCausalLM.from_pretrained(pair / "teacher")
    expected = peft.PeftModel.from_pretrained(base, adapter).eval()
    merged: PreTrainedModel = load_pretrained(folder, "float32").eval()
    torch.testing.assert_close(merged(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-5)
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(pair / "teacher").get_vocab()


def test_dropout_of_adapters_obeys_the_runs(pair: Path) -> None:
    student = load_pretrained(pair / "student", "float32")
    inject_adapters(student, LoraConfig(**LORA), 0, "")
    dropouts = [m for m in student.modules() if isinstance(m, nn.Dropout)]
    assert len(dropouts) == 21 and all(m.p == 0.5 for m in dropouts)
    switch_dropout_off(student)
    assert all(m.p == 0.0 for m in dropouts)


def test_wrong_targets_are_told_before_the_data_is_read(pair: Path, tmp_path: Path) -> None:
    path = write_config(pair, tmp_path, student__lora={"targets": ["c_attn"]}, data__train=["/nowhere.jsonl"])
    with pytest.raises(UserError, match=r"student\.lora\.targets: .*choose from down_proj, gate_proj"):
        check(load(path, RunConfig))
