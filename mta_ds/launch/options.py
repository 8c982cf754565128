"""What stands behind CONFIG on the command line: settings of the run, and options that are handed on to sbatch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mta_ds.errors import UsageError

PIPELINE = ("parse", "check", "train", "evaluate")
"""Stages of a pipeline, each of which begins when the one before it has succeeded."""
STAGES = (*PIPELINE, "generate")

_OVERRIDE = re.compile(r"@|[A-Za-z_][\w.]*=")
_FOR_STAGE = re.compile(rf"({'|'.join(STAGES)}):(-.*)", re.DOTALL)


@dataclass(frozen=True)
class Given:
    """What stands behind CONFIG on the command line."""

    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    """Of sbatch, for every stage."""
    stage_options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of sbatch, for one stage."""

    def for_stage(self, stage: str) -> tuple[str, ...]:
        """All options of sbatch for ``stage``; its own come last, which makes sbatch prefer them."""
        return self.options + self.stage_options.get(stage, ())


@dataclass(frozen=True)
class Option:
    """One of sbatch's options, in the ways that it may be written: -d V, -dV, --dependency=V, --depend V."""

    long: str
    short: str | None = None
    has_value: bool = True

    def take(self, options: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
        """The values that ``options`` give it (what it was called, if it has none), and ``options`` without it."""
        values: list[str] = []
        rest: list[str] = []
        words = iter(options)
        for word in words:
            name, equals, value = word.partition("=")
            if self._is_long(name):
                separate = not equals
            elif self.short is not None and word.startswith(self.short):
                value = word.removeprefix(self.short)
                separate = not value
            else:
                rest.append(word)
                continue
            values.append((next(words, "") if separate else value) if self.has_value else word)
        return values, tuple(rest)

    def _is_long(self, name: str) -> bool:
        """Whether ``name`` is the long one or begins like it, which sbatch takes as well."""
        return len(name) > 2 and self.long.startswith(name)


DEPENDENCY = Option("--dependency", "-d")
EXPORT = Option("--export")
OUTPUT = Option("--output", "-o")
CHDIR = Option("--chdir", "-D")
_ARRAY = Option("--array", "-a")
# under which sbatch submits no job, or another, or says its number too late
_USELESS = (Option("--wrap"), Option("--test-only", None, False), Option("--wait", "-W", False))


def split_arguments(arguments: Iterable[str], stages: Sequence[str]) -> Given:
    """Tell ``section.key=value`` and ``@FILE`` from sbatch's options, which begin with "-" ("STAGE:-": for one stage).

    What follows an option and looks like no override is the option's value, as in ``-p gpu``.

    Args:
        stages: those that are submitted.

    Raises:
        UsageError: an argument is neither, or is for a stage that is not submitted.
    """
    overrides: list[str] = []
    options: dict[str | None, list[str]] = {}
    last: list[str] | None = None
    for argument in arguments:
        named = _FOR_STAGE.fullmatch(argument)
        if named is not None or argument.startswith("-"):
            stage, option = (named[1], named[2]) if named is not None else (None, argument)
            if stage is not None and stage not in stages:
                raise UsageError(f"'{argument}': {stage} is not submitted here, only {', '.join(stages)}")
            last = options.setdefault(stage, [])
            last.append(option)
        elif _OVERRIDE.match(argument):
            overrides.append(argument)
            last = None
        elif last is not None:
            last.append(argument)
            last = None
        else:
            raise UsageError(
                f"'{argument}': neither an override (section.key=value, @FILE) nor an option of sbatch (--...)"
            )
    common = tuple(options.pop(None, ()))
    return Given(tuple(overrides), common, {str(stage): tuple(given) for stage, given in options.items()})


def refuse_useless(options: Sequence[str], stage: str, is_array: bool) -> None:
    """Refuse options with which ``stage`` would not be what follows it, or what is said of it, rests on.

    Raises:
        UsageError: one line that says which.
    """
    for option in _USELESS:
        if option.take(options)[0]:
            raise UsageError(f"{option.long}: not for 'mta-ds slurm'; --dry-run shows what would be submitted")
    if not is_array and _ARRAY.take(options)[0]:
        raise UsageError(
            f"--array: every task would be a whole {stage}; only parse and generate have tasks (in a pipeline, "
            "parse:--array=...)"
        )


def with_site(options: Sequence[str], variable: str, inherited: str | None) -> tuple[str, ...]:
    """``options`` under which the environment variable that names the site's file reaches the job.

    Args:
        inherited: the --export that sbatch takes from its own environment (SBATCH_EXPORT) where none is given.
    """
    given, rest = EXPORT.take(options)
    export = given[-1] if given else inherited
    if export is None or "ALL" in export.upper().split(","):
        return tuple(options)
    names = () if export.upper() in ("NONE", "NIL") else (export,)
    return (*rest, f"--export={','.join((*names, variable))}")
