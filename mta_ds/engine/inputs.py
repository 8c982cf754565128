"""What a run learns from, by content: a checkpoint goes on with the same records, spans and models only.

The configuration's hash knows paths; what lies there may have been written anew since.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from mta_ds.data import EncodedDataset
from mta_ds.engine import distributed
from mta_ds.engine.config import RunConfig
from mta_ds.engine.pair import Pair
from mta_ds.files import sha256

_WEIGHTS = (".safetensors", ".bin", ".gguf")
_SAMPLES = 16  # of each file of weights
_SAMPLE_BYTES = 4096


def input_hashes(
    config: RunConfig, pair: Pair, train: EncodedDataset, validation: EncodedDataset | None
) -> dict[str, str]:
    """Hashes by what they are, in words of the plural; every rank must call it."""
    spans = config.data.spans if config.mta is not None else None

    def of_folders() -> dict[str, str]:
        hashes = {
            "weights or configuration of the teacher": model_fingerprint(pair.teacher_dir),
            "initial weights or configuration of the student": model_fingerprint(pair.student_dir),
        }
        return hashes | ({"spans": sha256(spans / "manifest.json")} if spans is not None else {})

    of_validation = {} if validation is None else {"validation records": validation.key}
    return {"training records": train.key} | of_validation | distributed.from_rank_zero(of_folders)


def model_fingerprint(folder: Path) -> str:
    """Hash of a model's configuration, and of size and samples of its weights.

    Training moves every weight, so samples tell two states of a model apart; reading all of a large one would take as
    long as loading it.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
