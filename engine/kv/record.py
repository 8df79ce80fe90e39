"""A run of tokens with their state as bytes in a file, readable for the same model, library build and KV types.

    magic (8 bytes) | version (uint32) | identity (32 bytes) | sizes of two labels (uint32 each)
    | position of the first token (int64) | tokens (uint32) | size of the state (uint64) | checksum of the state
    | the labels | the tokens (int32 each) | checksum of all before it | the state

All little-endian; checksums are BLAKE2b-128. All before the state is one `FileFormat` envelope, so the tokens are
verified without the state.
"""

from __future__ import annotations

import os
import struct
from array import array
from hashlib import blake2b
from typing import BinaryIO, NamedTuple

import numpy as np

from engine.backend import State
from engine.checksummed import PREFIX_BYTES, DamagedFile, FileFormat

_FORMAT = FileFormat(
    b"paceline", 2, 16, "it was saved with another model, another build of the library or other types of cells"
)
_FIXED = struct.Struct("<IIqIQ16s")


class Head(NamedTuple):
    """A record without its state."""

    labels: tuple[str, str]
    """Two names; their meaning depends on the kind of file."""
    start: int
    """Position of the first token."""
    tokens: array[int]
    state_bytes: int
    checksum: bytes
    """Of the state."""


def hashed(identity: str) -> bytes:
    """Returns the digest of an identity that is written to files."""
    return blake2b(identity.encode(), digest_size=32).digest()


def write(
    file: BinaryIO, identity: bytes, labels: tuple[str, str], start: int, tokens: array[int], state: State
) -> None:
    """Appends a record. Raises OSError."""
    first, second = (label.encode() for label in labels)
    sizes = len(first), len(second), start, len(tokens), state.nbytes
    fixed = _FIXED.pack(*sizes, _FORMAT.checksum(state.data))
    file.write(_FORMAT.seal(identity, fixed + first + second + struct.pack(f"<{len(tokens)}i", *tokens)))
    file.write(state.data)


def read_head(file: BinaryIO, identity: bytes) -> Head:
    """Reads up to the state of the next record. Raises DamagedFile or OSError."""
    fixed_bytes = PREFIX_BYTES + _FIXED.size
    content = file.read(fixed_bytes).ljust(fixed_bytes, b"\0")  # a file that is too short fails one of the checks
    first, second, start, count, state_bytes, checksum = _FIXED.unpack_from(content, PREFIX_BYTES)
    rest_bytes = first + second + 4 * count + _FORMAT.checksum_bytes
    if rest_bytes + state_bytes > os.fstat(file.fileno()).st_size - file.tell():
        raise DamagedFile("it is torn or damaged")
    labels_and_tokens = _FORMAT.unseal(content + file.read(rest_bytes), identity)[_FIXED.size :]
    labels = labels_and_tokens[:first].decode(), labels_and_tokens[first : first + second].decode()
    tokens = array("i", struct.unpack_from(f"<{count}i", labels_and_tokens, first + second))
    return Head(labels, start, tokens, state_bytes, checksum)


def read_state(file: BinaryIO, head: Head) -> State:
    """Reads the state after `read_head`. Raises DamagedFile or OSError."""
    state = np.empty(head.state_bytes, np.uint8)
    if file.readinto(state.data) != head.state_bytes or _FORMAT.checksum(state.data) != head.checksum:  # type: ignore[attr-defined]
        raise DamagedFile("it is torn or damaged")
    return state
