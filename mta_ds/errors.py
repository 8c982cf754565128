"""The two exceptions that a user of the command line may meet, each one clear line.

Anything else that escapes a command is a defect and shows its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A run cannot go on because of its input; the message says what, where and the nearest fix (exit code 1)."""

    exit_code = 1
    on_every_rank = False
    """Whether all ranks of a job meet it alike, so that one of them need tell it."""


class UsageError(UserError):
    """The command or its configuration is wrong, before any work began (exit code 2)."""

    exit_code = 2
    on_every_rank = True
