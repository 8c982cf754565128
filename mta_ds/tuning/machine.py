"""The machines that a plan is made for: memory, rates and links of GPUs by name, or as given."""

from __future__ import annotations

import difflib
import os
import subprocess
from dataclasses import dataclass, replace
from typing import Any

import torch

from mta_ds.errors import UsageError, UserError

GB = 1e9


@dataclass(frozen=True, slots=True)
class Machine:
    """A number of equal nodes of equal GPUs. Bytes, bytes a second, FLOPs a second."""

    name: str
    memory: float
    """Of a GPU."""
    half: float
    """Peak rate in bf16, dense."""
    single: float
    """Peak rate of fp32 products."""
    bandwidth: float
    """Of a GPU's own memory."""
    intra: float
    """What a GPU receives from the others of its node in a gather."""
    host_link: float
    """Between a GPU and its node's memory."""
    inter: float = 50 * GB
    """What a node receives from the others, all its adapters together."""
    gpus_per_node: int = 1
    num_nodes: int = 1
    host_memory: float = 1000 * GB
    """Of a node."""
    host_bandwidth: float = 200 * GB
    """Of a node's memory."""
    efficiency: float = 0.4
    """Share of the peak rate that a model's products reach."""
    reserve: float = 3 * GB
    """Of a GPU's memory, for CUDA, NCCL and the allocator's gaps."""
    headroom: float = 0.05
    """Share of the rest that a plan leaves free, since it is a prediction."""
    is_gpu: bool = True
    rates_of: str | None = None
    """The GPU whose rates and links are assumed, where nobody knows this one's."""

    @property
    def num_ranks(self) -> int:
        return self.gpus_per_node * self.num_nodes

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a plan may fill."""
        return (1 - self.headroom) * (self.memory - self.reserve)

    def rate(self, element_bytes: int) -> float:
        """FLOPs a second that products of this width reach."""
        return (self.half if element_bytes == 2 else self.single) * self.efficiency


def _gpu(name: str, memory: float, half: float, single: float, bandwidth: float, intra: float, link: float) -> Machine:
    return Machine(name, memory * GB, half * 1e12, single * 1e12, bandwidth * GB, intra * GB, link * GB)


# Data sheets, dense rates; intra is one direction of NVLink (or PCIe) at the three quarters that NCCL reaches of it.
_KNOWN = {
    machine.name: machine
    for machine in (
        _gpu("a10-24", 24, 125, 31, 600, 20, 20),
        _gpu("l40s-48", 48, 362, 91, 864, 20, 20),
        _gpu("a100-40", 40, 312, 19.5, 1555, 225, 20),
        _gpu("a100-80", 80, 312, 19.5, 2039, 225, 20),
        _gpu("h100-80", 80, 989, 67, 3350, 337, 40),
        _gpu("h200-141", 141, 989, 67, 4800, 337, 40),
    )
}
KNOWN = tuple(_KNOWN)


def choose_machine(
    plan_only: bool,
    *,
    gpu: str | None = None,
    gpus_per_node: int | None = None,
    num_nodes: int = 1,
    memory: float | None = None,
    host_memory: float | None = None,
    intra: float | None = None,
    inter: float | None = None,
    efficiency: float | None = None,
) -> Machine:
    """A GPU by name, or this node's own, with what is told otherwise (GB, GB/s).

    Args:
        plan_only: without trials any machine can be planned for; with them it is this one, or this allocation, whose
            cores are the ranks where it has no GPU. A name then gives rates alone.

    Raises:
        UsageError: an unknown name; no GPU here and none named; trials of GPUs or nodes that are not here.
        UserError: this node's GPUs, or an allocation's, differ.
    """
    own = None if plan_only and gpu is not None else this_machine()
    if not plan_only:
        _insist_on_being_there(gpu, num_nodes, own)
    if gpu is not None:
        found = known_gpu(gpu)
        if own is not None:
            found = replace(found, memory=own.memory, gpus_per_node=own.gpus_per_node)
    elif own is not None:
        found = own
    elif not plan_only:
        found = cpu_machine(gpus_per_node or 1)
    elif memory is None:
        raise UsageError(f"no GPU here: say which to plan for, --gpu {'|'.join(KNOWN)}, or --gpu-memory GB")
    else:
        found = replace(known_gpu("a100-80"), name=f"a GPU of {memory:g} GB", rates_of="a100-80")
    sizes = {"memory": memory, "host_memory": host_memory, "intra": intra, "inter": inter}
    given: dict[str, Any] = {name: value * GB for name, value in sizes.items() if value is not None}
    if gpus_per_node is not None:
        given["gpus_per_node"] = gpus_per_node
    if efficiency is not None:
        given["efficiency"] = efficiency
    return replace(found, num_nodes=num_nodes, **given)


def _insist_on_being_there(gpu: str | None, num_nodes: int, own: Machine | None) -> None:
    """Trials run on this machine, or on this job's nodes; UsageError for any other."""
    if gpu is not None and own is None:
        raise UsageError(f"--gpu {gpu}: there is no GPU here to run trials on; to plan for others give --plan-only")
    if num_nodes == 1:
        return
    if "SLURM_JOB_ID" not in os.environ:
        raise UsageError(f"--nodes {num_nodes}: trials need an allocation (slurm/tune.sbatch); to plan, --plan-only")
    if own is not None:
        insist_on_equal_nodes(num_nodes)


def insist_on_equal_nodes(num_nodes: int) -> None:
    """Compare the GPUs of all nodes of this job; what cannot be asked is not compared.

    Raises:
        UserError: they differ.
    """
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            ["srun", f"--nodes={num_nodes}", "--ntasks-per-node=1", *asked], capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    kinds = sorted({line.strip() for line in done.stdout.splitlines() if line.strip()})
    if done.returncode == 0 and len(kinds) > 1:
        raise UserError(f"this job's GPUs differ ({'; '.join(kinds)}): ask for equal ones with sbatch --constraint")


def known_gpu(name: str) -> Machine:
    """One GPU by name.

    Raises:
        UsageError: nobody knows it.
    """
    if name in _KNOWN:
        return _KNOWN[name]
    near = difflib.get_close_matches(name.lower(), KNOWN, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(KNOWN)}"
    raise UsageError(f"--gpu {name}: unknown GPU; {hint} or take one like it and give --gpu-memory")


def this_machine() -> Machine | None:
    """The GPUs of this node, as its driver names them; None where there are none.

    Raises:
        UserError: they differ: a plan is for equal ones.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return None
    found = [torch.cuda.get_device_properties(i) for i in range(count)]
    if len(kinds := sorted({f"{gpu.name} of {gpu.total_memory / GB:.0f} GB" for gpu in found})) > 1:
        raise UserError(f"this node's GPUs differ ({'; '.join(kinds)}): choose equal ones with CUDA_VISIBLE_DEVICES")
    words = found[0].name.lower().replace("-", " ").split()
    alike = [m for m in _KNOWN.values() if m.name.partition("-")[0] in words]
    like = min(alike or [_KNOWN["a100-80"]], key=lambda m: abs(m.memory - found[0].total_memory))
    return replace(
        like,
        name=found[0].name,
        memory=float(found[0].total_memory),
        gpus_per_node=count,
        rates_of=None if alike else like.name,
    )


def cpu_machine(num_ranks: int) -> Machine:
    """This machine's cores as ranks: for trials without a GPU. Its memory is all ranks'; rates are rough."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    rate = 60e9 * (os.cpu_count() or 1) / num_ranks
    share = 10 * GB / num_ranks
    return Machine(
        *("cpu", total / num_ranks, rate, rate, share, share, share),
        gpus_per_node=num_ranks,
        host_memory=total,
        host_bandwidth=10 * GB,
        efficiency=0.5,
        reserve=1 * GB,
        is_gpu=False,
    )
