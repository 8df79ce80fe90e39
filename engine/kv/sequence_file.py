"""A file of one token sequence with its states, readable for the same model, library build and KV types.

It consists of records, one for each part and one at the end, labelled with the salt and with "part" or "end". Files are
their owner's only, as prompts can be read back from them.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.backend import State
from engine.kv import record
from engine.kv.record import Damaged
from engine.replacement import Replacement


class Part(NamedTuple):
    """Consecutive tokens, the first of them at position `start`, and the state of their cells."""

    start: int
    tokens: array[int]
    state: State

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + len(self.tokens)


class Writer:
    """A temporary file that `commit` moves into place. Raises OSError."""

    def __init__(self, path: Path, identity: str, salt: str) -> None:
        """Creates the folder if need be."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._new = Replacement(path, "slot.", ".part")
        self._identity, self._salt = record.hashed(identity), salt

    def write(self, parts: Iterable[Part]) -> None:
        """Appends consecutive parts."""
        for part in parts:
            record.write(self._new.file, self._identity, (self._salt, "part"), *part)

    def commit(self) -> int:
        """Completes the file and moves it into place, over an earlier one. Returns its size in bytes."""
        record.write(self._new.file, self._identity, (self._salt, "end"), 0, array("i"), np.empty(0, np.uint8))
        return self._new.commit()

    def discard(self) -> None:
        """Removes the temporary file; no effect after `commit`."""
        self._new.discard()


class Reader:
    """A file that was read and verified as a whole when it was opened. Raises Damaged or OSError."""

    def __init__(self, path: Path, identity: str) -> None:
        self._identity = record.hashed(identity)
        self._file = path.open("rb")
        try:
            self.bytes = os.fstat(self._file.fileno()).st_size
            """The file's size."""
            while (found := self._next())[1]:
                pass
            if self._file.read(1):
                raise Damaged("it is torn or damaged")
            self.salt = found[0]
            self._file.seek(0)
        except BaseException:
            self.close()
            raise

    def read(self, most: int) -> list[Part]:
        """The next parts until they exceed `most` bytes; an empty list at the end."""
        parts: list[Part] = []
        while most > 0:
            before = self._file.tell()
            part = self._next()[1]
            if part is None:
                self._file.seek(before)  # the next call finds the end again
                break
            parts.append(part)
            most -= part.state.nbytes
        return parts

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _next(self) -> tuple[str, Part | None]:
        """The salt, and the next part; None at the end."""
        head = record.read_head(self._file, self._identity)
        state = record.read_state(self._file, head)
        salt, kind = head.labels
        return salt, Part(head.start, head.tokens, state) if kind == "part" else None
