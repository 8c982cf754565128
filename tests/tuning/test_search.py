"""The search: all of the batch's cuts, reasons of what does not fit, the three published pairs, nothing that fits."""

from __future__ import annotations

import dataclasses

import pytest
from tuning_cases import preset, small_machine, small_plan, small_work

from mta_ds.errors import UserError
from mta_ds.tuning.machine import known_gpu
from mta_ds.tuning.memory import memory
from mta_ds.tuning.search import (
    Correction,
    divisors,
    global_batch,
    judge,
    plans,
    search,
    with_global_batch,
)
from mta_ds.tuning.shapes import workload


def cluster(gpu: str, gpus: int, nodes: int = 1, **changes: float):
    return dataclasses.replace(known_gpu(gpu), gpus_per_node=gpus, num_nodes=nodes, **changes)


def test_every_plan_keeps_the_batch() -> None:
    tried = list(plans(small_work(batch_per_rank=6), small_machine()))
    assert {(p.micro_batch_size, p.gradient_accumulation_steps) for p in tried} == {(1, 6), (2, 3), (3, 2), (6, 1)}
    assert len(tried) == len(set(tried))
    assert {p.student_stage for p in tried} == {1, 2, 3}
    assert {p.offload_optimizer for p in tried} == {p.offload_teacher for p in tried} == {False, True}


def test_hpz_is_tried_on_several_nodes_only_and_never_beside_offload() -> None:
    assert {p.teacher_hpz for p in plans(small_work(), small_machine())} == {1}
    tried = list(plans(small_work(), small_machine(num_nodes=2)))
    assert {p.teacher_hpz for p in tried} == {1, 2}
    assert not any(p.teacher_hpz > 1 and p.offload_teacher for p in tried)


def test_a_cpu_has_nowhere_to_offload_to() -> None:
    tried = list(plans(small_work(), small_machine(is_gpu=False)))
    assert not any(p.offload_optimizer or p.offload_teacher for p in tried)


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_reasons_say_how_much_and_of_what() -> None:
    work, plan = small_work(), small_plan()
    needed = memory(work, plan, small_machine())
    exactly = small_machine(memory=needed.peak)
    assert judge(work, plan, exactly).reason is None
    reason = judge(work, plan, small_machine(memory=needed.peak - 1)).reason
    assert reason is not None and needed.peak_phase in reason and needed.largest[0][0] in reason
    host = judge(work, plan, small_machine(host_memory=1.0)).reason
    assert host is not None and "a node's memory" in host


def test_a_correction_moves_what_fits_and_how_long_it_takes() -> None:
    work, plan = small_work(), small_plan()
    machine = small_machine(memory=memory(work, plan, small_machine()).peak)
    judged = judge(work, plan, machine, Correction(memory=1.1, time=3.0))
    assert judged.reason is not None
    assert judged.time.total == pytest.approx(3 * judge(work, plan, machine).time.total)


def test_a_global_batch_is_shared_or_refused() -> None:
    machine = small_machine()
    assert with_global_batch(small_work(), 12, machine).batch_per_rank == 6
    assert global_batch(small_work(), machine) == 8
    with pytest.raises(UserError, match="a global batch of 13 cannot be shared by 2 ranks; the nearest that can is 12"):
        with_global_batch(small_work(), 13, machine)


def test_gpt2_on_one_40_gb_gpu(tmp_path) -> None:
    work = workload(preset(tmp_path, "gpt2-fdd-mta", "gpt2-xl", "gpt2"))
    found = search(work, cluster("a100-40", 1))
    # 3.1 GB of teacher, (2 + 2 + 12) x 0.128 B of student: everything fits, so nothing is moved or recomputed
    best = found.fitting[0]
    assert not found.pruned
    assert best.plan.micro_batch_size == 16
    assert not (best.plan.offload_optimizer or best.plan.offload_teacher or best.plan.gradient_checkpointing)
    assert best.memory.always["teacher partitions"] == 2 * 1_557_611_200


def test_8b_to_1b_on_8_gpus_of_80_gb(tmp_path) -> None:
    work = workload(preset(tmp_path, "8b-to-1b", "8b", "1b", "train.micro_batch_size=32"))
    found = search(work, cluster("a100-80", 8))
    on_gpus = next(c for c in found.fitting if not c.plan.offload_teacher)
    assert on_gpus.memory.always["teacher partitions"] == pytest.approx(2 * 8.03e9 / 8, rel=1e-3)
    # 64 sequences of 2,048 tokens on a rank: 112 kB a token and layer, 16 layers: 240 GB without checkpointing
    assert {c.plan.micro_batch_size for c in found.pruned} >= {64}
    assert all("student activations" in (c.reason or "") for c in found.pruned if not c.plan.gradient_checkpointing)


def test_70b_to_8b_on_4_nodes_of_8_gpus(tmp_path) -> None:
    work = workload(preset(tmp_path, "70b-to-8b", "70b", "8b"))
    found = search(work, cluster("a100-80", 8, 4))
    best = found.fitting[0]
    assert best.plan.student_stage == 3
    assert (best.memory.always | best.memory.host)["teacher partitions"] == pytest.approx(141.1e9 / 32, rel=1e-3)
    # whole weights (16 GB) and whole gradients (16 GB) leave no room beside hpZ's 17.6 GB and activations
    first = [c for c in found.pruned if c.plan.student_stage == 1 and not c.plan.offload_optimizer]
    assert first and all(c.reason for c in first)
    assert any(c.plan.teacher_hpz == 8 for c in found.fitting)
