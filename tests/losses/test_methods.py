"""The section ``loss``: each method's own options and no other's, what a run writes down, and one line about each."""

from __future__ import annotations

import pytest
import yaml

from mta_ds.config import Section, dump, validate
from mta_ds.errors import UsageError
from mta_ds.losses import METHODS, DistiLLM2Config, DistiLLMConfig, FDDConfig, KDConfig, LossConfig, Method, make_method
from mta_ds.losses.gkd import GKDConfig


class Run(Section):
    """As a run's configuration holds it, with a section beside."""

    loss: LossConfig = KDConfig()
    steps: int = 1


CONFIGS = {
    "kd": KDConfig,
    "distillm": DistiLLMConfig,
    "distillm2": DistiLLM2Config,
    "fdd": FDDConfig,
    "gkd": GKDConfig,
}
CHANGED = {
    "kd": {"divergence": "jsd", "beta": 0.9, "kd_ratio": 0.5},
    "distillm": {"divergence": "skl", "alpha": 0.2, "schedule": "constant", "rollouts": {"top_k": 7, "ahead": 3}},
    "distillm2": {"alpha": 0.3, "beta_curriculum": False, "gap_steps": 9},
    "fdd": {"divergence": "rkl", "temperature": 3.5, "student_layers": [1, 3], "teacher_layers": [2, 6]},
    "gkd": {"divergence": "tvd", "on_policy_share": 1.0, "rollouts": {"max_new_tokens": 12}},
}


def read(**loss):
    return validate({"loss": loss}, Run, where="run.yaml").loss


def make(config):
    return make_method(config, 50, {2: 1, 4: 2}, (3, 6))


def test_every_method_is_here():
    assert tuple(CONFIGS) == tuple(CHANGED) == METHODS


@pytest.mark.parametrize("name", METHODS)
def test_a_name_alone_is_its_method_with_defaults(name):
    config = read(method=name)
    assert type(config) is CONFIGS[name] and config == CONFIGS[name](method=name)
    method = make(config)
    assert isinstance(method, Method) and method.divergence.vocab_size == 50 and method.divergence.needs_teacher
    assert config.adapts == (name == "distillm")
    assert (method.rollouts is not None) == (name in ("distillm", "gkd"))
    assert method.pairs == (name == "distillm2")
    assert dict(method.key_layers) == ({2: 1, 4: 2} if name == "fdd" else {})
    assert len({type(make(CONFIGS[other](method=other))) for other in METHODS}) == len(METHODS)


@pytest.mark.parametrize("loss", [{}, {"divergence": "rkl"}])
def test_without_a_name_it_is_kd(loss):
    assert read(**loss) == KDConfig(**loss)
    assert Run().loss == validate({}, Run, "run.yaml").loss == KDConfig()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("is_changed", [False, True])
def test_what_a_run_writes_down_reads_back(name, is_changed):
    config = Run(loss=read(method=name, **(CHANGED[name] if is_changed else {})))
    written = yaml.safe_load(dump(config))
    assert written["loss"]["method"] == name
    again = validate(written, Run, where="run.yaml")
    assert again == config and type(again.loss) is CONFIGS[name]
    if is_changed:
        assert again.loss != CONFIGS[name](method=name)
        assert {key: written["loss"][key] for key in CHANGED[name]} == CHANGED[name] | (
            {"rollouts": config.loss.rollouts.model_dump()} if "rollouts" in CHANGED[name] else {}
        )


def test_options_of_what_is_off_are_not_written_down():
    config = Run(loss=read(method="distillm2", alpha_curriculum=False))
    written = yaml.safe_load(dump(config))
    assert "gap_steps" not in written["loss"] and validate(written, Run, where="run.yaml") == config


@pytest.mark.parametrize("method", ["distilm", "KD", "", None, 3, ["kd"], {"kd": 1}])
def test_an_unknown_method_is_told_the_known_ones(method):
    with pytest.raises(UsageError) as error:
        read(method=method)
    assert str(error.value) == "run.yaml: loss: method is none of kd, distillm, distillm2, fdd, gkd"


@pytest.mark.parametrize("loss", ["fdd", None, 3, ["fdd"]])
def test_a_loss_that_is_no_section(loss):
    with pytest.raises(UsageError, match=r"^run.yaml: loss: method is none of kd, [^\n]*$"):
        validate({"loss": loss}, Run, where="run.yaml")


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        ({"method": "fdd", "temprature": 2}, "loss.temprature: unknown key; did you mean 'temperature'?"),
        ({"method": "fdd", "on_policy_share": 0.5}, "loss.on_policy_share: unknown key; "),
        ({"method": "distillm2", "divergence": "skl"}, "loss.divergence: unknown key; "),
        (
            {"method": "distillm2", "alpha_curriculum": False, "gap_steps": 100},
            "loss: gap_steps is an option of alpha_curriculum, which is off; remove it",
        ),
        ({"method": "distillm2", "beta": 0.5}, "loss.beta: unknown key; valid keys: method, alpha, beta_curriculum, "),
        ({"method": "distillm", "derivative_weight": 1}, "loss.derivative_weight: unknown key; "),
        ({"method": "distillm", "intial_phi": 1}, "loss.intial_phi: unknown key; did you mean 'initial_phi'?"),
        ({"method": "kd", "rollouts": {}}, "loss.rollouts: unknown key; "),
        ({"divergence": "fkl", "temperature": 2}, "loss.temperature: unknown key; "),
        ({"method": "kd", "alhpa": 0.2}, "loss.alhpa: unknown key; did you mean 'alpha'?"),
        ({"method": "distillm", "rollouts": {"topk": 3}}, "loss.rollouts.topk: unknown key; did you mean 'top_k'?"),
        ({"method": "distillm", "phi_step": "much"}, "loss.phi_step: "),
        ({"method": "gkd", "rollouts": {"top_p": 2}}, "loss.rollouts.top_p: "),
        ({"method": "gkd", "divergence": "sft"}, "loss: divergence: sft learns from labels alone"),
        ({"method": "fdd", "student_layers": ["a"]}, "loss.student_layers.0: "),
    ],
)
def test_mistakes_name_the_key_and_the_nearest(loss, line):
    with pytest.raises(UsageError) as error:
        read(**loss)
    assert str(error.value).startswith(f"run.yaml: {line}")
    assert "\n" not in str(error.value)


def test_every_method_says_in_one_line_what_it_optimises():
    lines = {name: make(read(method=name)).describe() for name in METHODS}
    assert lines == {
        "kd": "kd, fkl: KL(p ‖ q)",
        "distillm": "distillm, adaptive off-policy (decreasing), srkl: KL(q ‖ (1-α) p + α q), α = 0.1",
        "distillm2": "distillm2, (2-β) skl on chosen + β srkl (mixture detached) on rejected, "
        "β 1 to 1.5, α fitted in [0.01, 0.1]",
        "fdd": "fdd, fkl: KL(p ‖ q), + 1 L_FDD over student layers 1 2, τ = 5",
        "gkd": "gkd, 0.5 of the steps on rollouts, jsd: β KL(p ‖ m) + (1-β) KL(q ‖ m), m = β p + (1-β) q, β = 0.5",
    }


def test_what_is_changed_is_said():
    lines = {name: make(read(method=name, **CHANGED[name])).describe() for name in METHODS}
    assert lines["kd"].startswith("kd, 0.5 sft + 0.5 jsd: ") and lines["kd"].endswith("β = 0.9")
    assert "(constant)" in lines["distillm"] and lines["distillm"].endswith("skl: KL(p ‖ α p + (1-α) q), α = 0.2")
    assert "β 1, α fitted in [0.01, 0.3]" in lines["distillm2"]
    assert "rkl" in lines["fdd"] and "τ = 3.5" in lines["fdd"]
    assert lines["gkd"].startswith("gkd, 1 of the steps on rollouts, tvd")
    assert make(read(method="distillm2", alpha_curriculum=False)).describe().endswith("α 0.1")
