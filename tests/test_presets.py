"""The presets: their settings are the paper's, and ``mta-ds check`` passes each with models of its pair's shape."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from support import DEMO, train_tokenizer
from transformers import AutoConfig

from mta_ds.config import load
from mta_ds.engine import RunConfig, check
from mta_ds.spans.parse import ParseConfig, parse

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "configs"
METHODS = ("fdd", "distillm", "distillm2")

# METHOD §7, read off the paper's tables: lr, batch, epochs; λ_DSA, λ_Hid; student and teacher layers.
RECIPES = {
    ("gpt2", "fdd"): (1e-4, 16, 5),
    ("gpt2", "distillm"): (1e-4, 16, 5),
    ("gpt2", "distillm2"): (1e-4, 16, 5),
    ("qwen1.5", "fdd"): (1e-4, 8, 5),
    ("qwen1.5", "distillm"): (1e-4, 8, 5),
    ("qwen1.5", "distillm2"): (5e-5, 8, 5),
    ("opt", "fdd"): (5e-4, 8, 5),
    ("opt", "distillm"): (5e-4, 8, 5),
    ("opt", "distillm2"): (5e-4, 8, 3),
}
LAMBDAS = {"gpt2": (2.0, 0.2), "qwen1.5": (2.0, 0.2), "opt": (3.0, 0.3)}
QWEN_LAYERS = (14, 16, 18, 20, 22, 24)
LAYERS = {
    "gpt2": ((6, 9, 12), (24, 36, 48)),
    "qwen1.5": (QWEN_LAYERS, QWEN_LAYERS),
    "opt": ((16, 18, 20, 22, 24), (20, 23, 26, 29, 32)),
}
FDD_LAYERS = LAYERS | {"gpt2": ((4, 6, 8), (16, 24, 32)), "qwen1.5": ((4, 8, 16), (4, 8, 16))}
# METHOD §9: Dolly, Self-Instruct, Vicuna, S-NI, without MTA and with it
SCORES = {
    ("gpt2", "fdd"): ("25.47 12.45 16.44 23.54", "25.64 13.60 17.00 25.75"),
    ("gpt2", "distillm"): ("25.65 13.39 16.50 25.28", "25.77 14.19 16.67 29.18"),
    ("gpt2", "distillm2"): ("22.44 12.52 12.30 27.10", "24.76 14.16 14.28 26.54"),
    ("qwen1.5", "fdd"): ("25.08 12.24 16.08 23.69", "25.35 13.85 17.21 27.25"),
    ("qwen1.5", "distillm"): ("25.16 12.90 15.86 25.28", "25.61 13.08 16.04 29.32"),
    ("qwen1.5", "distillm2"): ("27.48 17.95 17.14 30.99", "27.93 18.87 18.63 33.49"),
    ("opt", "fdd"): ("26.07 14.82 17.09 28.98", "26.49 16.47 17.51 31.12"),
    ("opt", "distillm"): ("27.87 15.99 18.02 30.02", "27.43 17.07 18.40 32.97"),
    ("opt", "distillm2"): ("26.31 17.62 17.60 30.85", "26.79 18.16 16.55 31.39"),
}
PAPER = [(pair, method, mta) for pair, method in RECIPES for mta in (False, True)]
OTHERS = ["gpt2-sft", "gpt2-seqkd", "qwen1.5-sft", "qwen1.5-seqkd", "opt-sft", "opt-seqkd", "8b-to-1b", "70b-to-8b"]

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_positions": 1024}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
QWEN = LLAMA | {"model_type": "qwen2", "num_hidden_layers": 24, "vocab_size": 512}  # padded, as the real one
OPT = {"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_attention_heads": 2}
# the published depths, teacher and student; everything else tiny
SHAPES = {
    "gpt2": (GPT2 | {"n_layer": 48, "n_embd": 24}, GPT2 | {"n_layer": 12}),
    "qwen1.5": (QWEN | {"hidden_size": 24}, QWEN),
    "opt": (
        OPT | {"num_hidden_layers": 32, "hidden_size": 24, "word_embed_proj_dim": 24},
        OPT | {"num_hidden_layers": 24},
    ),
    "8b": (LLAMA | {"model_type": "llama", "num_hidden_layers": 32}, LLAMA | {"num_hidden_layers": 16}),
    "70b": (LLAMA | {"model_type": "llama", "num_hidden_layers": 80}, LLAMA | {"num_hidden_layers": 32}),
}


def name_of(pair: str, method: str, mta: bool) -> str:
    return f"{pair}-{method}{'-mta' if mta else ''}"


ALL = [name_of(*case) for case in PAPER] + OTHERS


def preset(name: str, *overrides: str) -> RunConfig:
    return load(FOLDER / f"{name}.yaml", RunConfig, overrides)


def make_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_presets", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_holds_these_presets_and_no_other() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(ALL)


def test_the_papers_presets_are_what_the_script_writes() -> None:
    made = make_script().presets()
    assert sorted(made) == sorted(f"{name}.yaml" for name in ALL if "-to-" not in name)
    for file, content in made.items():
        assert (FOLDER / file).read_text(encoding="utf-8") == content, file


@pytest.mark.parametrize(("pair", "method", "mta"), PAPER, ids=[name_of(*case) for case in PAPER])
def test_settings_are_the_papers(pair: str, method: str, mta: bool) -> None:
    config = preset(name_of(pair, method, mta))
    train, data, loss = config.train, config.data, config.loss
    assert (train.lr, train.micro_batch_size * train.gradient_accumulation_steps, train.epochs) == RECIPES[pair, method]
    assert (data.max_length, data.max_prompt_length, data.template) == (256, 128, "minillm")
    assert (train.schedule, train.weight_decay, train.gradient_clipping) == ("cosine", 0.01, 1.0)
    assert (config.student.lora is not None) == (pair == "opt")
    assert config.student.path == f"runs/{pair}-sft/export"  # students start from an SFT checkpoint
    assert loss.method == method
    if method == "fdd":
        assert (loss.student_layers, loss.teacher_layers) == FDD_LAYERS[pair]
        assert (loss.temperature, loss.weight) == (2.0 if mta else 5.0, 1.0)
    elif method == "distillm":
        assert (loss.divergence, loss.alpha, loss.kd_ratio, loss.schedule) == ("srkl", 0.1, 1.0, "decreasing")
        assert (loss.initial_phi, loss.phi_step, loss.tolerance, loss.buffer_size) == (0.0, 0.1, 0.1, 1000)
        assert (loss.rollouts.temperature, loss.rollouts.top_p, loss.rollouts.top_k) == (1.0, 1.0, 0)
        assert train.validate_every is None  # once an epoch
    else:
        assert (loss.alpha, loss.alpha_curriculum, loss.beta_curriculum) == (0.1, True, True)
        assert loss.regenerate == "both"
        assert (config.generation.temperature, config.generation.top_p, config.generation.do_sample) == (1.0, 1.0, True)
    assert SCORES[pair, method][mta] in (FOLDER / f"{name_of(pair, method, mta)}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("pair", "method"), RECIPES)
def test_mta_settings_are_the_papers_and_all_that_it_adds(pair: str, method: str) -> None:
    plain, config = preset(name_of(pair, method, False)), preset(name_of(pair, method, True))
    mta, units = config.mta, config.data.units
    assert mta is not None and plain.mta is None
    assert (mta.lambda_dsa, mta.lambda_hid) == LAMBDAS[pair]
    assert (mta.student_layers, mta.teacher_layers) == (FDD_LAYERS if method == "fdd" else LAYERS)[pair]
    assert (mta.num_word_layers, mta.projection_lr, mta.reduction) == (1, 5e-4, "weighted_mean")
    assert (units.fields, units.words, units.labels, mta.student_weights) == ("all", "in_phrases", ("NP", "VP"), "own")
    assert plain.train == config.train and plain.evaluation == config.evaluation and plain.student == config.student
    assert plain.data == config.data.model_copy(update={"spans": None})
    if config.regenerates:  # and parses what it has written: nobody reads other spans
        assert config.parse is None and config.data.spans is None
    else:
        assert config.parse is not None and config.parse.output == config.data.spans
        assert config.parse.inputs == config.data.train


@pytest.mark.parametrize("name", [name for name in ALL if "-to-" not in name])
def test_evaluation_is_the_protocol(name: str) -> None:
    evaluation = preset(name).evaluation
    assert evaluation.seeds == (10, 20, 30, 40, 50)
    assert (evaluation.max_prompt_length, evaluation.max_length) == (256, 512)
    assert (evaluation.do_sample, evaluation.temperature, evaluation.top_p, evaluation.top_k) == (True, 1.0, 1.0, 0)
    assert evaluation.no_repeat_ngram_size is None


@pytest.mark.parametrize("pair", LAMBDAS)
def test_the_stages_fit_one_another(pair: str) -> None:
    sft, seqkd, distillm2 = preset(f"{pair}-sft"), preset(f"{pair}-seqkd"), preset(f"{pair}-distillm2")
    assert sft.loss.divergence == seqkd.loss.divergence == "sft" and sft.mta is None and seqkd.mta is None
    assert distillm2.student.path == f"{sft.run_dir}/export"
    assert seqkd.data.train == (f"{seqkd.run_dir}/generated/teacher",)  # where generate writes unless told
    assert seqkd.generation.inputs == distillm2.data.train == sft.data.train
    for other in (sft, seqkd):
        assert not other.data.validation  # else SFT would load the teacher, for nothing but a figure
        assert other.train.micro_batch_size == distillm2.train.micro_batch_size
    for generating in (seqkd, distillm2):
        assert generating.generation.max_length == generating.data.max_length


@pytest.mark.parametrize("name", ["8b-to-1b", "70b-to-8b"])
def test_presets_for_clusters(name: str) -> None:
    config = preset(name)
    assert config.train.dtype == "bfloat16" and config.train.gradient_checkpointing
    for side in (config.teacher, config.student):
        assert json.loads((ROOT / side.deepspeed).read_text())["zero_optimization"]["stage"] == 3
    assert config.mta is not None and len(config.mta.student_layers or ()) == 5
    assert config.mta.reduction == "sequence_mean" and config.train.save_every and config.parse is not None


CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models of every shape (configuration and tokenizer), records, and a store of their spans."""
    root = tmp_path_factory.mktemp("presets")
    rows = [json.loads(line) for line in (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:6]]
    tokenizer = train_tokenizer("\n".join(row["output"] for row in rows))
    tokenizer.chat_template = CHAT
    for shape, sides in SHAPES.items():
        for side, values in zip(("teacher", "student"), sides, strict=True):
            values = {"model_type": "llama", "vocab_size": len(tokenizer)} | values
            AutoConfig.for_model(**values, bos_token_id=0, eos_token_id=0).save_pretrained(root / shape / side)
            tokenizer.save_pretrained(root / shape / side)
    write_rows(root / "train.jsonl", rows[:4])
    write_rows(root / "heldout.jsonl", rows[4:])
    parse(ParseConfig(inputs=(str(root / "train.jsonl"),), output=root / "spans", workers=1))
    return root


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("name", ALL)
def test_check_passes(
    name: str, stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan of each preset, given paths on the command line and nothing else."""
    monkeypatch.chdir(ROOT)  # presets name ds_configs/ from the project's folder
    models = stand_ins / name.split("-")[0]
    given = preset(name)
    overrides = [f"run_dir={tmp_path}", f"teacher.path={models}/teacher", f"student.path={models}/student"]
    overrides += [f"data.train=[{stand_ins}/train.jsonl]"]
    overrides += [f"data.validation=[{stand_ins}/heldout.jsonl]"] * bool(given.data.validation)
    overrides += [f"data.spans={stand_ins}/spans"] * (given.data.spans is not None)
    config = preset(name, *overrides)
    check(config)
    plan = plan_of(capsys.readouterr().out)
    batch = config.train.micro_batch_size * config.train.gradient_accumulation_steps
    is_pair = config.loss.method == "distillm2"
    assert plan["batch"].startswith(f"{batch} pairs a step ({2 * batch} sequences) = " if is_pair else f"{batch} seq")
    # of text that is not written yet nothing is known
    assert ("padding" in plan) == ("with a label" in plan["training data"]) == (not config.regenerates)
    assert "validation spans" not in plan
    assert plan["precision"] == f"bfloat16, student ZeRO-{3 if '-to-' in name else 2}, teacher ZeRO-3"
    assert plan["base loss"].startswith(config.loss.method)
    assert plan["trained"].startswith("LoRA" if config.student.lora is not None else "all")
    if config.mta is None:
        assert plan["MTA"] == "off" and "key layers" not in plan and "training spans" not in plan
        return
    expected = "those of the texts that are written" if config.regenerates else "100.0 % of the records have spans"
    assert plan["training spans"].startswith(expected)
    layers = zip(config.mta.student_layers or (), config.mta.teacher_layers or (), strict=True)
    pairs = [f"{s} ← {t} ({'phrases' if i else 'words'})" for i, (s, t) in enumerate(layers)]
    assert plan["key layers"] == f"student ← teacher: {', '.join(pairs)}"


def plan_of(out: str) -> dict[str, str]:
    """The rows of the table that ``check`` prints; a long value goes on in the next line."""
    plan: dict[str, str] = {}
    name = ""
    for line in out.splitlines():
        if line.startswith("│"):
            left, right = (cell.strip() for cell in line.strip("│").split("│"))
            name = left or name
            plan[name] = f"{plan.get(name, '')} {right}".strip()
    return plan
