"""File record of a run of tokens and its state. Only the same model, library build and KV types can read it.

    magic (8 bytes) | version (uint32) | identity (32 bytes) | sizes of two labels (uint32 each)
    | position of the first token (int64) | tokens (uint32) | size of the state (uint64) | checksum of the state
    | the labels | the tokens (int32 each) | checksum of all bytes so far | the state

Numbers are little-endian and checksums BLAKE2b-128. The bytes before the state are one `FileFormat` envelope, so the
tokens can be verified without reading the state.
"""

from __future__ import annotations

import os
import struct
from array import array
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from engine.backend import State
from engine.checksummed import PREFIX_BYTES, DamagedFile, FileFormat

_FORMAT = FileFormat(
    b"paceline", 2, 16, "it was saved with another model, another build of the library or other types of cells"
)
_FIXED = struct.Struct("<IIqIQ16s")


def check_record_file(path: Path) -> None:
    """Raises DamagedFile unless `path` is free, an empty file, or a file that begins with a record. Raises OSError."""
    _FORMAT.check_replaceable(path)


class Head(NamedTuple):
    """The content of a record except the state."""

    labels: tuple[str, str]
    """For the disk tier, the keys of the block and of its parent. For a slot file, the salt, and "part" or "end"."""
    start: int
    """Position of the first token."""
    tokens: array[int]
    state_bytes: int
    checksum: bytes
    """Checksum of the state."""


def identity_digest(identity: str) -> bytes:
    """Returns the digest of an identity, as records contain it."""
    return blake2b(identity.encode(), digest_size=32).digest()


def write(
    file: BinaryIO, identity: bytes, labels: tuple[str, str], start: int, tokens: array[int], state: State
) -> None:
    """Appends a record to `file`. Raises OSError."""
    first, second = (label.encode() for label in labels)
    sizes = len(first), len(second), start, len(tokens), state.nbytes
    fixed = _FIXED.pack(*sizes, _FORMAT.checksum(state.data))
    file.write(_FORMAT.seal(identity, fixed + first + second + struct.pack(f"<{len(tokens)}i", *tokens)))
    file.write(state.data)


def read_head(file: BinaryIO, identity: bytes) -> Head:
    """Reads the next record of `file` except its state. Raises DamagedFile or OSError."""
    fixed_bytes = PREFIX_BYTES + _FIXED.size
    content = file.read(fixed_bytes).ljust(fixed_bytes, b"\0")  # padding of a short file fails a later check
    first, second, start, count, state_bytes, checksum = _FIXED.unpack_from(content, PREFIX_BYTES)
    rest_bytes = first + second + 4 * count + _FORMAT.checksum_bytes
    if rest_bytes + state_bytes > os.fstat(file.fileno()).st_size - file.tell():
        raise DamagedFile("it is torn or damaged")
    labels_and_tokens = _FORMAT.unseal(content + file.read(rest_bytes), identity)[_FIXED.size :]
    labels = labels_and_tokens[:first].decode(), labels_and_tokens[first : first + second].decode()
    tokens = array("i", struct.unpack_from(f"<{count}i", labels_and_tokens, first + second))
    return Head(labels, start, tokens, state_bytes, checksum)


def read_state(file: BinaryIO, head: Head) -> State:
    """Reads the state of the record whose head `read_head` has just read. Raises DamagedFile or OSError."""
    state = np.empty(head.state_bytes, np.uint8)
    if file.readinto(state.data) != head.state_bytes or _FORMAT.checksum(state.data) != head.checksum:  # type: ignore[attr-defined]
        raise DamagedFile("it is torn or damaged")
    return state
