"""Trials: what is tried, how results are read, what is fitted; and tune as a command, without trials."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support import run_command
from tuning_cases import preset, small_machine, small_plan, small_work

from mta_ds.config import dump, load
from mta_ds.engine import RunConfig
from mta_ds.errors import UserError
from mta_ds.tuning import trials
from mta_ds.tuning.search import judge, search
from mta_ds.tuning.trials import Runner, Trial, choose_for_trial, compare_norms, fit, predicted_bytes, read_trial
from mta_ds.tuning.tune import TuneOptions, measured_first, try_plans, tune


def trial(outcome: str = "ok", **changes: object) -> Trial:
    values = {"seconds": 2.0, "peak_bytes": 110.0, "grad_norms": (1.0, 0.9)} if outcome == "ok" else {}
    return dataclasses.replace(Trial(small_plan(), 1.0, 100.0, outcome), **(values | changes))


def test_one_trial_for_each_placement_and_cut() -> None:
    found = search(small_work(), small_machine())
    chosen = choose_for_trial(found.fitting, 4)
    assert len(chosen) == 4 and chosen[0] == found.fitting[0]
    same_buckets = {dataclasses.replace(c.plan, reduce_bucket_size=0, prefetch_bucket_size=0) for c in chosen}
    assert len(same_buckets) == 4


def test_corrections_are_medians_of_what_ran() -> None:
    made = [
        trial(),
        trial(seconds=3.0, peak_bytes=120.0),
        trial(seconds=9.0, peak_bytes=90.0),
        trial("out of memory"),
    ]
    correction = fit(made)
    assert (correction.memory, correction.time) == (1.1, 3.0)
    nothing = fit([trial("failed")])
    assert (nothing.memory, nothing.time) == (1.0, 1.0)


def test_a_plan_whose_gradient_differs_from_the_others_is_no_choice() -> None:
    made = [trial("failed"), trial(grad_norms=(1.1, 0.9)), trial(), trial(grad_norms=(1.0005, 2.0))]
    judged = compare_norms(made, "float32")
    assert [t.outcome for t in judged] == ["failed", "differs", "ok", "ok"]
    assert [t.note for t in judged[1:3]] == ["gradient norm 1.1, others' 1", "gradient norm 1 agrees"]
    alone = compare_norms([trial(grad_norms=(float("nan"), 1.0))], "float32")
    assert [t.outcome for t in alone] == ["differs"]


def test_trials_survive_as_json() -> None:
    assert Trial.from_json(json.loads(json.dumps(trial().as_json()))) == trial()


@pytest.mark.parametrize(
    ("code", "log", "outcome", "note"),
    [
        (
            1,
            "x\ntorch.OutOfMemoryError: CUDA out of memory.\nmore",
            "out of memory",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (137, "step 1/8", "out of memory", "step 1/8"),
        (1, "mta-ds: error: student: no\n", "failed", "mta-ds: error: student: no"),
        (None, "step 3/8", "too slow", "step 3/8"),
    ],
)
def test_a_failure_is_a_result(code, log: str, outcome: str, note: str, tmp_path) -> None:
    candidate = judge(small_work(), small_plan(), small_machine())
    read = read_trial(candidate, small_machine(), tmp_path, code, log, 0)
    assert (read.outcome, read.note, read.seconds) == (outcome, note, None)


def test_measured_plans_come_first_and_failed_ones_go() -> None:
    found = search(small_work(), small_machine())
    plans = [candidate.plan for candidate in found.fitting]
    made = [trial("failed", plan=plans[0]), trial(plan=plans[1], seconds=9.0), trial(plan=plans[2], seconds=4.0)]
    ordered = [candidate.plan for candidate in measured_first(found, made).fitting]
    assert ordered[:2] == [plans[2], plans[1]]
    assert plans[0] not in ordered and len(ordered) == len(plans) - 1
    with pytest.raises(UserError, match="every trial failed; the first: out of memory: "):
        measured_first(found, [trial("out of memory", plan=plans[0])])


def test_a_plan_that_has_run_fits_whatever_was_predicted_of_it() -> None:
    found = search(small_work(), small_machine())
    plan = found.fitting[0].plan
    nothing = search(small_work(), small_machine(memory=1.0))
    assert not nothing.fitting
    corrected = measured_first(nothing, [trial(plan=plan)])
    assert [(c.plan, c.reason) for c in corrected.fitting] == [(plan, None)]
    assert plan not in [c.plan for c in corrected.pruned]


class Rehearsal:
    """Trials that run out of memory above a limit, of those that are predicted to need it."""

    machine = small_machine()

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.ran: list[Trial] = []

    def run(self, candidates) -> list[Trial]:
        made = []
        for candidate in candidates:
            needed = predicted_bytes(candidate, self.machine)
            outcome = "ok" if needed < self.limit else "out of memory"
            made.append(trial(outcome, plan=candidate.plan, predicted_bytes=needed))
        self.ran += made
        return made


def test_where_all_run_out_of_memory_leaner_plans_are_tried() -> None:
    fitting = search(small_work(), small_machine()).fitting
    needs = sorted(predicted_bytes(candidate, small_machine()) for candidate in fitting)
    first = min(predicted_bytes(c, small_machine()) for c in choose_for_trial(fitting, 2))
    rehearsal = Rehearsal(limit=first)
    tried = try_plans(rehearsal, fitting, 2)  # type: ignore[arg-type]
    assert [t.outcome for t in tried[:2]] == ["out of memory"] * 2
    assert any(t.outcome == "ok" for t in tried)
    hopeless = try_plans(Rehearsal(limit=needs[0]), fitting, 2)  # type: ignore[arg-type]
    assert len({t.plan for t in hopeless}) == len(hopeless) <= 8
    assert all(t.outcome == "out of memory" for t in hopeless)


@pytest.mark.parametrize(("outcome", "kept"), [("ok", True), ("out of memory", True), ("failed", False)])
def test_only_what_would_come_again_is_kept(outcome: str, kept: bool, tmp_path, monkeypatch) -> None:
    config = preset(tmp_path, "gpt2-fdd-mta", "gpt2-xl", "gpt2")
    machine = small_machine()
    candidate = judge(small_work(), small_plan(), machine)
    runs = []
    monkeypatch.setattr(trials, "run_ranks", lambda *_: runs.append(1) or (1, ""))
    monkeypatch.setattr(trials, "read_trial", lambda *_: trial(outcome))
    runner = Runner(config, small_work().student, machine, tmp_path / "trials", minutes=1)
    for _ in range(2):
        assert [t.outcome for t in runner.run([candidate])] == [outcome]
    assert len(runs) == (1 if kept else 2)
    elsewhere = dataclasses.replace(runner, machine=small_machine(memory=2e9))
    elsewhere.run([candidate])
    assert len(runs) == (2 if kept else 3)


def test_what_fits_nowhere_leaves_a_page_and_one_line(tmp_path) -> None:
    config = preset(tmp_path, "gpt2-fdd-mta", "gpt2-xl", "gpt2")
    machine = small_machine(memory=1e9, host_memory=1e9, gpus_per_node=1)
    with pytest.raises(UserError, match=r"no plan fits 1 x small of 1 GB: .*smallest change: ") as caught:
        tune(config, machine, TuneOptions(trials=0))
    assert "\n" not in str(caught.value)
    page = (tmp_path / "run" / "tune" / "tune.md").read_text(encoding="utf-8")
    assert "| no | leanest:" in page
    assert not (tmp_path / "run" / "tune" / "override.yaml").exists()


def test_plan_only_writes_what_train_takes(tmp_path) -> None:
    config = preset(tmp_path, "gpt2-fdd-mta", "gpt2-xl", "gpt2")
    run = tmp_path / "run.yaml"
    run.write_text(dump(config))
    done = run_command("tune", run, "--plan-only", "--gpu", "a100-40")
    written = tmp_path / "run" / "tune"
    assert f"use it: mta-ds train CONFIG @{written / 'override.yaml'}" in done.stdout
    assert "Next bottleneck: " in (written / "tune.md").read_text(encoding="utf-8")
    tuned = load(run, RunConfig, [f"@{written / 'override.yaml'}"])
    assert tuned.student.deepspeed == written / "student.json"
    assert json.loads((written / "tune.json").read_text())["chosen"]["micro_batch_size"] == 16
    wrong = run_command("tune", run, "--plan-only", "--gpu", "a100-41", check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].startswith("mta-ds: error: --gpu a100-41: unknown GPU; did you mean")
