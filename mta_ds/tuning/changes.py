"""When nothing fits: what the leanest plan lacks, and the smallest changes after which one fits, each of them tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from mta_ds.tuning.machine import GB, Machine
from mta_ds.tuning.search import REDUCE_BUCKETS, Search, judge, plans
from mta_ds.tuning.shapes import Workload, with_length

_LENGTH_STEP = 64
_MAX_RANKS = 4096
_MAX_MEMORY = 16_384  # GB, more than any GPU or node has


def explain_nothing_fits(work: Workload, machine: Machine, found: Search) -> str:
    """In a line: what the leanest plan needs, and the smallest changes after which something fits."""
    leanest = found.pruned[0]
    changes = [*_of_the_run(work, machine), *_more_ranks(work, machine), *_memories(work, machine)]
    return (
        f"no plan fits {machine.num_ranks} x {machine.name} of {machine.memory / GB:.0f} GB: even "
        f"'{leanest.plan.describe()}': {leanest.reason}; "
        + (f"smallest change: {', or '.join(changes)}" if changes else "no change of the run or machine is enough")
    )


def fits_at_all(work: Workload, machine: Machine) -> bool:
    """Whether any plan fits; the leanest buckets decide."""
    return any(
        judge(work, plan, machine).reason is None
        for plan in plans(work, machine)
        if plan.reduce_bucket_size == REDUCE_BUCKETS[0] and plan.prefetch_bucket_size == 0
    )


def _of_the_run(work: Workload, machine: Machine) -> Iterator[str]:
    """Checkpoints that are written at once; the longest sequences that fit."""
    if work.asynchronous_saves and fits_at_all(_without_copy(work), machine):
        yield "train.asynchronous_saves: false"
    steps = (work.sequence_length - 1) // _LENGTH_STEP
    lengths = [_LENGTH_STEP * step for step in range(steps, 0, -1)]
    first = _first(lambda i: fits_at_all(with_length(work, lengths[i]), machine), len(lengths))
    if first is not None:
        yield f"data.max_length: {lengths[first]} instead of {work.sequence_length}"


def _more_ranks(work: Workload, machine: Machine) -> Iterator[str]:
    """More GPUs, up to 8 of a node, then more nodes; the batch of a rank being at least one sample."""
    gpus, nodes = machine.gpus_per_node, machine.num_nodes
    larger = [(count, 1) for count in range(gpus + 1, 9)] if nodes == 1 else []
    per_node = max(8, gpus) if nodes == 1 else gpus
    larger += [(per_node, count) for count in range(nodes + 1, _MAX_RANKS // per_node + 1)]
    machines = [replace(machine, gpus_per_node=count, num_nodes=of) for count, of in larger]
    one = replace(work, batch_per_rank=1)
    first = _first(lambda i: fits_at_all(one, machines[i]), len(machines))
    if first is not None:
        enough = machines[first]
        where = f" on {enough.num_nodes} nodes" if enough.num_nodes > 1 else ""
        yield f"{enough.num_ranks} {_noun(machine)}{where} instead of {machine.num_ranks}"


def _memories(work: Workload, machine: Machine) -> Iterator[str]:
    """More memory of a GPU or of its node; where neither is enough, of both, or checkpoints written at once as well."""

    def least(start: float, work: Workload, sized: Callable[[float], Machine]) -> int | None:
        sizes = range(int(start / GB) + 1, _MAX_MEMORY + 1)
        first = _first(lambda i: fits_at_all(work, sized(sizes[i] * GB)), len(sizes))
        return None if first is None else sizes[first]

    ours, theirs = machine.memory, machine.host_memory
    gpus = f"{_noun(machine)} of {{}} GB instead of {ours / GB:.0f}"
    node = f"{{}} GB of memory in a node instead of {theirs / GB:.0f}"
    gpu = least(ours, work, lambda size: replace(machine, memory=size))
    host = least(theirs, work, lambda size: replace(machine, host_memory=size))
    if gpu is not None:
        yield gpus.format(gpu)
    if host is not None:
        yield node.format(host)
    if gpu is not None or host is not None:
        return
    gpu = least(ours, _without_copy(work), lambda size: replace(machine, memory=size))
    if work.asynchronous_saves and gpu is not None:
        yield f"{gpus.format(gpu)} and train.asynchronous_saves: false"
    gpu = least(ours, work, lambda size: replace(machine, memory=size, host_memory=_MAX_MEMORY * GB))
    if gpu is not None:
        enough = replace(machine, memory=gpu * GB)
        host = least(theirs, work, lambda size: replace(enough, host_memory=size))
        yield f"{gpus.format(gpu)} and {node.format(host)}"


def _first(is_enough: Callable[[int], bool], count: int) -> int | None:
    """The least index that is enough, where all after it are; None where not even the last is."""
    if not count or not is_enough(count - 1):
        return None
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return high


def _without_copy(work: Workload) -> Workload:
    return replace(work, asynchronous_saves=False)


def _noun(machine: Machine) -> str:
    return "GPUs" if machine.is_gpu else "ranks"
