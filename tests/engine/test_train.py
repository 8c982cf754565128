"""The training stage for real: DeepSpeed engines, one rank and two, against a plain PyTorch loop and each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import assert_same_run, broken_teacher, plain_losses, run_command, train, write_config
from torch import nn
from transformers import AutoModelForCausalLM

from mta_ds.config import load
from mta_ds.data import SpanStore, StepLoader, build_dataset
from mta_ds.engine import RunConfig
from mta_ds.engine.pair import prepare_pair
from mta_ds.engine.setup import set_seed
from mta_ds.losses import MTALoss
from mta_ds.models import CausalBody, load_pretrained, load_tokenizer

STEPS = 3


@pytest.fixture(scope="session")
def one_rank(pair: Path, tmp_path_factory: pytest.TempPathFactory):
    """The reference run: one rank, four sequences a step."""
    run_dir = tmp_path_factory.mktemp("one")
    return run_dir, *train(pair, run_dir, 1)


def plain_loop(config: RunConfig) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The same run without DeepSpeed and without streaming: full logits, autograd, all hidden states in lists."""
    pair = prepare_pair(config)
    tokenizer = load_tokenizer(pair.student_dir)
    assert config.data.spans is not None
    store = SpanStore.open(config.data.spans)
    dataset = build_dataset(config.data.train, config.data, tokenizer, store, config.run_dir / "plain")
    loader = StepLoader(dataset, 0, config.train.seed, 4, 1, 0, 1)
    set_seed(config.train.seed)
    student = load_pretrained(pair.student_dir, "float32")
    teacher = load_pretrained(pair.teacher_dir, "float32").eval()
    bodies = []
    for model, layers in (
        (student, [k.student for k in pair.key_layers]),
        (teacher, [k.teacher for k in pair.key_layers]),
    ):
        body = CausalBody(model, layers)
        body.register_taps()
        bodies.append(body)
    mta = MTALoss(16, 24, [k.granularity for k in pair.key_layers], config.mta)
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "lr": 1e-3, "weight_decay": 0.01},
            {"params": vectors, "lr": 1e-3, "weight_decay": 0.0},
            {"params": mta.parameters(), "lr": 1e-3, "weight_decay": 0.01},
        ]
    )
    peaks = [1e-3, 1e-3, 1e-3]
    rows = []
    for step in range(1, STEPS + 1):
        (batch,) = loader.next_step()
        base, structural, values = plain_losses(bodies, mta, batch, pair.vocab_size)
        loss = base + structural
        optimizer.zero_grad()
        loss.backward()
        parameters = [*student.parameters(), *mta.parameters()]
        norm = nn.utils.clip_grad_norm_(parameters, 0.5)
        factor = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - 1) / STEPS))).item()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        optimizer.step()
        row = {"step": step, "loss": loss.item(), "base": base.item(), "grad_norm": norm.item()}
        for i, key in enumerate(pair.key_layers):
            row |= {f"dsa/{key.student}": values[f"dsa/{i}"].item(), f"hid/{key.student}": values[f"hid/{i}"].item()}
        rows.append(row)
    return rows, student.state_dict()


def test_engine_equals_a_plain_loop(one_rank) -> None:
    assert_equals_a_plain_loop(*one_rank)


def test_two_ranks_with_the_teachers_entropy_equal_a_plain_loop(pair: Path, tmp_path: Path) -> None:
    by_entropy = {"mta__teacher_weights": "entropy", "mta__student_weights": "teacher"}
    run = train(pair, tmp_path, 2, **by_entropy, train__micro_batch_size=2)
    assert_equals_a_plain_loop(tmp_path, *run)


def assert_equals_a_plain_loop(run_dir: Path, metrics: list[dict[str, float]], weights: dict) -> None:
    rows, expected = plain_loop(load(run_dir / "run.yaml", RunConfig))
    logged = [row for row in metrics if "loss" in row]
    assert len(logged) == STEPS
    for ours, theirs in zip(logged, rows, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (ours["step"], name)
    for name, value in expected.items():
        assert torch.allclose(weights[name], value, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize(
    ("nproc", "changes"),
    [
        (2, {"train__micro_batch_size": 2}),
        (1, {"train__micro_batch_size": 2, "train__gradient_accumulation_steps": 2}),
        (
            2,
            {
                "train__micro_batch_size": 1,
                "train__gradient_accumulation_steps": 2,
                "train__gradient_checkpointing": True,
            },
        ),
        (1, {"train__micro_batch_size": 1, "train__gradient_accumulation_steps": 4}),
        (2, {"train__micro_batch_size": 2, "student__deepspeed": "stage1"}),
        (2, {"train__micro_batch_size": 2, "student__deepspeed": "stage2"}),
    ],
    ids=["ranks", "accumulation", "both-checkpointed", "one-by-one", "zero1", "zero2"],
)
def test_a_step_does_not_depend_on_how_it_is_split(pair, one_rank, tmp_path: Path, nproc: int, changes: dict) -> None:
    stage = changes.get("student__deepspeed")
    if stage is not None:
        file = tmp_path / "ds.json"
        file.write_text(f'{{"zero_optimization": {{"stage": {stage[-1]}, "reduce_bucket_size": 100000}}}}')
        changes = changes | {"student__deepspeed": str(file)}
    assert_same_run(train(pair, tmp_path, nproc, **changes), one_rank[1:])


def test_weighted_mean_does_not_depend_on_the_ranks(pair: Path, tmp_path: Path) -> None:
    runs = [
        train(pair, tmp_path / str(n), n, mta__reduction="weighted_mean", train__micro_batch_size=4 // n)
        for n in (1, 2)
    ]
    assert_same_run(*runs)


def test_without_mta_and_with_sft(pair: Path, tmp_path: Path) -> None:
    metrics, _ = train(pair, tmp_path, 1, mta=None, loss={"divergence": "sft"}, data__spans=None)
    rows = [row for row in metrics if "loss" in row]
    assert all(row["loss"] == row["base"] and row["dsa"] == row["hid"] == 0 for row in rows)


def test_teacher_cut_after_its_last_key_layer_gives_the_same_alignment(pair: Path, one_rank, tmp_path: Path) -> None:
    layers = {"student_layers": [1, 2], "teacher_layers": [2, 4]}
    first = []
    for name, changes in (
        ("whole", {"loss": {"divergence": "fkl"}}),
        ("cut", {"loss": {"divergence": "sft"}, "data__validation": []}),
    ):
        metrics, _ = train(pair, tmp_path / name, 1, mta=layers, train__steps=1, **changes)
        first.append(next(row for row in metrics if "loss" in row))
    for key in ("dsa/1", "hid/1", "dsa/2", "hid/2"):
        assert first[0][key] == first[1][key] != 0


def test_a_state_that_is_not_finite_is_named(pair: Path, tmp_path: Path) -> None:
    teacher = broken_teacher(pair, tmp_path / "teacher")
    path = write_config(pair, tmp_path / "run", teacher__path=str(teacher))
    done = run_command("train", path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "step 1: NaN or Inf in the hidden state of layer 5 of the teacher, rank 0, records " in done.stderr
    assert "no weight was changed" in done.stderr


def test_export_reloads_with_equal_logits_and_tied_weights(pair: Path, one_rank) -> None:
    run_dir, _, weights = one_rank
    model = load_pretrained(run_dir / "export", "float32").eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    again = AutoModelForCausalLM.from_pretrained(run_dir / "export").eval()
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    card = (run_dir / "export" / "README.md").read_text()
    assert f"| teacher | {pair / 'teacher'} |" in card and "held-out kl" in card and "λ_DSA 2" in card
    assert (run_dir / "export" / "generation_config.json").is_file()
    start = load_pretrained(pair / "student", "float32")
    assert not torch.allclose(start.state_dict()["model.norm.weight"], weights["model.norm.weight"])
