"""Slot file: one token sequence and its states. Only the same model, library build and KV types can read it.

The file consists of one record for each part and one at the end, labelled with the salt and with "part" or "end". Only
its owner may read the file, as it contains a prompt.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.backend import State
from engine.checksummed import AtomicFile, DamagedFile
from engine.kv import record


class SequencePart(NamedTuple):
    """Consecutive tokens from position `start` on, and the state of their cells."""

    start: int
    tokens: array[int]
    state: State

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.tokens)


class SequenceWriter:
    """Writes a sequence to a temporary file, which `commit` renames. Methods raise OSError."""

    def __init__(self, path: Path, identity: str, salt: str) -> None:
        """Creates the temporary file, and the folder if it does not exist. Raises DamagedFile if `path` is another kind
        of file."""
        record.check_record_file(path)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._new = AtomicFile(path, "slot.", ".part")
        self._identity, self._salt = record.identity_digest(identity), salt

    def write(self, parts: Iterable[SequencePart]) -> None:
        """Appends consecutive parts."""
        for part in parts:
            record.write(self._new.file, self._identity, (self._salt, "part"), *part)

    def commit(self) -> int:
        """Completes the file and renames it to its path, where it replaces an earlier file. Returns the size in
        bytes."""
        record.write(self._new.file, self._identity, (self._salt, "end"), 0, array("i"), np.empty(0, np.uint8))
        return self._new.commit()

    def discard(self) -> None:
        """Removes the temporary file. No effect after `commit`."""
        self._new.discard()


class SequenceReader:
    """Reads a sequence file. The constructor verifies the whole file. Methods raise DamagedFile or OSError."""

    def __init__(self, path: Path, identity: str) -> None:
        self._identity = record.identity_digest(identity)
        self._file = path.open("rb")
        try:
            self.bytes = os.fstat(self._file.fileno()).st_size
            """Size of the file in bytes."""
            while (found := self._next())[1]:
                pass
            if self._file.read(1):
                raise DamagedFile("it is torn or damaged")
            self.salt = found[0]
            self._file.seek(0)
        except BaseException:
            self.close()
            raise

    def read(self, max_bytes: int) -> list[SequencePart]:
        """Returns the next parts, until their states have `max_bytes` or more. Returns an empty list at the end."""
        parts: list[SequencePart] = []
        while max_bytes > 0:
            before = self._file.tell()
            part = self._next()[1]
            if part is None:
                self._file.seek(before)  # so that the next call reads the end record again
                break
            parts.append(part)
            max_bytes -= part.state.nbytes
        return parts

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _next(self) -> tuple[str, SequencePart | None]:
        """Returns the salt and the next part; None as the part at the end."""
        head = record.read_head(self._file, self._identity)
        state = record.read_state(self._file, head)
        salt, kind = head.labels
        return salt, SequencePart(head.start, head.tokens, state) if kind == "part" else None
