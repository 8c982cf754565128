"""The memory model, recomputed by hand for a step of a few hundred elements, and what must hold of any."""

from __future__ import annotations

import dataclasses

import pytest
from tuning_cases import small_machine, small_plan, small_work

from mta_ds.models import zero
from mta_ds.models.key_layers import KeyLayer
from mta_ds.tuning.memory import memory, student_activations
from mta_ds.tuning.shapes import ModelShape, Writing


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


def test_a_teachers_layer_that_is_gathered_whole_counts_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    # five parameters of 200, the layer 300 of them: more than the largest
    work = small_work(teacher=dataclasses.replace(small_work().teacher, layer_parameters=300))
    monkeypatch.setattr(zero, "SMALL_LAYER", 0)
    for prefetch, gathered in ((299, 200 + 299), (300, 300 + 300)):
        needed = memory(work, small_plan(prefetch_bucket_size=prefetch), small_machine())
        assert needed.phases["teacher's forward"]["teacher gathered parameters"] == 2 * gathered


def test_stage_2_by_hand() -> None:
    needed = memory(small_work(), small_plan(), small_machine())
    # 100 + 32 elements of 2 bytes; all trained ones cut over 2 ranks; two micro-steps add to the gradients
    assert needed.always == {
        "student weights": 264,
        "student gradients": 132,
        "student master weights and moments": 792,
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
    assert teacher["key layers' stored gradients"] == pytest.approx(2 * 20 * 4 * (1 + 195 / 256) + 4 * 32)
    assert teacher["projected tokens"] == 20 * 8 * (4 + 4 + 2) + 4 * 8 * 4
    heads = needed.phases["heads"]
    assert heads["logits chunk"] == 20 * 10 * (4 + 4 + 2)  # all 20 tokens at once
    assert heads["student head's gradient"] == 4 * 40
    assert heads["teacher's LM head"] == 2 * 25 * 8
    assert needed.phases["backward's end"] == {"reduce buckets": 2 * 2 * 7, "teacher's LM head": 400}
    assert needed.phases["optimizer"] == {"fp32 gradients of the step": 4 * 66, "teacher's LM head": 400}
    assert needed.peak == sum(needed.always.values()) + max(sum(p.values()) for p in needed.phases.values())


def test_checkpointing_keeps_a_layers_input_and_recomputes_one() -> None:
    work, plan = small_work(), small_plan(gradient_checkpointing=True)
    assert student_activations(work, plan)["student activations"] == 20 * (2 * 2 * 4 + 5)
    assert memory(work, plan, small_machine()).phases["backward's start"]["student layer recomputed"] == 20 * 50


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
    writes = memory(small_work(writing=Writing(3, 4)), small_plan(), small_machine())
    # three sequences of 10 tokens, 16 elements of keys and values each
    assert writes.phases["rollouts"] == {"whole student while it writes": 200, "keys and values": 2 * 16 * 3 * 10}
    assert memory(small_work(asynchronous_saves=False), small_plan(), small_machine()).host == {}
    pairs = memory(small_work(sequences_per_sample=2), small_plan(), small_machine())
    assert pairs.phases["heads"]["logits chunk"] == 40 * 10 * 10
    plain = memory(small_work(teacher=None, key_layers=(), teacher_head=False), small_plan(), small_machine())
    assert not any("teacher" in name for name in plain.always)


def test_gradients_of_one_micro_step_exist_from_backward_to_the_step() -> None:
    plan = small_plan(gradient_accumulation_steps=1)
    needed = memory(small_work(), plan, small_machine())
    assert "student gradients" not in needed.always | needed.phases["heads"] | needed.phases["backward's start"]
    assert needed.phases["backward's end"]["student gradients"] == 132
    assert needed.phases["optimizer"]["student gradients"] == 132
    third = memory(small_work(), dataclasses.replace(plan, student_stage=3), small_machine())
    assert (third.always["student gradients"], third.always["reduce buckets"]) == (132, 14)  # made once


def test_fdd_goes_through_the_heads_inside_the_teachers_forward() -> None:
    needed = memory(small_work(trajectory=(1, 2), trajectory_normed=True), small_plan(), small_machine())
    within, heads = needed.phases["teacher's forward"], needed.phases["heads"]
    assert within["logits chunk"] == 2 * heads["logits chunk"]  # this layer's and the one's before
    assert within["student head's gradient"] == 4 * 40
    assert within["teacher's LM head"] == heads["teacher's LM head"] == 400
    assert within["FDD's teacher states"] == 4 * 2 * 20 * 8
    assert within["FDD's stored gradients"] == heads["FDD's stored gradients"] == 4 * 20 * 4 * 3
    assert within["key layers' states"] == 2 * 20 * 4 * 2  # MTA taps layer 1 as well
    assert within["FDD's normed states"] == 20 * 2 * (2 * 4 + 5)


def test_a_frozen_head_has_no_gradient() -> None:
    work = small_work(adapters=True, trained=42)
    needed = memory(work, small_plan(), small_machine())
    assert needed.phases["heads"]["student head's gradient"] == 0
    assert needed.always["student weights"] == 2 * (100 + 42)


def test_a_kept_student_is_gathered_once_and_whole() -> None:
    plan = small_plan(student_stage=3, resident=True)
    needed = memory(big_work(), plan, small_machine())
    assert needed.phases["heads"]["student gathered weights"] == 2 * 10_000_000
    released = memory(big_work(), dataclasses.replace(plan, resident=False), small_machine())
    assert released.phases["heads"]["student gathered weights"] == 2 * (4_000_000 + 3_000_000 + 3 + 40)


def test_on_a_cpu_the_heap_keeps_what_it_has_grown_to() -> None:
    machine = small_machine(is_gpu=False)
    needed = memory(small_work(), small_plan(), machine)
    assert needed.always["libraries at work"] > 0
    kept = "freed, but kept by the heap"
    mapped = {"student gradients", "fp32 gradients of the step", "logits chunk", "reduce buckets"}
    grown = {sum(size for name, size in parts.items() if name not in mapped) for parts in needed.phases.values()}
    assert len({round(size, 3) for size in grown}) == 1
    assert needed.phases["optimizer"][kept] > 2100  # the activations among them
    assert kept not in memory(small_work(), small_plan(), small_machine()).phases["optimizer"]


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
