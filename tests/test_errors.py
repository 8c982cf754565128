"""Errors in a terminal: one line, whatever the message holds."""

from __future__ import annotations

from mta_ds.errors import UserError, error_line, printable


def test_a_message_is_one_line_that_a_terminal_only_shows() -> None:
    assert printable("a\nb\r\n\x1b[31mc\u202ed\u2066e 😀") == "a b \ufffd[31mc\ufffdd\ufffde 😀"
    assert len(error_line(UserError("x" * 100_000))) < 2100
