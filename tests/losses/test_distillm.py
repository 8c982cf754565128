"""DistiLLM's schedule against traces worked out by hand from METHOD §8, and what its options refuse."""

from __future__ import annotations

import json

import pytest

from mta_ds.config import validate
from mta_ds.errors import UsageError
from mta_ds.losses import DistiLLMConfig, Source, make_method

STUDENT, BUFFER, DATA = Source.STUDENT, Source.BUFFER, Source.DATA

# (held-out loss, φ after it, what the next one is compared with); a rise of exactly 0.125 counts, less does not
LOSSES = [
    (2.0, 0.0, 2.0),  # before training
    (1.5, 0.0, 2.0),  # a fall changes nothing, not even what is compared with
    (2.1, 0.0, 2.0),
    (2.125, 0.25, 2.125),
    (2.125, 0.25, 2.125),
    (2.5, 0.5, 2.5),
    (9.0, 0.75, 9.0),
    (10.0, 1.0, 10.0),
    (11.0, 1.0, 11.0),  # φ stays at 1, prev follows
    (float("nan"), 1.0, 11.0),
]


def make(phi=0.0, schedule="decreasing", **options):
    values = {"initial_phi": phi, "phi_step": 0.25, "tolerance": 0.125, "schedule": schedule} | options
    return make_method(DistiLLMConfig(method="distillm", **values))


def test_phi_and_previous_follow_the_trace():
    method = make()
    for loss, phi, previous in LOSSES:
        method.after_validation(loss)
        assert (method.phi, method.previous) == (phi, previous), loss


def test_the_defaults_are_the_papers():
    method = make_method(DistiLLMConfig(method="distillm"))
    assert (method.divergence.name, method.divergence.alpha, method.divergence.detach_mixture) == ("srkl", 0.1, False)
    assert (method.phi, method.buffer_size) == (0.0, 1000)
    assert (method.rollouts.temperature, method.rollouts.top_p, method.rollouts.top_k) == (1.0, 1.0, 0)
    method.after_validation(2.0)
    method.after_validation(2.0999)
    assert method.phi == 0.0
    for _ in range(12):
        method.after_validation(method.previous + 0.1001)
    assert method.phi == 1.0
    assert not make().pairs and not make().key_layers


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("decreasing", {1: 0.45, 4: 0.3, 5: 0.25, 10: 0.0}),
        ("constant", {1: 0.25, 4: 0.25, 10: 0.25}),
        ("increasing", {1: 0.05, 4: 0.2, 10: 0.5}),
    ],
)
def test_the_share_of_fresh_rollouts(schedule, shares):
    method = make(phi=0.5, schedule=schedule)
    for step, share in shares.items():
        assert method.fresh_share(step, 10) == pytest.approx(share, abs=1e-15)
        assert make(phi=0.0, schedule=schedule).fresh_share(step, 10) == 0


# φ = 0.5, step 5 of 10: ρ = 0.25 in all three schedules
@pytest.mark.parametrize("schedule", ["decreasing", "constant", "increasing"])
@pytest.mark.parametrize(
    ("draw", "filling", "full"),
    [
        (0.0, STUDENT, STUDENT),
        (0.2499, STUDENT, STUDENT),
        (0.25, STUDENT, BUFFER),
        (0.4999, STUDENT, BUFFER),
        (0.5, DATA, DATA),
        (0.9999, DATA, DATA),
    ],
)
def test_the_source_of_a_draw(schedule, draw, filling, full):
    method = make(phi=0.5, schedule=schedule)
    assert method.source(5, 10, draw, buffer_full=False) is filling
    assert method.source(5, 10, draw, buffer_full=True) is full


@pytest.mark.parametrize(
    ("schedule", "step", "sources"),
    [
        ("decreasing", 10, [BUFFER, BUFFER, DATA]),  # ρ = 0
        ("increasing", 10, [STUDENT, STUDENT, DATA]),  # ρ = φ
        ("decreasing", 1, [STUDENT, BUFFER, DATA]),  # ρ = 0.45
        ("increasing", 1, [STUDENT, BUFFER, DATA]),  # ρ = 0.05
    ],
)
def test_the_source_at_the_ends_of_a_run(schedule, step, sources):
    method = make(phi=0.5, schedule=schedule)
    assert [method.source(step, 10, draw, buffer_full=True) for draw in (0.0, 0.47, 0.5)] == sources


def test_without_phi_every_step_is_the_data_sets():
    assert {make().source(1, 10, draw, full) for draw in (0.0, 0.3, 0.99) for full in (True, False)} == {DATA}


def test_student_text_is_no_label():
    method = make(kd_ratio=0.7)
    assert method.divergence_on(DATA).kd_ratio == 0.7
    assert method.divergence_on(STUDENT).kd_ratio == method.divergence_on(BUFFER).kd_ratio == 1.0
    assert method.divergence_on(STUDENT).name == "srkl"


@pytest.mark.parametrize("losses", [[], [2.0], [2.0, 3.0, 4.0]])
def test_state_goes_through_a_checkpoint(losses):
    method, resumed = make(phi=0.25), make()
    for loss in losses:
        method.after_validation(loss)
    resumed.load_state(json.loads(json.dumps(method.state())))
    assert (resumed.phi, resumed.previous) == (method.phi, method.previous)
    for each in (method, resumed):
        each.after_validation(4.5)
    assert resumed.state() == method.state()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"divergence": "sft"}, "divergence: sft learns from labels alone, and rollouts have none"),
        ({"kd_ratio": 0.0}, "kd_ratio: 0 learns from labels alone"),
        ({"divergence": "fkl", "alpha": 0.2}, "alpha is an option of skl and srkl, not of fkl"),
        ({"schedule": "falling"}, "schedule: .*'decreasing'"),
        ({"initial_phi": 1.5}, "initial_phi: "),
        ({"buffer_size": 0}, "buffer_size: "),
        ({"rollouts": {"top_p": 0}}, "rollouts.top_p: "),
        ({"rollouts": {"temprature": 1}}, "rollouts.temprature: unknown key; did you mean 'temperature'"),
    ],
)
def test_wrong_values_are_one_line(values, message):
    with pytest.raises(UsageError, match=message) as error:
        validate({"method": "distillm"} | values, DistiLLMConfig, where="run.yaml")
    assert "\n" not in str(error.value)
