"""The benchmarks run, and measure one and the same loss; how fast is not a test's business."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: str) -> None:
    # kernels are compiled here, whatever other tests have told Triton
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_ops_smoke_run_writes_rows_and_checks_equality(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--small", "--dtype", "float32", "--repeats", "1", "--threads", "1", "--json", str(file)]
    run("ops.py", *arguments)
    rows = json.loads(file.read_text())
    assert all(set(row) == {"name", "value", "unit", "bound", "holds"} for row in rows)
    assert all((row["bound"] is None) == (row["holds"] is None) for row in rows)
    named = {row["name"]: row for row in rows}
    equality = named["published and ours: worst relative difference of value and gradients"]
    assert equality["holds"] and 0 < equality["value"] <= 1e-4
    assert named["machine"]["value"]
    assert {"fp32 4x32 published", "fp32 2x32 dsa", "fp32 64 tokens x 512 srkl ours"} <= set(named)


def test_every_kernel_compiles_for_every_architecture_without_a_spill(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    run("kernels.py", "--json", str(file))
    rows = [row for row in json.loads(file.read_text()) if row["holds"] is not None]
    assert all(row["holds"] for row in rows)
    for architecture in (80, 90, 100):
        names = " ".join(row["name"] for row in rows if row["name"].startswith(f"sm_{architecture} "))
        assert all(op in names for op in ("row_sums", "column_sums", "pool", "pool_gradient", "dsa", "hid", "srkl"))


def test_the_roofline_of_the_largest_pair_holds(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    run("roofline.py", "--json", str(file))
    promised = [row for row in json.loads(file.read_text()) if row["bound"] is not None]
    assert len(promised) == 1 and promised[0]["holds"] and 0.5 < promised[0]["value"] <= 2


def test_generation_smoke_run_gives_transformers_tokens(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    run("generate.py", "--small", "--repeats", "1", "--threads", "1", "--json", str(file))
    named = {row["name"]: row for row in json.loads(file.read_text())}
    equal = [row for name, row in named.items() if name.endswith("responses with the same tokens")]
    assert len(equal) == 2 and all(row["value"] == 1 and row["holds"] for row in equal)
    assert named["one batch of 4: ours / transformers, speed"]["bound"] == ">= 0.9"


def test_store_smoke_run_measures_lookups_and_memory(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    run("store.py", "--small", "--json", str(file))
    named = {row["name"]: row for row in json.loads(file.read_text())}
    assert named["10⁶ random lookups, one core"]["value"] > 0 and named["words a row"]["value"] > 10
    growth = [row for name, row in named.items() if name.startswith("peak memory") and row["bound"] is not None]
    assert len(growth) == 2 and all(0.9 < row["value"] < 1.5 for row in growth)
