"""What the tests of tuning share: the published pairs' configs, small and real, and machines."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from mta_ds.config import load
from mta_ds.engine import RunConfig
from mta_ds.models.key_layers import KeyLayer
from mta_ds.tuning.machine import GB, Machine
from mta_ds.tuning.memory import Plan
from mta_ds.tuning.outline import LayerBytes
from mta_ds.tuning.shapes import ModelShape, Workload

PRESETS = Path(__file__).parents[1] / "examples" / "configs"
LLAMA3 = {"num_key_value_heads": 8, "vocab_size": 128_256}
MODELS: dict[str, tuple[str, dict]] = {
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "gpt2": ("gpt2", {}),
    "1b": (
        "llama",
        LLAMA3
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 16}
        | {"tie_word_embeddings": True},
    ),
    "8b": (
        "llama",
        LLAMA3 | {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_hidden_layers": 32},
    ),
    "70b": (
        "llama",
        LLAMA3 | {"hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64, "num_hidden_layers": 80},
    ),
}


def model_config(name: str) -> PretrainedConfig:
    kind, values = MODELS[name]
    return AutoConfig.for_model(kind, **values)


def preset(root: Path, name: str, teacher: str, student: str, *overrides: str) -> RunConfig:
    """A preset on folders that hold a config.json and nothing else."""
    for model in (teacher, student):
        model_config(model).save_pretrained(root / model)
    paths = (f"teacher.path={root / teacher}", f"student.path={root / student}", f"run_dir={root / 'run'}")
    return load(PRESETS / f"{name}.yaml", RunConfig, [*paths, *overrides])


def small_work(**changes: object) -> Workload:
    """A step small enough to be worked out by hand: 100 and 1,000 elements, 10 tokens a sequence."""
    student = ModelShape(100, 2, 30, 4, 4, 4, 10, (40, 30, 30), 60, 16, LayerBytes(50.0, 5.0, 20.0))
    teacher = ModelShape(1000, 4, 200, 8, 8, 8, 25, (200,) * 5, 800, 64, LayerBytes(90.0, 9.0, 60.0))
    values: dict = {
        "student": student,
        "teacher": teacher,
        "trained": 132,
        "projections": 32,
        "key_layers": (KeyLayer(1, 2, "word"),),
        "adapters": False,
        "trajectory": (),
        "trajectory_normed": False,
        "teacher_head": True,
        "keeps_teacher_states": False,
        "writing": None,
        "asynchronous_saves": True,
        "sequence_length": 10,
        "sequences_per_sample": 1,
        "batch_per_rank": 4,
        "element_bytes": 2,
    }
    return Workload(**(values | changes))


def small_plan(**changes: object) -> Plan:
    values: dict = {
        "student_stage": 2,
        "resident": False,
        "offload_optimizer": False,
        "teacher_hpz": 1,
        "offload_teacher": False,
        "gradient_checkpointing": False,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "reduce_bucket_size": 7,
        "prefetch_bucket_size": 3,
    }
    return Plan(**(values | changes))


def small_machine(**changes: object) -> Machine:
    values: dict = {
        "name": "small",
        "memory": 1 * GB,
        "half": 1000.0,
        "single": 500.0,
        "bandwidth": 300.0,
        "intra": 100.0,
        "host_link": 20.0,
        "inter": 50.0,
        "gpus_per_node": 2,
        "num_nodes": 1,
        "host_memory": 1 * GB,
        "host_bandwidth": 60.0,
        "efficiency": 0.5,
        "reserve": 0.0,
        "headroom": 0.0,
    }
    return Machine(**(values | changes))
