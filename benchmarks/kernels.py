"""Every Triton kernel compiled ahead of time, without a GPU: registers, spills, shared memory and occupancy.

    python benchmarks/kernels.py                                 # sm_80, sm_90 and sm_100, about two minutes
    python benchmarks/kernels.py --architectures 80 --json rows.json

A kernel that spills registers or does not fit is a row that does not hold, and the exit code is 1. What is printed
comes from the compiler: it says that a kernel runs well, not how fast; nothing here has run on a GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from common import Row, report
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mta_ds.ops.kernels import divergence, dsa, hid, segments, span_pool, token_weights, trajectory
from mta_ds.ops.kernels.launch import Specialisation

MODULES = (token_weights, segments, span_pool, dsa, hid, divergence, trajectory)
WIDTHS = (768, 1600, 2048, 4096, 8192)
WARP = 32


class Limits(NamedTuple):
    """What a streaming multiprocessor has (CUDA C++ programming guide, technical specifications)."""

    registers: int
    shared_bytes: int
    block_shared_bytes: int
    warps: int
    blocks: int


LIMITS = {
    80: Limits(65536, 164 << 10, 163 << 10, 64, 32),
    90: Limits(65536, 228 << 10, 227 << 10, 64, 32),
    100: Limits(65536, 228 << 10, 227 << 10, 64, 32),
}


class Usage(NamedTuple):
    """What a compiled kernel takes."""

    registers: int
    """Of a thread."""
    spilled_bytes: int
    shared_bytes: int
    occupancy: float
    """Share of a multiprocessor's warps that can be resident."""


def compile_for(kernel: Specialisation, architecture: int) -> Usage:
    """Compile to a cubin and read what it takes off it."""
    constexprs = dict.fromkeys(kernel.constexprs, "constexpr")
    signature = {name: (kernel.signature | constexprs)[name] for name in kernel.kernel.arg_names}
    # as a launch has it: pointers and sizes are multiples of 16, but for those that the form says are not
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if name not in kernel.odd
        and (kind.startswith("*") or name.endswith(("stride", "width", "features", "vocab_size")))
    }
    source = ASTSource(fn=kernel.kernel, signature=signature, constexprs=kernel.constexprs, attrs=aligned)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, WARP), options=options)
    registers, stack, static, local = _resource_usage(compiled.asm["cubin"])
    shared = max(static, compiled.metadata.shared)
    return Usage(registers, stack + local, shared, occupancy(registers, shared, kernel.num_warps, architecture))


def occupancy(registers: int, shared: int, num_warps: int, architecture: int) -> float:
    """Resident warps over the most that are possible; registers are given out 256 at a time to a warp."""
    limits = LIMITS[architecture]
    by_registers = limits.registers // (-(-registers * WARP // 256) * 256 * num_warps)
    by_shared = limits.shared_bytes // max(1, shared + 1024)
    blocks = min(by_registers, by_shared, limits.warps // num_warps, limits.blocks)
    return blocks * num_warps / limits.warps


def _resource_usage(cubin: bytes) -> tuple[int, int, int, int]:
    """Registers, stack, static shared memory and local memory of the one function in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump.stdout)
    if found is None:
        raise SystemExit(f"cuobjdump printed no resource usage: {dump.stdout}{dump.stderr}")
    registers, stack, shared, local = map(int, found.groups())
    return registers, stack, shared, local


def specialisations() -> dict[str, Specialisation]:
    """Every compiled form once: most work on blocks of features, so that all widths share one."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for module in MODULES:
        for width in WIDTHS:
            for form in module.specialisations(width):
                key = (form.name, form.odd, *form.constexprs.items(), *form.signature.items())
                found.setdefault(key, [form]).append(width)
    return {
        form.name if len(widths) == len(WIDTHS) else f"{form.name} {'/'.join(map(str, widths))}": form
        for form, *widths in found.values()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = [
        Row("compiled with", f"triton {triton.__version__}; widths {', '.join(map(str, WIDTHS))}; not run on a GPU")
    ]
    for architecture in options.architectures:
        for name, form in specialisations().items():
            usage = compile_for(form, architecture)
            fits = usage.shared_bytes <= LIMITS[architecture].block_shared_bytes and usage.occupancy > 0
            text = (
                f"{usage.registers} registers, {usage.spilled_bytes} bytes spilled, "
                f"{usage.shared_bytes / 1024:.0f} KiB shared, {form.num_warps} warps, {usage.occupancy:.0%} occupancy"
            )
            rows.append(Row(f"sm_{architecture} {name}", text, "", "no spill, fits", not usage.spilled_bytes and fits))
    report("Kernels compiled ahead of time", rows, options.json)
    sys.exit(any(row.holds is False for row in rows))


if __name__ == "__main__":
    main()
