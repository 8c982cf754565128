"""The time model, recomputed by hand."""

from __future__ import annotations

import dataclasses

import pytest
from tuning_cases import small_machine, small_plan, small_work

from mta_ds.tuning.shapes import Writing
from mta_ds.tuning.time import LATENCY, model_flops, step_time

LATENT = LATENCY["node"]


def test_products_by_hand() -> None:
    work, machine = small_work(), small_machine()
    student = 2 * 60 * 20 + 2 * 2 * 100 * 4 * 2  # two layers of 30 elements, 20 tokens; attention
    assert sum(model_flops(work.student, 2, 10)) == student
    teacher = 2 * 800 * 20 + 2 * 2 * 100 * 8 * 4
    parts = step_time(work, small_plan(), machine).parts
    rate = 1000 * 0.5 * 20 / (20 + 256)
    assert parts["student"] == pytest.approx(2 * 3 * student / rate)
    assert parts["recomputation"] == 0
    assert parts["teacher"] == pytest.approx(2 * teacher / rate)
    assert parts["LM heads and divergence"] == pytest.approx(2 * 20 * (6 * 40 + 2 * 200) / rate)
    assert parts["optimizer step"] == pytest.approx(30 * 66 / 300)


def test_frozen_weights_have_no_gradient_to_compute() -> None:
    whole, frozen = (
        step_time(small_work(adapters=adapters), small_plan(), small_machine()).parts for adapters in (False, True)
    )
    rate = 1000 * 0.5 * 20 / (20 + 256)
    assert whole["student"] - frozen["student"] == pytest.approx(2 * 2 * 60 * 20 / rate)
    assert whole["LM heads and divergence"] - frozen["LM heads and divergence"] == pytest.approx(2 * 20 * 2 * 40 / rate)


def test_fdd_takes_each_key_layer_beside_the_one_before() -> None:
    one, three = (small_work(trajectory=layers).head_passes for layers in ((), (1, 2)))
    assert (one, three) == (1, 4)


def test_of_experts_those_count_that_a_token_is_sent_to() -> None:
    sparse = dataclasses.replace(small_work().student, active=20)
    parts = step_time(small_work(student=sparse), small_plan(), small_machine()).parts
    assert parts["student"] < step_time(small_work(), small_plan(), small_machine()).parts["student"]


def test_rollouts_read_all_weights_for_every_token() -> None:
    machine = small_machine(bandwidth=1e3, half=1e12)
    work = small_work(writing=Writing(3, 7))
    # four sequences, three at once: two batches of seven tokens; keys and values of half the length on average
    seconds = 2 * 7 * 2 * (100 + 16 * 3 * 5) / 1e3
    assert step_time(work, small_plan(), machine).parts["rollouts"] == pytest.approx(seconds)
    assert step_time(small_work(), small_plan(), machine).parts["rollouts"] == 0


def test_links_by_hand() -> None:
    parts = step_time(small_work(), small_plan(), small_machine()).parts
    # half of what is gathered comes from the other rank; the teacher's 1,000 elements in gathers of 200
    assert parts["teacher gathers"] == pytest.approx(2 * (2 * 1000 / 2 / 100 + 5 * LATENT))
    assert parts["student gathers"] == 0
    assert parts["gradient reduction"] == pytest.approx(2 * (2 * 132 / 2 / 100 + 132 / 7 * LATENT))


def test_stage_1_reduces_once_a_step_and_stage_3_gathers() -> None:
    first, second, third = (
        step_time(small_work(), small_plan(student_stage=stage), small_machine()).parts for stage in (1, 2, 3)
    )
    assert second["gradient reduction"] == pytest.approx(2 * first["gradient reduction"])
    assert third["student gathers"] > second["student gathers"] == 0
    recomputed = step_time(
        small_work(), small_plan(student_stage=3, gradient_checkpointing=True), small_machine()
    ).parts
    assert recomputed["student gathers"] == pytest.approx(2.7 / 2 * third["student gathers"])


def test_hpz_keeps_gathers_off_the_network() -> None:
    machine = small_machine(num_nodes=4, inter=10.0)
    over_network = step_time(small_work(), small_plan(), machine).parts["teacher gathers"]
    in_node = step_time(small_work(), small_plan(teacher_hpz=2), machine).parts["teacher gathers"]
    assert over_network == pytest.approx(2 * (2 * 1000 * 7 / 8 / 10 + 5 * LATENCY["network"]))
    assert in_node == pytest.approx(2 * (2 * 1000 / 2 / 100 + 5 * LATENT))


def test_a_larger_micro_batch_gathers_the_teacher_less_often() -> None:
    one = step_time(small_work(), small_plan(micro_batch_size=1, gradient_accumulation_steps=4), small_machine())
    four = step_time(small_work(), small_plan(micro_batch_size=4, gradient_accumulation_steps=1), small_machine())
    assert one.parts["teacher gathers"] == pytest.approx(4 * four.parts["teacher gathers"])
    assert one.parts["teacher"] > four.parts["teacher"]  # small products are slower
    assert one.total > four.total


def test_without_prefetch_nothing_runs_beside_products() -> None:
    with_it = step_time(small_work(), small_plan(), small_machine())
    without = step_time(small_work(), small_plan(prefetch_bucket_size=0), small_machine())
    assert without.total > with_it.total


def test_offload_copies_over_the_hosts_link() -> None:
    parts = step_time(small_work(), small_plan(offload_optimizer=True, offload_teacher=True), small_machine()).parts
    assert parts["optimizer step"] == pytest.approx(30 * 66 / 30 + 2 * 2 * 66 / 20)
    assert parts["teacher gathers"] == pytest.approx(2 * (2 * 1000 / 2 / 100 + 5 * LATENT + 2 * 500 / 20))


def test_one_rank_needs_no_links() -> None:
    parts = step_time(small_work(), small_plan(student_stage=3), small_machine(gpus_per_node=1)).parts
    for name in ("teacher gathers", "student gathers", "gradient reduction", "heads and updated weights gathered"):
        assert parts[name] == 0
