"""GKD: the share of steps on rollouts, and the single-step reverse KL of MiniLLM as one of its settings."""

from __future__ import annotations

import pytest

from mta_ds.config import validate
from mta_ds.errors import UsageError
from mta_ds.losses import Source, make_method
from mta_ds.losses.gkd import GKDConfig


@pytest.mark.parametrize(
    ("share", "draws"),
    [
        (0.0, {0.0: Source.DATA, 0.99: Source.DATA}),
        (0.3, {0.0: Source.STUDENT, 0.2999: Source.STUDENT, 0.3: Source.DATA, 0.99: Source.DATA}),
        (1.0, {0.0: Source.STUDENT, 0.9999: Source.STUDENT}),
    ],
)
def test_the_source_of_a_draw(share, draws):
    method = make_method(GKDConfig(method="gkd", on_policy_share=share))
    for draw, source in draws.items():
        for buffer_full in (True, False):  # it has none
            assert {method.source(step, 9, draw, buffer_full) for step in (1, 5, 9)} == {source}
    assert method.buffer_size == 0 and method.state() == {}


def test_defaults_and_options_reach_the_method():
    method = make_method(GKDConfig(method="gkd"), vocab_size=50)
    assert (method.divergence.name, method.divergence.beta, method.divergence.vocab_size) == ("jsd", 0.5, 50)
    assert method.on_policy_share == 0.5 and method.rollouts is not None
    config = GKDConfig(method="gkd", divergence="rkl", on_policy_share=1, rollouts={"top_k": 5}, kd_ratio=0.5)
    minillm = make_method(config)
    assert minillm.rollouts.top_k == 5
    assert (minillm.divergence_on(Source.STUDENT).name, minillm.divergence_on(Source.STUDENT).kd_ratio) == ("rkl", 1.0)
    assert minillm.divergence_on(Source.DATA).kd_ratio == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"divergence": "sft"}, "divergence: sft learns from labels alone, and rollouts have none"),
        ({"kd_ratio": 0}, "kd_ratio: 0 learns from labels alone"),
        ({"on_policy_share": 1.01}, "on_policy_share: "),
        ({"buffer_size": 5}, "buffer_size: unknown key"),
    ],
)
def test_wrong_values_are_one_line(values, message):
    with pytest.raises(UsageError, match=message):
        validate({"method": "gkd"} | values, GKDConfig, where="run.yaml")
