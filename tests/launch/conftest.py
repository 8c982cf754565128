"""A Slurm of our own, and the command as a user calls it."""

from __future__ import annotations

import contextlib
import getpass
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, Command, missing_programs

from mta_ds.cli import main


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"Slurm is not installed here: no {', '.join(missing)}")
    if getpass.getuser() != "root":
        pytest.skip("a Slurm of our own can be started by root alone")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    before = os.environ.copy()
    os.environ |= cluster.environment | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        os.environ.clear()
        os.environ |= before


@pytest.fixture(scope="session")
def mta_ds() -> Command:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["mta-ds", *map(str, arguments)])
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        return int(ended.value.code or 0), out.getvalue(), err.getvalue()

    return run
