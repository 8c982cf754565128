"""A job that is restarted without getting on comes to an end."""

from __future__ import annotations

from pathlib import Path

import pytest

from mta_ds.errors import UserError
from mta_ds.launch.guard import guard, idle_restarts, newest_step


def save(run_dir: Path, step: int, committed: bool = True) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    if committed:
        (folder / "COMMIT").touch()


@pytest.mark.parametrize(
    ("steps", "idle"), [([], 0), ([0], 0), ([0, 0], 1), ([0, 5, 5, 5], 2), ([0, 0, 0, 5], 0), ([9, 5], 1)]
)
def test_idle_restarts(steps: list[int], idle: int) -> None:
    assert idle_restarts(steps) == idle


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    save(tmp_path, 100)
    save(tmp_path, 250)
    save(tmp_path, 300, committed=False)
    assert newest_step(tmp_path) == 250


def test_restarts_without_progress_end_and_with_it_go_on(tmp_path: Path) -> None:
    for restart in range(3):
        guard(tmp_path, "12", restart, max_idle=3)
    save(tmp_path, 40)
    for restart in range(3, 6):
        guard(tmp_path, "12", restart, max_idle=3)
    with pytest.raises(UserError, match=r"job 12 was restarted 3 times without a new checkpoint after step 40"):
        guard(tmp_path, "12", 6, max_idle=3)
    guard(tmp_path, "13", 0, max_idle=3)  # somebody mended it and submits it anew


def test_parts_of_an_epochs_text_are_progress(tmp_path: Path) -> None:
    parts = tmp_path / "epochs" / "abc" / "epoch-0000" / "rejected"
    parts.mkdir(parents=True)
    for restart in range(6):
        guard(tmp_path, "12", restart, max_idle=1)
        (parts / f"part-{restart:05d}-of-00008.json").touch()
    guard(tmp_path, "12", 6, max_idle=1)
    with pytest.raises(UserError, match="after step 0"):
        guard(tmp_path, "12", 7, max_idle=1)


def test_another_jobs_or_a_damaged_note_counts_for_nothing(tmp_path: Path) -> None:
    guard(tmp_path, "12", 0, max_idle=1)
    guard(tmp_path, "13", 1, max_idle=1)
    (tmp_path / "slurm" / "restarts.json").write_text("{")
    guard(tmp_path, "13", 2, max_idle=1)
    with pytest.raises(UserError):
        guard(tmp_path, "13", 3, max_idle=1)
