"""One YAML file becomes one validated, frozen object; ``section.key=value`` overrides it.

No domain knowledge lives here: each module owns the :class:`Section` that configures it, and a stage passes the
schema it wants to :func:`load`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mta_ds.errors import UsageError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_SHOULD_BE = "should be "


class Section(BaseModel):
    """Base of every configuration section: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


Schema = TypeVar("Schema", bound=Section)


def load(path: Path, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """Read ``path`` as YAML, apply overrides in their order and validate against ``schema``.

    Args:
        overrides: ``a.b=value``, the value in YAML syntax, or ``@FILE``, a YAML file of some sections' settings.

    Raises:
        UsageError: the file is missing or no YAML mapping, an override is malformed, or a key or value is wrong;
            one line with the file, the key and the nearest fix.
    """
    values = _read_mapping(Path(path))
    for override in overrides:
        if override.startswith("@"):
            _merge(values, _read_mapping(Path(override[1:])))
        else:
            _apply_override(values, override)
    return validate(values, schema, where=str(path))


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path}: no such config file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: the top level must be a mapping of sections, found {type(values).__name__}")
    return values


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put ``changes`` into ``values``, mapping into mapping."""
    for key, change in changes.items():
        if isinstance(change, dict) and isinstance(values.get(key), dict):
            _merge(values[key], change)
        else:
            values[key] = change


def validate(values: dict[str, Any], schema: type[Schema], where: str) -> Schema:
    """Validate plain values; ``where`` (a file name) opens the error line."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{where}: {_describe(error, schema)}") from None


def dump(config: Section) -> str:
    """The resolved configuration as YAML that :func:`load` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"override '{override}': write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"override '{override}': the value is not valid YAML; quote it") from None
    *parents, leaf = key.split(".")
    for parent in parents:
        child = values.get(parent)
        if not isinstance(child, dict):
            child = values[parent] = {}
        values = child
    values[leaf] = value


def _describe(error: ValidationError, schema: type[Section]) -> str:
    """The first problem of a validation error as one line: dotted key, what is wrong, nearest valid name."""
    problems = error.errors()
    # An unknown key explains a missing one (a misspelling is both), so it is told first.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    parts, owner = _locate(problem["loc"], schema)
    key = ".".join(parts)
    rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        names = list(owner.model_fields)
        near = difflib.get_close_matches(str(problem["loc"][-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(names)}"
        return f"{key}: unknown key; {hint}{rest}"
    if problem["type"] == "missing":
        return f"{key}: required key is missing{rest}"
    # where a value may be of several types, each of them has its problem with it
    same = [p for p in problems if _locate(p["loc"], schema)[0] == parts]
    rest = f" (and {len(problems) - len(same)} more)" if len(problems) > len(same) else ""
    given = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    message = " or ".join(dict.fromkeys(map(_message, same))).replace(f" or {_SHOULD_BE}", " or ")
    return f"{key}: {message}{given}{rest}" if key else f"{message}{rest}"


def _message(problem: ErrorDetails) -> str:
    """What is wrong, in YAML's words."""
    wanted = {"tuple_type": "a list", "model_type": "a mapping"}.get(problem["type"])
    if wanted is not None:
        return f"{_SHOULD_BE}{wanted}"
    return problem["msg"].removeprefix("Value error, ").removeprefix("Input ")


def _locate(location: tuple[int | str, ...], schema: type[Section]) -> tuple[list[str], type[BaseModel]]:
    """The dotted key of a problem, and the section that owns its last part.

    Where a value may be of one of several types, pydantic puts the name of one between the keys: it is no key.
    """
    owner: type[BaseModel] = schema
    models: list[type[BaseModel]] = []
    has_choice = False
    parts: list[str] = []
    for part in location:
        if models:
            owner, models = next((model for model in models if part in _tags(model)), models[0]), []
        if has_choice:
            has_choice = False
            continue
        parts.append(str(part))
        if (field := owner.model_fields.get(str(part))) is not None:
            models, has_choice = _models_in(field.annotation), _is_choice(field.annotation)
    return parts, owner


def _is_choice(annotation: Any) -> bool:
    """Whether a value may be of several types, None aside."""
    return get_origin(annotation) in (Union, UnionType) and len({*get_args(annotation)} - {NoneType}) > 1


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """The values of the literals that a model is chosen by."""
    return tuple(tag for field in model.model_fields.values() for tag in get_args(field.annotation))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
