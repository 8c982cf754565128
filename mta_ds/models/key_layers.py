"""Which student layer is aligned with which teacher layer, and on words or on phrases (METHOD: strided top-down)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

from mta_ds.errors import UsageError

Granularity = Literal["word", "phrase"]


class KeyLayer(NamedTuple):
    """One aligned pair, in transformers' numbering of ``hidden_states`` (1 = after the first layer)."""

    student: int
    teacher: int
    granularity: Granularity


def strided_top_down(num_layers: int, count: int, stride: int) -> tuple[int, ...]:
    """Every ``stride``-th layer from the top, ``count`` of them, lowest first."""
    return tuple(num_layers - stride * i for i in reversed(range(count)))


def resolve_key_layers(
    num_student_layers: int,
    num_teacher_layers: int,
    *,
    student_layers: Sequence[int] | None = None,
    teacher_layers: Sequence[int] | None = None,
    num_layers: int | None = None,
    stride: int | None = None,
    num_word_layers: int = 1,
    section: str = "mta",
) -> tuple[KeyLayer, ...]:
    """The key layers of a pair, lowest first; the lowest ``num_word_layers`` align words, the others phrases.

    Explicit layers are taken as they are. Explicit student layers alone are mapped by φ(l) = round(l · L_T / L_S).
    Otherwise each model is strided from its own top: ``num_layers`` of them (3 unless given), the student every
    ``stride``-th (a quarter of its depth unless given), the teacher with the stride scaled by L_T / L_S.

    Args:
        section: of the configuration, for messages.

    Raises:
        UsageError: a layer that does not exist, lists of unequal length, or more layers than the stride leaves.
    """
    if student_layers is not None:
        if num_layers is not None or stride is not None:
            raise UsageError(
                f"{section}: student_layers is explicit, num_layers and stride have no effect; remove them"
            )
        student = tuple(student_layers)
        scale = num_teacher_layers / num_student_layers
        teacher = tuple(teacher_layers) if teacher_layers is not None else tuple(round(s * scale) for s in student)
    elif teacher_layers is not None:
        raise UsageError(f"{section}.teacher_layers: give {section}.student_layers with it, one for each teacher layer")
    else:
        count = num_layers if num_layers is not None else min(3, num_student_layers)
        stride = stride if stride is not None else max(1, num_student_layers // 4)
        student = strided_top_down(num_student_layers, count, stride)
        teacher = strided_top_down(
            num_teacher_layers, count, max(1, round(stride * num_teacher_layers / num_student_layers))
        )
    _check(section, "student", student, num_student_layers)
    _check(section, "teacher", teacher, num_teacher_layers)
    if len(student) != len(teacher):
        raise UsageError(
            f"{section}: {len(student)} student_layers but {len(teacher)} teacher_layers; they pair one to one"
        )
    if not 0 <= num_word_layers <= len(student):
        raise UsageError(f"{section}.num_word_layers: {num_word_layers} of only {len(student)} key layers")
    return tuple(
        KeyLayer(s, t, "word" if i < num_word_layers else "phrase")
        for i, (s, t) in enumerate(zip(student, teacher, strict=True))
    )


def _check(section: str, side: str, layers: tuple[int, ...], num_layers: int) -> None:
    for layer in layers:
        if not 1 <= layer <= num_layers:
            raise UsageError(
                f"{section}: {side} layer {layer} does not exist, the {side} has layers 1 to {num_layers} "
                f"(chosen: {' '.join(map(str, layers))})"
            )
    if not layers or any(a >= b for a, b in itertools.pairwise(layers)):
        raise UsageError(f"{section}: {side} layers must be one or more, in rising order: {' '.join(map(str, layers))}")
