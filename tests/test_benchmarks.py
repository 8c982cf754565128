"""The benchmarks run, and measure one and the same loss; how fast is not a test's business."""

import json
import subprocess
import sys
from pathlib import Path

OPS = Path(__file__).parents[1] / "benchmarks" / "ops.py"


def test_ops_smoke_run_writes_rows_and_checks_equality(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--small", "--dtype", "float32", "--repeats", "1", "--threads", "1", "--json", str(file)]
    done = subprocess.run([sys.executable, str(OPS), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())
    assert all(set(row) == {"name", "value", "unit", "bound", "holds"} for row in rows)
    assert all((row["bound"] is None) == (row["holds"] is None) for row in rows)
    named = {row["name"]: row for row in rows}
    equality = named["published and ours: worst relative difference of value and gradients"]
    assert equality["holds"] and 0 < equality["value"] <= 1e-4
    assert named["machine"]["value"]
    assert {"fp32 4x32 published", "fp32 2x32 dsa", "fp32 64 tokens x 512 srkl ours"} <= set(named)
