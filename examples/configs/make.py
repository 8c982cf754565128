"""Write the presets of the paper's tables (MTA, ACL 2026): ``python examples/configs/make.py``.

Every file is one complete YAML, to be read, copied and changed by itself; here stands once what they have in common.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
METHODS = {"sft": "SFT", "seqkd": "SeqKD", "fdd": "FDD", "distillm": "DistiLLM", "distillm2": "DistiLLM-2"}
WITH_MTA = ("fdd", "distillm", "distillm2")
PARSES_ITSELF = ("distillm2",)  # its models write the text of every epoch, and the records' own is not read


class Pair(NamedTuple):
    """A student and a teacher of the paper, and their recipe."""

    title: str
    student: str
    teacher: str
    batch: int
    layers: tuple[list[int], list[int]]
    """Student's and teacher's key layers."""
    fdd_layers: tuple[list[int], list[int]]
    lambdas: tuple[str, str]
    lr: dict[str, str]
    """By method; "" is all others."""
    epochs: dict[str, int]
    lora: bool
    scores: dict[str, str]
    """Published ROUGE-L of each preset: Dolly, Self-Instruct, Vicuna, S-NI."""


PAIRS = {
    "gpt2": Pair(
        title="GPT-2 120M ← 1.5B",
        student="openai-community/gpt2",
        teacher="openai-community/gpt2-xl",
        batch=16,
        layers=([6, 9, 12], [24, 36, 48]),
        fdd_layers=([4, 6, 8], [16, 24, 32]),
        lambdas=("2.0", "0.2"),
        lr={"": "1.0e-4"},
        epochs={"": 5},
        lora=False,
        scores={
            "sft": "23.33 10.56 15.12 17.08",
            "fdd": "25.47 12.45 16.44 23.54",
            "fdd-mta": "25.64 13.60 17.00 25.75",
            "distillm": "25.65 13.39 16.50 25.28",
            "distillm-mta": "25.77 14.19 16.67 29.18",
            "distillm2": "22.44 12.52 12.30 27.10",
            "distillm2-mta": "24.76 14.16 14.28 26.54",
        },
    ),
    "qwen1.5": Pair(
        title="Qwen1.5 0.5B ← 1.8B",
        student="Qwen/Qwen1.5-0.5B",
        teacher="Qwen/Qwen1.5-1.8B",
        batch=8,
        layers=([14, 16, 18, 20, 22, 24], [14, 16, 18, 20, 22, 24]),
        fdd_layers=([4, 8, 16], [4, 8, 16]),
        lambdas=("2.0", "0.2"),
        lr={"": "1.0e-4", "distillm2": "5.0e-5"},
        epochs={"": 5},
        lora=False,
        scores={
            "fdd": "25.08 12.24 16.08 23.69",
            "fdd-mta": "25.35 13.85 17.21 27.25",
            "distillm": "25.16 12.90 15.86 25.28",
            "distillm-mta": "25.61 13.08 16.04 29.32",
            "distillm2": "27.48 17.95 17.14 30.99",
            "distillm2-mta": "27.93 18.87 18.63 33.49",
        },
    ),
    "opt": Pair(
        title="OPT 1.3B ← 6.7B (LoRA)",
        student="models/opt-1.3b",
        teacher="models/opt-6.7b",
        batch=8,
        layers=([16, 18, 20, 22, 24], [20, 23, 26, 29, 32]),
        fdd_layers=([16, 18, 20, 22, 24], [20, 23, 26, 29, 32]),
        lambdas=("3.0", "0.3"),
        lr={"": "5.0e-4"},
        epochs={"": 5, "distillm2": 3},
        lora=True,
        scores={
            "fdd": "26.07 14.82 17.09 28.98",
            "fdd-mta": "26.49 16.47 17.51 31.12",
            "distillm": "27.87 15.99 18.02 30.02",
            "distillm-mta": "27.43 17.07 18.40 32.97",
            "distillm2": "26.31 17.62 17.60 30.85",
            "distillm2-mta": "26.79 18.16 16.55 31.39",
        },
    ),
}


def presets() -> dict[str, str]:
    """File name -> content, of every preset of the paper."""
    return {
        f"{pair}-{method}{'-mta' if mta else ''}.yaml": render(pair, method, mta)
        for pair in PAIRS
        for method in METHODS
        for mta in ((False, True) if method in WITH_MTA else (False,))
    }


def render(pair: str, method: str, mta: bool) -> str:
    """One preset, section by section."""
    return "".join(
        (
            _header(pair, method, mta),
            _models(pair, method, mta),
            (PARSER if method in PARSES_ITSELF else PARSE) if mta else "",
            _data(pair, method, mta),
            _mta(PAIRS[pair], method) if mta else "mta: null\n",
            _loss(PAIRS[pair], method, mta),
            _train(PAIRS[pair], method),
            _generation(method) if method in ("distillm2", "seqkd") else "",
            EVALUATION,
        )
    )


def _header(pair: str, method: str, mta: bool) -> str:
    name = f"{pair}-{method}{'-mta' if mta else ''}"
    scores = PAIRS[pair].scores.get(name.removeprefix(f"{pair}-"))
    lines = [
        f"{PAIRS[pair].title}, {METHODS[method]}{' with MTA' if mta else ''}, on Dolly.",
        *([f"Published ROUGE-L (Dolly, Self-Instruct, Vicuna, S-NI): {scores}"] if scores else []),
        "",
        *_stages(pair, method, f"examples/configs/{name}.yaml"),
        *(["  mta-ds parse examples/configs/{name}.yaml"] if mta and method not in PARSES_ITSELF else []),
        "  mta-ds check examples/configs/{name}.yaml",
        "  mta-ds train examples/configs/{name}.yaml --nproc 1",
        "  mta-ds evaluate examples/configs/{name}.yaml",
    ]
    return "".join(f"# {line}".rstrip().format(name=name) + "\n" for line in lines)


def _stages(pair: str, method: str, file: str) -> list[str]:
    """What comes before the stages that every preset has."""
    if method == "sft":
        teacher = PAIRS[pair].teacher
        return [
            *(["OPT's hub has no safetensors: save both models once with transformers."] if pair == "opt" else []),
            "The stage before all others of this pair. First their teacher:",
            f"  mta-ds train {file} --nproc 1 \\",
            f"      run_dir=runs/{pair}-teacher student.path={teacher} teacher.path={teacher}",
            "then the SFT checkpoint that their students start from:",
        ]
    start = [f"{pair}-sft.yaml comes first: it says how the teacher and the student's SFT checkpoint are made. Then"]
    if method == "seqkd":
        return [
            f"{pair}-sft.yaml comes first: it says how the teacher is made. Then",
            f"  mta-ds generate {file} --model teacher",
        ]
    return start


def _models(pair: str, method: str, mta: bool) -> str:
    published = method in ("sft", "seqkd")
    return f"""\
run_dir: runs/{pair}-{method}{"-mta" if mta else ""}
teacher:
  path: runs/{pair}-teacher/export
  deepspeed: ds_configs/teacher_zero3.json
student:
  path: {PAIRS[pair].student if published else f"runs/{pair}-sft/export"}
  deepspeed: ds_configs/student_zero2.json
{LORA if PAIRS[pair].lora else ""}"""


def _data(pair: str, method: str, mta: bool) -> str:
    # nobody reads a teacher in SFT, unless there is a validation set to compare it on
    validation = "" if method in ("sft", "seqkd") else "  validation: [data/dolly/dev.jsonl]\n"
    spans = "" if method in PARSES_ITSELF else "  spans: runs/dolly-spans\n"
    return f"""\
data:
  train: [{_records(pair, method)}]
{validation}  template: minillm
  max_length: 256
  max_prompt_length: 128
{spans + UNITS if mta else ""}"""


def _records(pair: str, method: str) -> str:
    return f"runs/{pair}-seqkd/generated/teacher" if method == "seqkd" else "data/dolly/train.jsonl"


def _mta(pair: Pair, method: str) -> str:
    student, teacher = pair.fdd_layers if method == "fdd" else pair.layers
    return f"""\
mta:
  lambda_dsa: {pair.lambdas[0]}
  lambda_hid: {pair.lambdas[1]}
  reduction: weighted_mean  # the released code's; with gradient accumulation take sequence_mean
  student_weights: own
  student_layers: {student}
  teacher_layers: {teacher}
  num_word_layers: 1
  projection_lr: 5.0e-4
"""


def _loss(pair: Pair, method: str, mta: bool) -> str:
    student, teacher = pair.fdd_layers
    return {
        "sft": SFT,
        "seqkd": SFT,
        "distillm": DISTILLM,
        "distillm2": DISTILLM2,
        "fdd": f"""\
loss:
  method: fdd
  divergence: fkl
  student_layers: {student}
  teacher_layers: {teacher}
  temperature: {"2.0" if mta else "5.0"}  # the released code's, {"beside MTA" if mta else "alone"}
  weight: 1.0
""",
    }[method]


def _train(pair: Pair, method: str) -> str:
    epochs = pair.epochs.get(method, pair.epochs[""])
    lr = pair.lr.get(method, pair.lr[""])
    what = " of prompts, each with two responses" if method == "distillm2" else ""
    return f"""\
train:
  epochs: {epochs}
  micro_batch_size: {pair.batch}  # the batch{what}: divide by the number of ranks
  gradient_accumulation_steps: 1
  lr: {lr}
  schedule: cosine
  warmup_steps: 0
  weight_decay: 0.01
  gradient_clipping: 1.0
  dtype: bfloat16
  seed: 10
  save_every: 500
"""


def _generation(method: str) -> str:
    inputs = "  inputs: [data/dolly/train.jsonl]\n" if method == "seqkd" else ""
    return f"""\
generation:
{inputs}  do_sample: true
  temperature: 1.0
  top_p: 1.0
  top_k: 0
  max_prompt_length: 128
  max_length: 256
"""


PARSE = """\
parse:
  inputs: [data/dolly/train.jsonl]
  output: runs/dolly-spans
  # the bundled Benepar model; the paper's own units are those of a spaCy model: parser: spacy:en_core_web_lg here, and
  # choose: maximal in data.units (another parser needs another output)
"""

PARSER = """\
# What the models write is parsed as they write it, by the bundled Benepar model. The paper's own units are those of a
# spaCy model: choose: maximal in data.units, and a section that names it (its inputs and output are not read here):
#   parse: {parser: spacy:en_core_web_lg, inputs: [data/dolly/train.jsonl], output: runs/dolly-spans}
"""

UNITS = """\
  units:
    labels: [NP, VP]
    choose: innermost
    words: in_phrases
    fields: all
"""

LORA = """\
  lora:
    r: 16
    alpha: 64
    targets: [q_proj, v_proj]
"""

SFT = """\
loss:
  method: kd
  divergence: sft
"""

DISTILLM = """\
loss:
  method: distillm
  divergence: srkl
  alpha: 0.1
  schedule: decreasing
  initial_phi: 0.0
  phi_step: 0.1  # at a validation, once an epoch
  tolerance: 0.1
  buffer_size: 1000
  rollouts:
    temperature: 1.0
    top_p: 1.0
    top_k: 0
"""

DISTILLM2 = """\
loss:
  method: distillm2
  alpha: 0.1
  alpha_curriculum: true
  beta_curriculum: true
  regenerate: both  # the teacher and the student answer the prompts of data.train anew at each epoch
"""

EVALUATION = """\
evaluation:
  records: [data/dolly/test.jsonl]  # the other sets: evaluation.records=[FILE] --name NAME
  do_sample: true
  temperature: 1.0
  top_p: 1.0
  top_k: 0
  seeds: [10, 20, 30, 40, 50]
  max_prompt_length: 256
  max_length: 512
"""


if __name__ == "__main__":
    for file, content in presets().items():
        (FOLDER / file).write_text(content, encoding="utf-8")
