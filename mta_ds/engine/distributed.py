"""The process group: ranks from torchrun, srun or our own launcher; the few reductions that a step needs."""

from __future__ import annotations

import datetime
import functools
import logging
import os
import subprocess
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from mta_ds.errors import UserError

T = TypeVar("T")

# Rank 0 may encode a corpus, or some ranks write text, for hours while others wait. A rank that is gone ends their wait
# at once all the same: its connections close.
_PATIENCE = datetime.timedelta(days=30)


def initialise() -> None:
    """Join the process group that the environment describes; alone, be a group of one.

    The environment is torchrun's (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) or srun's, from which the
    same five are derived.

    Raises:
        UserError: the port that rank 0 listens at is taken.
    """
    if dist.is_initialized():
        return
    _complete_environment()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch renames collectives that DeepSpeed still calls by their old names
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    # On a CPU DeepSpeed compiles an all-reduce that its inference alone calls: a minute at the first start, and ranks
    # wait for ever at the lock of such a build that was killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo",
            timeout=datetime.timedelta(minutes=30),
            verbose=False,
        )
    except RuntimeError as error:
        if "address already in use" not in str(error).lower():
            raise
        raise UserError(
            f"MASTER_PORT {os.environ['MASTER_PORT']}: something else listens there already; set MASTER_PORT to a free "
            "port, the same for every rank"
        ) from None


def shutdown() -> None:
    """Leave the process group; without it NCCL warns of a leak at exit."""
    if dist.is_initialized():
        _host_group.cache_clear()
        dist.destroy_process_group()


def rank() -> int:
    """This process' rank in the whole job."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks in the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process' rank on its own node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over ranks, in place; every rank must call it."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def sum_counts(counts: Sequence[int]) -> list[int]:
    """The sums of host integers over ranks; every rank must call it with as many.

    They travel through a group of their own over the hosts' network, so a GPU is never waited for.
    """
    if world_size() == 1:
        return list(counts)
    values = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(values, group=_host_group())
    return [int(value) for value in values]


def gather_objects(value: T) -> list[T]:
    """Every rank's value, by rank, over the hosts' network; every rank must call it."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value, group=_host_group())
    return values  # type: ignore[return-value]


@functools.cache
def _host_group() -> dist.ProcessGroup:
    """A gloo group of all ranks for what they tell one another, and wait for, beside the step's own collectives."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return group


def insist_on_agreement(values: dict[str, str]) -> None:
    """Compare what every rank must have in common; every rank must call it.

    Args:
        values: by what it is, in words.

    Raises:
        UserError: a rank has another value; on every rank.
    """
    everybody = gather_objects(values)
    for other, theirs in enumerate(everybody):
        if differing := [name for name, value in theirs.items() if value != everybody[0][name]]:
            raise UserError(
                f"rank {other} has another {differing[0]} than rank 0; start all ranks with the same code, "
                "configuration and files",
                on_every_rank=True,
            )


def barrier() -> None:
    """Wait for every rank, however long that takes."""
    if world_size() > 1:
        dist.barrier(group=_host_group())


def from_rank_zero(work: Callable[[], T]) -> T:
    """What ``work`` gives on rank 0, on every rank: a shared disk may show each another state, and all must go one way.

    A failure on rank 0 fails every rank with the same message instead of leaving them waiting.
    """
    if world_size() == 1:
        return work()
    told: list[Any] = [None, None]  # error, result
    if rank() == 0:
        try:
            told[1] = work()
        except UserError as error:
            error.on_every_rank = True
            told[0] = error
        except BaseException as error:
            # The others must not wait for a rank that is gone; rank 0 itself shows the traceback.
            told[0] = UserError(f"rank 0 failed: {type(error).__name__}: {error}", on_every_rank=True)
            dist.broadcast_object_list(told, src=0, group=_host_group())
            raise
    dist.broadcast_object_list(told, src=0, group=_host_group())
    failure, result = told
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def on_rank_zero_first(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0, then on the others, which find its result (a cache, a folder) already there.

    Failures are told as by :func:`from_rank_zero`. Inside of ``work`` the order is given already: a further call just
    runs its own.
    """
    if world_size() == 1 or _Ordered.inside:
        return work()
    found: list[T] = []
    from_rank_zero(lambda: found.append(_in_order(work)))
    return found[0] if found else _in_order(work)


class _Ordered:
    """Whether this process is inside of :func:`on_rank_zero_first`."""

    inside = False


def _in_order(work: Callable[[], T]) -> T:
    _Ordered.inside = True
    try:
        return work()
    finally:
        _Ordered.inside = False


def _complete_environment() -> None:
    """Fill in what the launcher left out: srun gives its own names, a plain start gives none."""
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
        if "MASTER_ADDR" not in env:  # a container may not have scontrol, and is told it by the batch script
            env["MASTER_ADDR"] = _first_host(env["SLURM_JOB_NODELIST"])
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    env.setdefault("MASTER_PORT", "0" if env["WORLD_SIZE"] == "1" else "29500")


def _first_host(nodelist: str) -> str:
    """The first host of a Slurm node list ("node[01-04]"), expanded by Slurm itself."""
    listing = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    return listing.stdout.split()[0]
