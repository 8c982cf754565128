"""The memory model, recomputed by hand for a step of a few hundred elements, and what must hold of any."""

from __future__ import annotations

import dataclasses

import pytest
from tuning_cases import small_machine, small_plan, small_work

from mta_ds.models.key_layers import KeyLayer
from mta_ds.tuning.memory import memory, student_activations
from mta_ds.tuning.shapes import ModelShape


def big(shape: ModelShape) -> ModelShape:
    """The same, too large for any of its parameters to stay whole."""
    times = 100_000
    return dataclasses.replace(
        shape,
        parameters=shape.parameters * times,
        layer_parameters=shape.layer_parameters * times,
        sizes=tuple(size * times for size in shape.sizes),
    )


def big_work(**changes):
    work = small_work()
    return dataclasses.replace(
        work,
        **{"student": big(work.student), "teacher": big(work.teacher), "trained": 10_000_032} | changes,
    )


def test_stage_2_by_hand() -> None:
    needed = memory(small_work(), small_plan(), small_machine())
    # 100 + 32 elements of 2 bytes; all trained ones cut over 2 ranks; two buckets of 7
    assert needed.always == {
        "student weights": 264,
        "student gradients": 132,
        "student master weights and moments": 792,
        "reduce buckets": 28,
        "teacher partitions": 1000,
        "teacher small parameters": 2000,  # all five are below the threshold, so whole as well
    }
    assert needed.host == {"asynchronous checkpoint": 792}
    # 20 tokens: two layers of 50 bytes each and 5 outside; a mask of 2 sequences of 10 x 10
    assert student_activations(small_work(), small_plan()) == {"student activations": 2100, "attention mask": 400}
    teacher = needed.phases["teacher's forward"]
    assert teacher["teacher gathered parameters"] == 2 * (200 + 3)
    assert teacher["teacher layer at work"] == 20 * 60
    assert teacher["key layers' states"] == 2 * 20 * 4
    assert teacher["key layers' stored gradients"] == pytest.approx(2 * (20 * 4 * (1 + 195 / 256) + 32))
    assert teacher["projected tokens"] == 20 * 8 * (4 + 4 + 2) + 4 * 8 * 4
    heads = needed.phases["heads"]
    assert heads["logits chunk"] == 20 * 10 * (4 + 4 + 2)  # all 20 tokens at once
    assert heads["student head's gradient"] == 4 * 40
    assert heads["teacher's LM head"] == 2 * 25 * 8
    assert needed.phases["optimizer"] == {"fp32 gradients of the step": 4 * 66, "teacher's LM head": 400}
    assert needed.peak == sum(needed.always.values()) + max(sum(p.values()) for p in needed.phases.values())


def test_checkpointing_keeps_a_layers_input_and_recomputes_one() -> None:
    work, plan = small_work(), small_plan(gradient_checkpointing=True)
    assert student_activations(work, plan)["student activations"] == 20 * (2 * 2 * 4 + 5)
    assert memory(work, plan, small_machine()).phases["backward"]["student layer recomputed"] == 20 * 50


def test_offloads_move_to_the_host() -> None:
    plan = small_plan(student_stage=3, offload_optimizer=True, offload_teacher=True)
    needed = memory(big_work(), plan, small_machine())
    trained = 10_000_032
    assert needed.host["student master weights and moments"] == 12 * trained / 2
    assert needed.host["student gradients"] == 6 * trained / 2
    assert needed.host["teacher partitions"] == 2 * 100_000_000 / 2
    assert "teacher partitions" not in needed.always
    assert "student master weights and moments" not in needed.always
    assert needed.phases["optimizer"] == {"teacher's LM head": 400}


def test_hpz_keeps_a_second_cut_in_the_node() -> None:
    machine = small_machine(num_nodes=4)
    needed = memory(big_work(), small_plan(teacher_hpz=2), machine)
    assert needed.always["teacher partitions"] == 2 * 100_000_000 / 8
    assert needed.always["teacher hpZ partitions"] == 2 * 100_000_000 / 2


def test_options_of_a_run_add_their_parts() -> None:
    by_entropy = memory(small_work(keeps_teacher_states=True), small_plan(), small_machine())
    assert by_entropy.phases["teacher's forward"]["teacher states kept for entropy"] == 2 * 20 * 8
    writes = memory(small_work(rollouts=True), small_plan(), small_machine())
    assert writes.phases["rollouts"] == {"whole student while it writes": 200}
    assert memory(small_work(asynchronous_saves=False), small_plan(), small_machine()).host == {}
    pairs = memory(small_work(sequences_per_sample=2), small_plan(), small_machine())
    assert pairs.phases["heads"]["logits chunk"] == 40 * 10 * 10
    plain = memory(small_work(teacher=None, key_layers=(), teacher_head=False), small_plan(), small_machine())
    assert not any("teacher" in name for name in plain.always)


def test_a_rank_alone_gathers_nothing() -> None:
    alone = memory(big_work(), small_plan(student_stage=3, resident=True), small_machine(gpus_per_node=1))
    assert "student gathered weights" not in alone.phases["heads"]
    assert alone.phases["heads"]["teacher's LM head"] == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"offload_optimizer": True}, {"gradient_checkpointing": True}])
def test_more_ranks_never_need_more_memory_on_each(stage: int, changes: dict) -> None:
    plan = small_plan(student_stage=stage, **changes)
    peaks = [memory(big_work(), plan, small_machine(gpus_per_node=n)).peak for n in (2, 3, 4, 8, 64)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[-1]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_higher_stage_never_holds_more(ranks: int) -> None:
    machine = small_machine(gpus_per_node=ranks)
    states = [sum(memory(big_work(), small_plan(student_stage=s), machine).always.values()) for s in (1, 2, 3)]
    assert states[0] > states[1] > states[2]


def test_logits_stop_growing_at_a_chunk() -> None:
    wide = dataclasses.replace(small_work().student, vocabulary=128_256)
    work = small_work(student=wide, sequence_length=8192, key_layers=(KeyLayer(1, 2, "phrase"),))
    sizes = [
        memory(work, small_plan(micro_batch_size=m), small_machine()).phases["heads"]["logits chunk"] for m in (1, 4)
    ]
    assert sizes[0] == sizes[1] <= 1 << 30
