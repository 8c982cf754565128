"""Fixtures that several parts of the suite share."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import make_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher and student with records and their spans; read only."""
    return make_pair(tmp_path_factory.mktemp("pair"))
