"""The import arrows of the design: which part of the package may know which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mta_ds

PACKAGE = Path(mta_ds.__file__).parent
LEAVES = {"config", "files", "errors"}
# importer -> parts it may import; every part may import the leaves, and itself
ARROWS: dict[str, set[str]] = {
    "config": set(),
    "files": set(),
    "errors": set(),
    "spans": set(),
    "ops": set(),
    "data": {"spans"},
    "losses": {"ops"},
    "models": set(),
    "evaluation": {"models", "data", "losses"},
    "engine": {"losses", "models", "data", "spans", "evaluation"},
    "launch": set(),
    "tuning": {"engine", "models", "data", "losses", "ops", "launch"},  # of the ops it reads how much they take at once
    "demo": {"spans", "data", "models", "engine", "evaluation", "launch"},
    "cli": {"spans", "data", "models", "engine", "evaluation", "launch", "demo", "cli_slurm", "tuning"},
    "cli_slurm": {"spans", "engine", "evaluation", "launch"},
    "__main__": {"cli"},
    "__init__": {"spans", "data", "engine", "evaluation", "losses", "demo"},
}


def imported_parts(path: Path) -> set[str]:
    """The package's parts that a file imports, also inside functions and for type checking."""
    parts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "mta_ds":
                names = [f"mta_ds.{alias.name}" for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("mta_ds.")}
    return parts


FILES = sorted(p for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = ARROWS[part] | LEAVES | {part} if part not in LEAVES else ARROWS[part] | {"errors"}
    assert imported_parts(path) <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "a module says what it is for"
