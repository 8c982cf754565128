"""``mta-ds check``: everything about a run that can be known before a GPU hour is spent, in one table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mta_ds.data import DatasetSummary, EncodedDataset, grouped_order, pad_share, sample_order
from mta_ds.engine.config import RunConfig
from mta_ds.engine.pair import Pair, check_parser, check_prompts, prepare_pair
from mta_ds.engine.setup import check_deepspeed, load_data, number_of_steps, student_zero_stage
from mta_ds.models import adapter_size, count_parameters, load_config
from mta_ds.models.loading import model_outline

Rows = list[tuple[str, str]]


def check(config: RunConfig, world_size: int = 1) -> None:
    """Validate models, tokenizers, key layers, span store and data of ``config`` and print the resolved plan.

    Args:
        world_size: the number of ranks to plan for.

    Raises:
        UserError: whatever would stop the run, in one line.
    """
    pair = prepare_pair(config)
    check_deepspeed(config, on_this_machine=False)
    train, validation = load_data(config, pair.tokenizer, pair.method.pairs)
    check_prompts(pair.method, train)
    check_parser(config, pair.method)
    rows = [
        *model_rows(config, pair),
        trainable_row(config, pair),
        *loss_rows(config, pair),
        *training_rows(config, train.summary),
        *([data_row("validation", validation.summary)] if validation else []),
        *plan_rows(config, pair.method.pairs, len(train) // train.group, world_size),
        *([] if config.regenerates else [padding_row(config, train)]),
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
    size = adapter_size(model_outline(load_config(pair.student_dir, trusted), trusted), lora)
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


def training_rows(config: RunConfig, summary: DatasetSummary) -> Rows:
    """Size of the training set and how much of it MTA can reach, as far as it is known before a step."""
    size, reached = data_row("training", summary), ("training spans", _reached(summary))
    if config.regenerates:
        size = ("training data", f"{summary.records} records, answered at each epoch; left out: {_left_out(summary)}")
        reached = ("training spans", "those of the texts that are written and parsed at each epoch")
    return [size] if config.mta is None else [size, reached]


def data_row(name: str, summary: DatasetSummary) -> tuple[str, str]:
    """Size of a data set."""
    return (
        f"{name} data",
        f"{summary.records} records, {summary.tokens} tokens, {summary.label_tokens} with a label; "
        f"left out: {_left_out(summary)}",
    )


def plan_rows(config: RunConfig, pairs: bool, num_records: int, world_size: int) -> Rows:
    """Batch, steps and precision."""
    train = config.train
    global_batch = train.micro_batch_size * train.gradient_accumulation_steps * world_size
    steps = number_of_steps(train, num_records, world_size)
    what = f"pairs a step ({2 * global_batch} sequences)" if pairs else "sequences a step"
    return [
        (
            "batch",
            f"{global_batch} {what} = {train.micro_batch_size} × {train.gradient_accumulation_steps} "
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


def _reached(summary: DatasetSummary) -> str:
    changed = summary.changed_fields
    without = f"; {changed} fields have none, the template changed them" if changed else ""
    return (
        f"{_share(summary.with_spans, summary.records)} of the records have spans, "
        f"which cover {_share(summary.covered_tokens, summary.tokens)} of the tokens{without}"
    )


def _left_out(summary: DatasetSummary) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(summary.dropped.items())) or "none"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"
