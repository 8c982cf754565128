"""Copies of what jobs read, named by what is in them: a job that starts again finds what it was submitted with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mta_ds.errors import UserError
from mta_ds.files import write_atomic


@dataclass(frozen=True)
class Copy:
    """A file as it is now, and where jobs will find it."""

    source: Path
    path: Path
    content: bytes

    def keep(self) -> None:
        """Write the copy; one that is there already stays as it is.

        Raises:
            UserError: somebody changed the one that is there.
        """
        if not self.path.exists():
            write_atomic(self.path, self.content)
        elif self.path.read_bytes() != self.content:
            raise UserError(f"{self.path}: was changed since jobs were submitted with it; remove it")


def copy_of(source: Path, folder: Path) -> Copy:
    """The copy of ``source`` in ``folder``, not yet written.

    Raises:
        UserError: ``source`` cannot be read.
    """
    try:
        content = source.read_bytes()
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()[:12]
    return Copy(source.absolute(), folder / f"{source.stem}-{digest}{source.suffix}", content)
