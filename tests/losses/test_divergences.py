"""The configured base loss: what is refused, what is described, and that a written configuration reads back."""

from __future__ import annotations

import pytest
import yaml

from mta_ds.config import dump, validate
from mta_ds.errors import UsageError
from mta_ds.losses import KDConfig, describe, make_divergence


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"divergence": "kl"}, "divergence: .*'fkl'"),
        ({"divergence": "fkl", "alpha": 0.2}, "alpha is an option of skl and srkl, not of fkl; remove it"),
        ({"divergence": "skl", "beta": 0.2}, "beta is an option of jsd, not of skl"),
        ({"divergence": "tvd", "alpha": 0.1}, "alpha is an option of skl and srkl, not of tvd"),  # its default
        ({"beta": 0.5}, "beta is an option of jsd, not of fkl"),
        ({"divergence": "skl", "detach_mixture": True}, "detach_mixture is an option of srkl, not of skl"),
        ({"divergence": "sft", "kd_ratio": 0.5}, "kd_ratio is an option of fkl .* not of sft"),
        ({"divergence": "skl", "alpha": 1.0}, "alpha: "),
        ({"kd_ratio": 2}, "kd_ratio: "),
        ({"divergance": "fkl"}, "did you mean 'divergence'"),
    ],
)
def test_wrong_values_are_one_line(values, message):
    with pytest.raises(UsageError, match=message):
        validate(values, KDConfig, where="run.yaml")


@pytest.mark.parametrize("name", ["sft", "fkl", "rkl", "jsd", "tvd", "skl", "srkl"])
def test_a_written_configuration_reads_back(name):
    config = KDConfig(divergence=name)
    written = yaml.safe_load(dump(config))
    assert validate(written, KDConfig, where="run.yaml") == config
    assert ("alpha" in written) == (name in ("skl", "srkl")) and ("beta" in written) == (name == "jsd")
    assert config.model_copy().model_dump() == written


def test_every_option_reaches_the_op():
    config = KDConfig(divergence="srkl", alpha=0.2, detach_mixture=True, kd_ratio=0.7)
    divergence = make_divergence(config, vocab_size=50)
    assert (divergence.name, divergence.alpha, divergence.vocab_size) == ("srkl", 0.2, 50)
    assert divergence.detach_mixture and divergence.kd_ratio == 0.7 and divergence.needs_teacher
    assert not make_divergence(KDConfig(divergence="sft")).needs_teacher


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "fkl: KL(p ‖ q)"),
        ({"divergence": "sft"}, "sft: cross-entropy with the labels"),
        (
            {"divergence": "srkl", "detach_mixture": True},
            "srkl: KL(q ‖ (1-α) p + α q), α = 0.1, mixture detached",
        ),
        ({"divergence": "rkl", "kd_ratio": 0.75}, "0.25 sft + 0.75 rkl: KL(q ‖ p)"),
    ],
)
def test_describe(values, line):
    assert describe(make_divergence(KDConfig(**values))) == line
