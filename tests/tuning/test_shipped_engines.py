"""The shipped DeepSpeed configurations in real engines: a step of the tiny pair on a CPU.

hpZ needs a node of 8 ranks, NVMe a disk: DeepSpeed's own parser reads those (test_plan_files.py). cpu_test.json is what
all other tests run with.
"""

from __future__ import annotations

import pytest
from support import CPU_TEST, make_pair, train


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("student_zero2", "teacher_zero3"),
        ("student_zero3", "teacher_zero3_offload"),
        ("student_zero3_offload", "teacher_zero3"),
    ],
)
def test_a_step_under_the_shipped_files(pair, student: str, teacher: str, tmp_path) -> None:
    def file(name: str) -> str:
        return str(CPU_TEST.with_name(f"{name}.json"))

    config = {
        "student": {"path": str(pair / "student"), "deepspeed": file(student)},
        "teacher": {"path": str(pair / "teacher"), "deepspeed": file(teacher)},
    }
    metrics, _ = train(pair, tmp_path / "run", 1, train__steps=1, data__validation=[], **config)
    assert metrics[-1]["loss"] > 0 and metrics[-1]["grad_norm"] > 0
