"""What a job reads stays as it was when the job was submitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from mta_ds.errors import UserError
from mta_ds.launch.copies import copy_of


def test_an_edited_file_does_not_replace_the_copy_of_what_it_was(tmp_path: Path) -> None:
    source, folder = tmp_path / "a run.yaml", tmp_path / "slurm"
    paths = []
    for text in ("lr: 1", "lr: 2", "lr: 1"):
        source.write_text(text)
        copy = copy_of(source, folder)
        copy.keep()
        assert copy.path.read_text() == text and copy.path.name.startswith("a run-") and copy.path.suffix == ".yaml"
        paths.append(copy.path)
    assert paths[0] == paths[2] != paths[1]
    assert {path.read_text() for path in folder.iterdir()} == {"lr: 1", "lr: 2"}


def test_a_copy_that_somebody_changed_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lr: 1")
    copy = copy_of(tmp_path / "run.yaml", tmp_path)
    copy.path.write_text("lr: 3")
    with pytest.raises(UserError, match=f"{copy.path}: was changed"):
        copy.keep()
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        copy_of(tmp_path / "none.yaml", tmp_path)
