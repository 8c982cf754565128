"""A model is told from another by its configuration and samples of its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from mta_ds.engine.inputs import model_fingerprint


def test_another_configuration_or_other_weights_are_another_model(pair: Path, tmp_path: Path) -> None:
    same, trained, renamed = (shutil.copytree(pair / "teacher", tmp_path / name) for name in ("a", "b", "c"))
    weights = load_file(trained / "model.safetensors")
    save_file(
        {name: 0.999 * weight for name, weight in weights.items()}, trained / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((renamed / "config.json").read_text())
    (renamed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    (same / "README.md").write_text("A copy.")
    assert model_fingerprint(same) == model_fingerprint(pair / "teacher")
    assert len({model_fingerprint(folder) for folder in (same, trained, renamed)}) == 3
