"""The two exceptions that a user of the command line may meet, each one clear line.

Anything else that escapes a command is a defect and shows its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A run cannot go on because of its input; the message says what, where and the nearest fix (exit code 1)."""

    exit_code = 1
    on_every_rank = False
    """Whether all ranks of a job meet it alike, so that one of them need tell it."""

    def __init__(self, message: str, *, on_every_rank: bool | None = None) -> None:
        super().__init__(message)
        if on_every_rank is not None:
            self.on_every_rank = on_every_rank


class UsageError(UserError):
    """The command or its configuration is wrong, before any work began (exit code 2)."""

    exit_code = 2
    on_every_rank = True


_LONGEST = 2000
_CONTROLS = dict.fromkeys(
    [*range(32), *range(127, 160), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)], "\ufffd"
)


def printable(text: str) -> str:
    """The text as one line of a terminal: what that would obey, or reorder, becomes a replacement character.

    Messages and texts have words of strangers' files in them.
    """
    return " ".join(text.splitlines()).translate(_CONTROLS)


def error_line(error: UserError) -> str:
    """What is told of an error: one line, of bounded length."""
    line = printable(str(error))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
