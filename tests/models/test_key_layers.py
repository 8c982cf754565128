"""The paper's table of key layers, the defaults, and every mistake a config can hold."""

from __future__ import annotations

import pytest

from mta_ds.errors import UsageError
from mta_ds.models import KeyLayer, resolve_key_layers


@pytest.mark.parametrize(
    ("depths", "options", "student", "teacher"),
    [
        ((12, 48), {}, (6, 9, 12), (24, 36, 48)),
        ((24, 24), {"num_layers": 6, "stride": 2}, (14, 16, 18, 20, 22, 24), (14, 16, 18, 20, 22, 24)),
        ((24, 32), {"num_layers": 5, "stride": 2}, (16, 18, 20, 22, 24), (20, 23, 26, 29, 32)),
        ((12, 48), {"student_layers": (4, 6, 8)}, (4, 6, 8), (16, 24, 32)),
        ((24, 24), {"student_layers": (4, 8, 16), "teacher_layers": (4, 8, 16)}, (4, 8, 16), (4, 8, 16)),
        ((1, 1), {}, (1,), (1,)),
        ((2, 30), {}, (1, 2), (15, 30)),
    ],
)
def test_table_of_the_paper(depths, options, student, teacher) -> None:
    layers = resolve_key_layers(*depths, **options)
    assert tuple(layer.student for layer in layers) == student
    assert tuple(layer.teacher for layer in layers) == teacher


def test_lowest_layers_align_words() -> None:
    layers = resolve_key_layers(36, 36, num_layers=6, stride=2, num_word_layers=3)
    assert [layer.granularity for layer in layers] == ["word"] * 3 + ["phrase"] * 3
    assert layers[0] == KeyLayer(26, 26, "word")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_layers": (6, 13)}, "student layer 13 does not exist, the student has layers 1 to 12"),
        ({"student_layers": (0, 6)}, "student layer 0 does not exist"),
        ({"student_layers": (6, 9), "teacher_layers": (24, 49)}, "teacher layer 49 does not exist"),
        ({"student_layers": (9, 6)}, "rising order"),
        ({"student_layers": (6, 6), "teacher_layers": (1, 2)}, "rising order"),
        ({"student_layers": (6, 9), "teacher_layers": (24,)}, "2 student_layers but 1 teacher_layers"),
        ({"teacher_layers": (24,)}, "give mta.student_layers"),
        ({"student_layers": (6,), "stride": 2}, "no effect"),
        ({"num_layers": 5, "stride": 3}, "student layer 0 does not exist"),
        ({"num_word_layers": 4}, "4 of only 3"),
    ],
)
def test_mistakes_are_named(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_key_layers(12, 48, **options)
