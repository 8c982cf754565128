"""``mta-ds check``: everything about a run that can be known before a GPU hour is spent, in one table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mta_ds.data import DatasetSummary, EncodedDataset, grouped_order, pad_share, sample_order
from mta_ds.engine.config import RunConfig
from mta_ds.engine.pair import Pair, check_prompts, prepare_pair
from mta_ds.engine.setup import load_data, number_of_steps, student_zero_stage
from mta_ds.models import adapter_size, count_parameters, load_config
from mta_ds.models.loading import model_outline
from mta_ds.models.zero import read_deepspeed_config

Rows = list[tuple[str, str]]


def check(config: RunConfig, world_size: int = 1) -> None:
    """Validate models, tokenizers, key layers, span store and data of ``config`` and print the resolved plan.

    Args:
        world_size: the number of ranks to plan for.

    Raises:
        UserError: whatever would stop the run, in one line.
    """
    pair = prepare_pair(config)
    student_zero_stage(config)
    read_deepspeed_config(config.teacher.deepspeed)
    train, validation = load_data(config, pair.tokenizer, pair.method.pairs)
    check_prompts(pair.method, train)
    rows = [
        *model_rows(config, pair),
        trainable_row(config, pair),
        *loss_rows(config, pair),
        *data_rows("training", train.summary, config.regenerates),
        *(data_rows("validation", validation.summary) if validation else []),
        *plan_rows(config, len(train) // train.group, world_size),
        padding_row(config, train),
    ]
    table = Table(title=f"Plan of {config.run_dir}", show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(name, value)
    # a batch log has no width of its own; a cell cut at 80 columns would hide what the table is for
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


def model_rows(config: RunConfig, pair: Pair) -> Rows:
    """Both models, their sizes, and that their vocabularies agree."""
    rows: Rows = []
    for name, folder in (("teacher", pair.teacher_dir), ("student", pair.student_dir)):
        trusted = (config.teacher if name == "teacher" else config.student).trust_remote_code
        model = load_config(folder, trusted)
        parameters = count_parameters(model_outline(model, trusted))
        shape = f"{model.num_hidden_layers} layers, {model.hidden_size} wide, {parameters / 1e6:.1f} M parameters"
        bits = config.teacher.quantization if name == "teacher" else None
        where = f"; in {bits}, whole on every rank" if bits else ""
        rows.append((name, f"{folder}: {model.model_type}, {shape}{where}"))
    tokenizer = pair.tokenizer
    rows.append(
        ("vocabulary", f"equal, {pair.vocab_size} ids; EOS {tokenizer.eos_token!r}, BOS {tokenizer.bos_token!r}")
    )
    return rows


def trainable_row(config: RunConfig, pair: Pair) -> tuple[str, str]:
    """What of the student is trained."""
    lora = config.student.lora
    if lora is None:
        return "trained", "all of the student's parameters"
    trusted = config.student.trust_remote_code
    size = adapter_size(load_config(pair.student_dir, trusted), lora, trusted)
    targets = lora.targets if isinstance(lora.targets, str) else " ".join(lora.targets)
    dropout = f"{lora.dropout:g}" if config.train.dropout else "off"
    return (
        "trained",
        f"LoRA adapters of {size.modules} modules ({targets}): rank {lora.r}, alpha {lora.alpha}, dropout {dropout}; "
        f"{size.trainable:,} parameters, {100 * size.trainable / size.total:.2f} % of the student's",
    )


def loss_rows(config: RunConfig, pair: Pair) -> Rows:
    """What is optimised, and which layers are aligned."""
    rows: Rows = [("base loss", pair.method.describe())]
    if config.mta is None:
        return [*rows, ("MTA", "off")]
    mta = config.mta
    rows.append(("MTA", f"{mta.lambda_dsa:g} DSA + {mta.lambda_hid:g} Hid, reduction {mta.reduction}"))
    pairs = ", ".join(f"{k.student} ← {k.teacher} ({k.granularity}s)" for k in pair.key_layers)
    return [*rows, ("key layers", f"student ← teacher: {pairs}")]


def data_rows(name: str, summary: DatasetSummary, regenerated: bool = False) -> Rows:
    """Size of a data set, and how much of it MTA can reach, unless it is ``regenerated`` at each epoch."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.dropped.items()))
    changed = summary.changed_fields
    without = f"; {changed} fields have none, the template changed them" if changed else ""
    return [
        (
            f"{name} data",
            f"{summary.records} records, {summary.tokens} tokens, {summary.label_tokens} with a label; "
            f"left out: {dropped or 'none'}",
        ),
        (
            f"{name} spans",
            "those of the responses that are written and parsed at each epoch"
            if regenerated
            else f"{_share(summary.with_spans, summary.records)} of the records have spans, "
            f"which cover {_share(summary.covered_tokens, summary.tokens)} of the tokens{without}",
        ),
    ]


def plan_rows(config: RunConfig, num_records: int, world_size: int) -> Rows:
    """Batch, steps and precision."""
    train = config.train
    global_batch = train.micro_batch_size * train.gradient_accumulation_steps * world_size
    steps = number_of_steps(train, num_records, world_size)
    return [
        (
            "batch",
            f"{global_batch} sequences a step = {train.micro_batch_size} × {train.gradient_accumulation_steps} "
            f"accumulated × {world_size} rank{'s' * (world_size != 1)}",
        ),
        ("steps", f"{steps}, {steps * global_batch / num_records:.2f} epochs, warm-up {train.warmup_steps}"),
        ("precision", f"{train.dtype}, student ZeRO-{student_zero_stage(config)}, teacher ZeRO-3"),
    ]


def padding_row(config: RunConfig, data: EncodedDataset) -> tuple[str, str]:
    """Padding of the first epoch's batches, as configured and as grouping by length would have it."""
    train = config.train
    lengths = data.lengths.reshape(-1, data.group).max(axis=1)
    block = train.length_grouping or 16 * train.micro_batch_size
    drawn = pad_share(lengths, sample_order(len(lengths), train.seed, 0), train.micro_batch_size)
    grouped = pad_share(lengths, grouped_order(lengths, block, train.seed, 0), train.micro_batch_size)
    state = "as set" if train.length_grouping else "not set"
    text = f"{100 * drawn:.0f} % of a batch's positions; {100 * grouped:.0f} % with length_grouping: {block} ({state})"
    return "padding", text


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"
