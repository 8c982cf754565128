"""Train benepar's ChartParser on treebank trees; writes the folder format of Benepar's released models.

The bundled model (mta_ds/assets/parser) was made with the commands in README.md beside this script.

    python examples/parser/train.py --encoder encoder3 --trees gum_train.mrg:3 silver.mrg --dev gum_dev.mrg \\
        --output model
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from benepar import decode_chart, nkutil, subbatching
from benepar.parse_chart import ChartParser
from bracket_f1 import Counts, score
from margin_loss import compute_loss
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_linear_schedule_with_warmup
from treebank import TreeExample, example_from_tree, read_trees

from mta_ds.spans.benepar_model import build_chart_parser

SUBBATCH_TOKENS = 1000  # sub-words that are computed at once


def hparams(options: argparse.Namespace, force_root: bool) -> nkutil.HParams:
    """Benepar's hyper-parameters; those that are not given keep the values of its released models."""
    return nkutil.HParams(
        d_model=options.d_model,
        num_layers=options.top_layers,
        num_heads=8,
        d_kv=64,
        d_ff=options.d_ff,
        d_label_hidden=options.d_label_hidden,
        d_tag_hidden=options.d_label_hidden,
        attention_dropout=0.2,
        residual_dropout=0.2,
        relu_dropout=0.1,
        morpho_emb_dropout=0.2,
        encoder_max_len=512,
        use_chars_lstm=False,
        use_pretrained=True,
        pretrained_model=str(options.encoder),
        use_encoder=True,
        predict_tags=True,
        tag_loss_scale=5.0,
        force_root_constituent=force_root,
    )


def new_parser(options: argparse.Namespace, examples: Sequence[TreeExample]) -> ChartParser:
    """An untrained parser over the encoder, for the labels and tags of ``examples``."""
    trees = [example.tree for example in examples]
    tags = sorted({tag for example in examples for _, tag in example.pos()})
    config = {
        # Tag 0 is benepar's own for what is never predicted.
        "tag_vocab": {tag: number for number, tag in enumerate(["UNK", *tags])},
        "label_vocab": decode_chart.ChartDecoder.build_vocab(trees),
        "char_vocab": None,
        "hparams": hparams(options, decode_chart.ChartDecoder.infer_force_root_constituent(trees)),
    }
    return build_chart_parser(config)


def batches(parser: ChartParser, encoded: Sequence[dict], options: argparse.Namespace) -> Iterator[list[dict]]:
    """One epoch of shuffled batches, each a list of padded sub-batches of sentences of like length."""
    order = random.sample(range(len(encoded)), len(encoded))
    for first in range(0, len(order), options.batch_size):
        chosen = [encoded[index] for index in order[first : first + options.batch_size]]
        lengths = [len(example["input_ids"]) for example in chosen]
        num_words = sum(len(example["words_from_tokens"]) - 2 for example in chosen)
        subbatches = []
        for _, examples in subbatching.split(chosen, costs=lengths, max_cost=SUBBATCH_TOKENS):
            subbatch = parser.pad_encoded(examples)
            subbatch["batch_size"], subbatch["batch_num_tokens"] = len(chosen), num_words
            subbatches.append(subbatch)
        yield subbatches


def evaluate(parser: ChartParser, examples: Sequence[TreeExample]) -> Counts:
    """Bracket counts of the parser's trees against the examples' own."""
    predicted = parser.parse(examples, subbatch_max_tokens=4000)
    return score([example.tree for example in examples], predicted)


def save(parser: ChartParser, encoder: Path, folder: Path) -> None:
    """Write ``parser`` in the folder format of Benepar's released models, weights in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
    benepar_config = {**parser.config, "hparams": {**parser.config["hparams"], "pretrained_model": "bundled"}}
    config["benepar"] = benepar_config
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights = {name: tensor.detach().to(torch.float16) for name, tensor in parser.state_dict().items()}
    torch.save(weights, folder / "benepar_model.bin")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((encoder / name).read_bytes())


def read_examples(sources: Sequence[str]) -> list[TreeExample]:
    """The examples of ``FILE`` or ``FILE:TIMES`` arguments, each repeated as often as it says."""
    examples: list[TreeExample] = []
    for source in sources:
        path, _, times = source.partition(":")
        examples += [example_from_tree(tree) for tree in read_trees(Path(path))] * int(times or 1)
    return examples


def new_optimizer(parser: ChartParser, options: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW with a lower learning rate for what is already trained."""
    pretrained = list(parser.pretrained_model.parameters())
    known = {id(parameter) for parameter in pretrained}
    fresh = [parameter for parameter in parser.parameters() if id(parameter) not in known]
    groups = [{"params": pretrained, "lr": options.encoder_lr}, {"params": fresh, "lr": options.lr}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)


def step(parser: ChartParser, subbatches: list[dict], options: argparse.Namespace) -> Tensor:
    """Gradients of one batch, accumulated over its sub-batches and clipped; returns the batch's loss."""
    total = torch.zeros(())
    for subbatch in subbatches:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            loss = compute_loss(parser, subbatch)
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(parser.parameters(), options.clip)
    return total


def train(options: argparse.Namespace) -> None:
    """Train on the given trees; of the averaged weights, keep the epoch's that score best on the dev trees."""
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    examples, dev = read_examples(options.trees), read_examples([str(options.dev)])
    parser = new_parser(options, examples)
    encoded = [parser.encode(example) for example in examples if len(example.words) <= options.max_words]
    optimizer = new_optimizer(parser, options)
    num_steps = options.epochs * -(-len(encoded) // options.batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, options.warmup, num_steps)
    averaged = AveragedModel(parser, multi_avg_fn=get_ema_multi_avg_fn(options.average))
    print(f"{len(encoded)} trees, {num_steps} steps, {len(parser.label_vocab)} labels", flush=True)
    best, start = 0.0, time.monotonic()
    for epoch in range(1, options.epochs + 1):
        parser.train()
        for subbatches in batches(parser, encoded, options):
            loss = step(parser, subbatches, options)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            averaged.update_parameters(parser)
        counts = evaluate(averaged.module, dev)
        all_labels, nouns, verbs = counts.f1(), counts.f1("NP"), counts.f1("VP")
        seconds = time.monotonic() - start
        print(
            f"epoch {epoch} loss {loss:.3f} F1 {all_labels:.2f} NP {nouns:.2f} VP {verbs:.2f} {seconds:.0f} s",
            flush=True,
        )
        if all_labels > best:
            best = all_labels
            save(averaged.module, options.encoder, options.output)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--encoder", type=Path, required=True, help="folder written by encoder.py")
    arguments.add_argument("--trees", nargs="+", required=True, metavar="FILE[:TIMES]")
    arguments.add_argument("--dev", type=Path, required=True)
    arguments.add_argument("--output", type=Path, required=True)
    arguments.add_argument("--epochs", type=int, default=10)
    arguments.add_argument("--batch-size", type=int, default=32)
    arguments.add_argument("--lr", type=float, default=7e-4, help="of what is trained from scratch")
    arguments.add_argument("--encoder-lr", type=float, default=2e-4)
    arguments.add_argument("--warmup", type=int, default=100, help="steps")
    arguments.add_argument("--clip", type=float, default=5.0)
    arguments.add_argument("--d-model", type=int, default=384)
    arguments.add_argument("--d-ff", type=int, default=768)
    arguments.add_argument("--d-label-hidden", type=int, default=192)
    arguments.add_argument("--top-layers", type=int, default=2)
    arguments.add_argument("--max-words", type=int, default=80, help="longer sentences are left out of training")
    arguments.add_argument("--average", type=float, default=0.998, help="decay of the running average of the weights")
    arguments.add_argument("--bf16", action="store_true", help="bf16 products under fp32 weights")
    arguments.add_argument("--seed", type=int, default=1)
    train(arguments.parse_args())


if __name__ == "__main__":
    main()
