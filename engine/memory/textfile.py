"""A file with one text and its states, to be read where they can be loaded: for the same model, library and types.

    magic (8 bytes) | version (uint32) | identity (32 bytes) | size of the salt (uint32) | the salt
    | parts: position of the first token (int64), tokens (uint32), size of the state (uint64), the tokens (int32 each),
      the state | a part without tokens | checksum of all before it (BLAKE2b-128)

All little-endian. Files are their owner's only, as prompts can be read back from them.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.backend import State
from engine.replacement import Replacement

_MAGIC = b"pacetext"
_VERSION = 1
_HEAD = struct.Struct("<8sI32sI")
_PART = struct.Struct("<qIQ")
_CHECKSUM = 16
_BLOCK = 2**20


class Damaged(Exception):
    """Not a whole file of this version and identity; the text says which."""


class Part(NamedTuple):
    """Tokens of a text, the first of them at position `start`, and the state of their cells."""

    start: int
    tokens: array[int]
    state: State

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + len(self.tokens)


class Writer:
    """A file being written, beside the place where `commit` puts it. Raises OSError."""

    def __init__(self, path: Path, identity: str, salt: str) -> None:
        """Makes the folder, if need be."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._new = Replacement(path, "slot.", ".part")
        self._checksum = blake2b(digest_size=_CHECKSUM)
        named = salt.encode()
        self._put(_HEAD.pack(_MAGIC, _VERSION, _hash(identity), len(named)), named)

    def write(self, parts: Iterable[Part]) -> None:
        """Adds parts, which continue each other."""
        for start, tokens, state in parts:
            head = _PART.pack(start, len(tokens), state.nbytes)
            self._put(head, struct.pack(f"<{len(tokens)}i", *tokens), state.data)

    def commit(self) -> int:
        """Ends the file and puts it in place of what was there; its size in bytes."""
        self._put(_PART.pack(0, 0, 0))
        self._new.file.write(self._checksum.digest())
        return self._new.commit()

    def discard(self) -> None:
        """Leaves nothing behind, unless the file is in place."""
        self._new.discard()

    def _put(self, *contents: bytes | memoryview) -> None:
        for content in contents:
            self._checksum.update(content)
            self._new.file.write(content)


class Reader:
    """A file, all of which was checked. Raises Damaged or OSError."""

    def __init__(self, path: Path, identity: str) -> None:
        self._file = path.open("rb")
        try:
            self.bytes = os.fstat(self._file.fileno()).st_size
            """The file's size."""
            self._check()
            self._file.seek(0)
            self.salt = self._head(_hash(identity))
        except BaseException:
            self.close()
            raise

    def read(self, most: int) -> list[Part]:
        """The next parts, of `most` bytes or one more than fits into them; none at the end."""
        parts: list[Part] = []
        left = most
        while left > 0 and (part := self._part()) is not None:
            parts.append(part)
            left -= part.state.nbytes
        return parts

    def close(self) -> None:
        """The file is not read any more."""
        self._file.close()

    def _check(self) -> None:
        left = self.bytes - _CHECKSUM
        checksum = blake2b(digest_size=_CHECKSUM)
        while left > 0 and (block := self._file.read(min(_BLOCK, left))):
            checksum.update(block)
            left -= len(block)
        if left or self._file.read() != checksum.digest():
            raise Damaged("it is torn or damaged")

    def _head(self, identity: bytes) -> str:
        magic, version, owner, size = _HEAD.unpack(self._read(_HEAD.size))
        if (magic, version) != (_MAGIC, _VERSION):
            raise Damaged("it is not a slot's file, or one of another version")
        if owner != identity:
            raise Damaged("it was saved with another model, another build of the library or other types of cells")
        try:
            return self._read(size).decode()
        except UnicodeDecodeError:
            raise Damaged("it is not written as such files are") from None

    def _part(self) -> Part | None:
        start, count, size = _PART.unpack(self._read(_PART.size))
        if not count:
            self._file.seek(-_PART.size, os.SEEK_CUR)  # to be found again by the next call
            return None
        tokens = array("i", struct.unpack(f"<{count}i", self._read(4 * count)))
        self._within(size)
        state = np.empty(size, np.uint8)
        if self._file.readinto(state.data) != size:
            raise Damaged("it was changed while it was read")
        return Part(start, tokens, state)

    def _read(self, size: int) -> bytes:
        self._within(size)
        return self._file.read(size)

    def _within(self, size: int) -> None:
        """Before memory is taken for as much as a file says."""
        if self._file.tell() + size > self.bytes - _CHECKSUM:
            raise Damaged("it is not written as such files are")


def _hash(identity: str) -> bytes:
    return blake2b(identity.encode(), digest_size=32).digest()
