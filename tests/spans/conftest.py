"""The bundled parser, the scripts that trained it, and one that takes no time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from span_cases import RightBranching

from mta_ds.spans import parse as module
from mta_ds.spans.benepar_parser import BeneparParser
from mta_ds.spans.parser import load_parser

EXAMPLES = Path(__file__).parents[2] / "examples" / "parser"


@pytest.fixture(scope="module")
def bundled() -> BeneparParser:
    parser = load_parser(None)
    assert isinstance(parser, BeneparParser)
    return parser


@pytest.fixture(scope="module")
def examples() -> Iterator[None]:
    """examples/parser importable, as when its scripts run."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> RightBranching:
    instance = RightBranching()
    monkeypatch.setattr(module, "load_parser", lambda spec, device: instance)
    # this parser is in this process only
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    return instance
