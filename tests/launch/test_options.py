"""Settings and sbatch's options are told apart, and those options found that must be known of."""

from __future__ import annotations

import pytest

from mta_ds.errors import UsageError
from mta_ds.launch.options import CHDIR, DEPENDENCY, OUTPUT, PIPELINE, refuse_useless, split_arguments, with_site


def test_settings_and_options_of_sbatch_are_told_apart() -> None:
    arguments = ["train.lr=1e-4", "--nodes=4", "-p", "gpu", "train:--time=1:00:00", "mta.lambda_dsa=3", "--exclusive"]
    given = split_arguments([*arguments, "data.train=[a b.jsonl]", "train:--comment=a=b c"], PIPELINE)
    assert given.overrides == ("train.lr=1e-4", "mta.lambda_dsa=3", "data.train=[a b.jsonl]")
    assert given.for_stage("parse") == ("--nodes=4", "-p", "gpu", "--exclusive")
    assert given.for_stage("train") == (*given.for_stage("parse"), "--time=1:00:00", "--comment=a=b c")


def test_a_file_of_settings_is_no_value_of_the_option_before_it() -> None:
    given = split_arguments(
        ["@a b.yaml", "--exclusive", "@runs/tune/override.yaml", "train.lr=1", "-p", "gpu"], PIPELINE
    )
    assert given.overrides == ("@a b.yaml", "@runs/tune/override.yaml", "train.lr=1")
    assert given.options == ("--exclusive", "-p", "gpu")


@pytest.mark.parametrize(("argument", "words"), [("gpu", "neither an override"), ("generate:-N2", "not submitted")])
def test_what_is_neither_is_refused(argument: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        split_arguments([argument], PIPELINE)


def test_an_option_is_found_however_it_is_written() -> None:
    options = ("-d", "a", "-N2", "--dependency=b=c", "-dafterok:5", "--exclusive", "--depend", "e", "--deadline=f")
    assert DEPENDENCY.take(options) == (["a", "b=c", "afterok:5", "e"], ("-N2", "--exclusive", "--deadline=f"))
    assert OUTPUT.take(("-p", "gpu", "--open-mode=append")) == ([], ("-p", "gpu", "--open-mode=append"))
    assert CHDIR.take(("-D",)) == ([""], ())


@pytest.mark.parametrize(
    "options", [("--wrap=ls",), ("--test-only",), ("-W",), ("--wait",), ("-a", "0-3"), ("--arr=1",)]
)
def test_options_that_break_a_stage_are_refused(options: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"^--(wrap|test-only|wait|array): "):
        refuse_useless(options, "train", is_array=False)


def test_a_users_tasks_and_nodes_are_their_own_affair() -> None:
    refuse_useless(("--array=0-9%2", "--wait-all-nodes=1", "--time=1"), "parse", is_array=True)


@pytest.mark.parametrize(
    ("options", "inherited", "expected"),
    [
        ((), None, ()),
        (("--export=ALL,A=1",), "NONE", ("--export=ALL,A=1",)),
        (("--export=NONE", "-N2"), None, ("-N2", "--export=SITE")),
        (("--export", "A=1,B"), None, ("--export=A=1,B,SITE",)),
        (("--export-file=x",), "NONE", ("--export-file=x", "--export=SITE")),
    ],
)
def test_the_site_reaches_jobs_that_begin_with_an_empty_environment(
    options: tuple[str, ...], inherited: str | None, expected: tuple[str, ...]
) -> None:
    assert with_site(options, "SITE", inherited) == expected
