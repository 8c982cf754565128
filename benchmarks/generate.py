"""Generation: ours against transformers' own ``generate`` on the same model, greedy, prompts padded on the left.

    python benchmarks/generate.py --json rows.json                       # the demo's teacher, SmolLM2-135M-Instruct
    python benchmarks/generate.py --small                                # a random model, seconds
    python benchmarks/generate.py --demo-folder runs/demo_pair           # where the teacher is, or is unpacked to

Two cases: one batch, where both do the same work; and a file of prompts in batches, which ours takes by length and a
plain loop in the file's order. In the first a third contestant has the model in ZeRO-3 partitions (of one rank), as a
run has it at a rollout, and makes a whole copy for each call. All give the same tokens, checked here.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import deepspeed
import torch
from common import (
    M_MMAP_THRESHOLD,
    Row,
    bounded,
    machine_row,
    measure,
    options,
    pin_threads,
    report,
    reset_peak,
    time_ratio,
)
from tokenizer import train_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mta_ds.data import DataConfig, Record, encode_prompt, read_records
from mta_ds.demo import ASSETS, unpack_teacher
from mta_ds.engine import distributed
from mta_ds.evaluation import GenerationConfig, end_tokens, generate
from mta_ds.models import load_pretrained, load_tokenizer, teacher_config, whole_copy

Work = Callable[[], list[list[int]]]


def ours(folder: Path, num_prompts: int, batch_size: int, new_tokens: int) -> Work:
    """The project's generation of all prompts."""
    model, tokenizer, prompts = load(folder, num_prompts)
    config = GenerationConfig(max_length=4096, max_new_tokens=new_tokens, batch_size=batch_size)
    return lambda: generate(model, tokenizer, prompts, config)


def plain(folder: Path, num_prompts: int, batch_size: int, new_tokens: int) -> Work:
    """transformers' generation, batch by batch in the file's order, cut at the first end token."""
    model, tokenizer, prompts = load(folder, num_prompts)
    ends = end_tokens(model, tokenizer)

    def batch(ids: list[list[int]]) -> list[list[int]]:
        padded = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(
            **padded,
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=list(ends),
            pad_token_id=tokenizer.pad_token_id,
        )
        return [cut(row, ends) for row in output[:, padded["input_ids"].shape[1] :].tolist()]

    starts = range(0, len(prompts), batch_size)
    return lambda: [row for start in starts for row in batch(prompts[start : start + batch_size])]


def partitioned(folder: Path, num_prompts: int, batch_size: int, new_tokens: int) -> Work:
    """The project's generation out of ZeRO-3 partitions: each call gathers the model, writes, and gives it back."""
    _, tokenizer, prompts = load(folder, num_prompts)
    engine = zero3_engine(folder)
    config = GenerationConfig(max_length=4096, max_new_tokens=new_tokens, batch_size=batch_size)

    def work() -> list[list[int]]:
        with whole_copy(engine.module) as copy:
            return generate(copy, tokenizer, prompts, config)

    return work


def zero3_engine(folder: Path) -> Any:
    """A frozen model in partitions, of which this process is the only rank."""
    distributed.initialise()
    config = teacher_config(None, "float32", 1)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or one rank would keep what is small
    return deepspeed.initialize(model=load_pretrained(folder, "float32", config), config=config)[0]


def memory_around_copy(folder: Path) -> tuple[int, int, int]:
    """Memory that a process holds before a whole copy, with it, and after it."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    engine = zero3_engine(folder)
    held = []
    for _ in range(2):  # the first makes DeepSpeed's own buffers
        gc.collect()
        libc.malloc_trim(0)
        before = reset_peak()
        with whole_copy(engine.module):
            held = [before, reset_peak()]
    gc.collect()
    libc.malloc_trim(0)
    return held[0], held[1], reset_peak()


def cut(row: list[int], ends: tuple[int, ...]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]


def load(folder: Path, num_prompts: int) -> tuple[AutoModelForCausalLM, PreTrainedTokenizerFast, list[list[int]]]:
    """A model on the first GPU or the CPU, and the prompts of the demo's first records."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_pretrained(folder, "float32").to(device).eval()
    tokenizer = load_tokenizer(folder)
    data = DataConfig(template="chat" if tokenizer.chat_template else "minillm", max_prompt_length=512)
    records = [r for r in read_records([str(ASSETS / "train.jsonl")]) if isinstance(r, Record)][:num_prompts]
    assert len(records) == num_prompts, f"the demo has {len(records)} records"
    return model, tokenizer, [encode_prompt(record, data, tokenizer) for record in records]


def random_model(folder: Path) -> Path:
    """A small model with wide logits and a tokenizer of 1,000 tokens."""
    tokenizer = train_tokenizer((ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines())
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compare(
    name: str,
    folder: Path,
    shape: tuple[int, int, int],
    rounds: int,
    bound: float | None,
    contestants: dict[str, Callable[..., Work]],
) -> list[Row]:
    """Speed, memory and equality with transformers on ``shape`` = (prompts, batch size, new tokens)."""
    everybody = {"transformers": plain} | contestants
    found = measure({who: (make, folder, *shape) for who, make in everybody.items()}, rounds)
    texts = {who: make(folder, *shape)() for who, make in everybody.items()}
    tokens = sum(map(len, texts["transformers"]))
    equal = sum(len(set(map(tuple, each))) == 1 for each in zip(*texts.values(), strict=True)) / shape[0]
    ratios = {who: time_ratio(found["transformers"], found[who]) for who in contestants}
    return [
        *(Row(f"{name}, {who}", tokens / each.median_seconds, "tokens/s") for who, each in found.items()),
        *(bounded(f"{name}: {who} / transformers, speed", ratio, ">=", bound) for who, ratio in ratios.items()),
        *(Row(f"{name}, {who}: extra memory", each.extra_bytes / 1e6, "MB") for who, each in found.items()),
        bounded(f"{name}: responses with the same tokens", equal, ">=", 1.0, "of 1"),
    ]


def main() -> None:
    parser = options(__doc__.partition("\n\n")[0])
    parser.set_defaults(repeats=3)
    parser.add_argument("--small", action="store_true", help="a random model and few tokens, to see that it runs")
    parser.add_argument("--demo-folder", type=Path, help="keeps the demo's teacher")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    batch_size, new_tokens = (4, 8) if arguments.small else (arguments.batch_size, arguments.new_tokens)
    rows = [machine_row(arguments.threads)]
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.small:
            folder = random_model(Path(temporary) / "model")
        else:
            folder = (arguments.demo_folder or Path(temporary)).resolve() / "teacher"
            unpack_teacher(folder)
        one, several = (batch_size, batch_size, new_tokens), (4 * batch_size, batch_size, new_tokens)
        both = {"ours": ours, "ours out of ZeRO-3": partitioned}
        rows += compare(f"one batch of {one[0]}", folder, one, arguments.repeats, 0.9, both)
        batches = f"{several[0]} prompts in batches of {batch_size}"
        rows += compare(batches, folder, several, arguments.repeats, 0.9, {"ours": ours})
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
            before, beside, after = other.submit(memory_around_copy, folder).result()
        rows += [
            Row("memory held before a copy out of ZeRO-3", before / 1e6, "MB"),
            Row("with the copy, more", (beside - before) / 1e6, "MB"),
            Row("after it, more", (after - before) / 1e6, "MB"),
        ]
        distributed.shutdown()
    report("Generation, greedy", rows, arguments.json)


if __name__ == "__main__":
    main()
