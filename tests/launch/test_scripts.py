"""Argument vectors of sbatch, their quoting, and the job scripts themselves."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from mta_ds.errors import UsageError
from mta_ds.launch import scripts
from mta_ds.launch.scripts import PIPELINE, Job

FOLDER = Path(__file__).parents[2] / "slurm"
NASTY = '/runs/it\'s "mine"; $(rm -rf *) `x` & 100%j'


def job(stage: str = "train", **changes: object) -> Job:
    values = {"script": Path("slurm/a b.sbatch"), "arguments": (NASTY,), "name": "a 'job'", "log": "/logs/x-%j.log"}
    return Job(stage=stage, **(values | changes))  # type: ignore[arg-type]


def test_settings_and_options_of_sbatch_are_told_apart() -> None:
    arguments = ["train.lr=1e-4", "--nodes=4", "-p", "gpu", "train:--time=1:00:00", "mta.lambda_dsa=3", "--exclusive"]
    given = scripts.split_arguments([*arguments, "data.train=[a b.jsonl]", "train:--comment=a=b c"], PIPELINE)
    assert given.overrides == ("train.lr=1e-4", "mta.lambda_dsa=3", "data.train=[a b.jsonl]")
    assert given.for_stage("parse") == ("--nodes=4", "-p", "gpu", "--exclusive")
    assert given.for_stage("train") == (*given.for_stage("parse"), "--time=1:00:00", "--comment=a=b c")


@pytest.mark.parametrize(("argument", "words"), [("gpu", "neither an override"), ("generate:-N2", "not submitted")])
def test_what_is_neither_is_refused(argument: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        scripts.split_arguments([argument], PIPELINE)


@pytest.mark.parametrize(
    ("indices", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 3], "0-3"), ([7, 2, 1, 5, 0, 2], "0-2,5,7")]
)
def test_array_ranges(indices: list[int], text: str) -> None:
    assert scripts.array_ranges(indices) == text


def test_a_command_is_a_list_in_which_the_users_options_come_last() -> None:
    command = scripts.sbatch_command(job(shards=(2, 5), options=("--array=2,5%1", "--job-name=b")), after="12")
    assert command == [
        *("sbatch", "--parsable", "--job-name=a 'job'", "--output=/logs/x-%j.log", "--array=2,5"),
        *("--dependency=afterok:12", "--kill-on-invalid-dep=yes", "--array=2,5%1", "--job-name=b"),
        *("slurm/a b.sbatch", NASTY),
    ]


def test_what_a_dry_run_prints_is_what_would_be_run(tmp_path: Path) -> None:
    jobs = [job("parse", shards=(0, 1)), job("check"), job("train", options=(f"--comment={NASTY}",))]
    lines = scripts.shell_lines(jobs, Path(NASTY))
    # bash itself reads the lines; a function in sbatch's place writes down its arguments and gives an id
    log = tmp_path / "calls"
    function = f'sbatch() {{ printf "%s\\0" "$MTA_DS_SITE" sbatch "$@" END >>{shlex.quote(str(log))}; echo 7"$#"; }}\n'
    subprocess.run(["bash", "-euc", function + "\n".join(lines)], check=True, cwd=tmp_path)
    calls = [call.removesuffix("\0").split("\0") for call in log.read_text().split("END\0")[:-1]]
    after = None
    for each, call in zip(jobs, calls, strict=True):
        expected = scripts.sbatch_command(each, after)
        assert call == [NASTY, *expected]
        after = f"7{len(expected) - 1}"


def test_a_log_lies_where_sbatch_was_told_to_write_it() -> None:
    pattern = scripts.log_pattern(Path("/a %j b"), "parse", is_array=True)
    assert pattern == "/a %%j b/parse-%A_%a.log"
    assert scripts.log_path(pattern, "12", 3) == Path("/a %j b/parse-12_3.log")
    assert scripts.log_path(scripts.log_pattern(Path("/x"), "train", is_array=False), "12", None) == Path(
        "/x/train-12.log"
    )
    with pytest.raises(UsageError, match="backslash"):
        scripts.log_pattern(Path("/a\\b"), "train", is_array=False)


@pytest.mark.parametrize("stage", [*scripts.STAGES, "tune"])
def test_every_stage_has_a_script(stage: str) -> None:
    text = (FOLDER / f"{stage}.sbatch").read_text(encoding="utf-8")
    assert f'"${{MTA_DS[@]}}" {stage} ' in text and '"$@"' in text
    for option in ("--requeue", "--open-mode=append", "--output=", f"--job-name=mta-{stage}"):
        assert f"#SBATCH {option}" in text


def test_scripts_are_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    files = [*FOLDER.glob("*.sbatch"), FOLDER / "site.env"]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
