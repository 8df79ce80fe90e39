"""A file that takes another's place whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Self


class Replacement:
    """A file being written beside `path`, readable by its owner only, until `commit` puts it there.

    Leaving the block without that leaves nothing behind, and what was at `path` stays. Raises OSError.
    """

    def __init__(self, path: Path, prefix: str, suffix: str = "") -> None:
        """Its name until then begins with `prefix` and ends with `suffix`."""
        handle, name = tempfile.mkstemp(suffix, prefix, path.parent)
        self._path = path
        self._temporary = Path(name)
        self.file = open(handle, "wb")  # noqa: SIM115

    def commit(self, *, durable: bool = True) -> int:
        """Puts it in place and returns its size in bytes; if `durable` it outlives a power failure."""
        self.file.flush()
        if durable:
            os.fsync(self.file.fileno())
        size = self.file.tell()
        self.file.close()
        os.replace(self._temporary, self._path)
        return size

    def discard(self) -> None:
        """Leaves nothing behind, unless it is in place."""
        with suppress(OSError):
            self.file.close()
        with suppress(OSError):
            self._temporary.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()
