"""A run of tokens with their state as bytes in a file, readable for the same model, library build and KV types.

    magic (8 bytes) | version (uint32) | identity (32 bytes) | sizes of two labels (uint32 each)
    | position of the first token (int64) | tokens (uint32) | size of the state (uint64) | checksum of the state
    | the labels | the tokens (int32 each) | checksum of all before it | the state

All little-endian; checksums are BLAKE2b-128. The second one covers the first, so that tokens can be trusted without
reading the state.
"""

from __future__ import annotations

import os
import struct
from array import array
from hashlib import blake2b
from typing import BinaryIO, NamedTuple

import numpy as np

from engine.backend import State

_MAGIC = b"paceline"
_VERSION = 2
_FIXED = struct.Struct("<8sI32sIIqIQ16s")
_CHECKSUM_BYTES = 16


class Damaged(Exception):
    """The file is not whole, or not of this version and identity; the message says which."""


class Head(NamedTuple):
    """A record without its state."""

    labels: tuple[str, str]
    """Two names, of which the owner of the file knows the meaning."""
    start: int
    """Position of the first token."""
    tokens: array[int]
    state_bytes: int
    checksum: bytes
    """Of the state."""


def hashed(identity: str) -> bytes:
    """The form of an identity in files."""
    return blake2b(identity.encode(), digest_size=32).digest()


def write(
    file: BinaryIO, identity: bytes, labels: tuple[str, str], start: int, tokens: array[int], state: State
) -> None:
    """Appends a record. Raises OSError."""
    first, second = (label.encode() for label in labels)
    sizes = len(first), len(second), start, len(tokens), state.nbytes
    head = _FIXED.pack(_MAGIC, _VERSION, identity, *sizes, _checksum(state.data))
    head += first + second + struct.pack(f"<{len(tokens)}i", *tokens)
    file.write(head + _checksum(head))
    file.write(state.data)


def read_head(file: BinaryIO, identity: bytes) -> Head:
    """Reads up to the state of the next record. Raises Damaged or OSError."""
    fixed = file.read(_FIXED.size).ljust(_FIXED.size, b"\0")  # too short a file fails one of the checks
    magic, version, owner, *sizes, checksum = _FIXED.unpack(fixed)
    first, second, start, count, state = sizes
    left = os.fstat(file.fileno()).st_size - file.tell()
    size = first + second + 4 * count + _CHECKSUM_BYTES
    if size + state > left:  # before a read as large as it says
        raise Damaged("it is torn or damaged")
    rest = file.read(size)
    body = rest[:-_CHECKSUM_BYTES]
    if _checksum(fixed + body) != rest[-_CHECKSUM_BYTES:]:
        raise Damaged("it is torn or damaged")
    if (magic, version) != (_MAGIC, _VERSION):
        raise Damaged("it is of another version")
    if owner != identity:
        raise Damaged("it was saved with another model, another build of the library or other types of cells")
    labels = body[:first].decode(), body[first : first + second].decode()
    tokens = array("i", struct.unpack_from(f"<{count}i", body, first + second))
    return Head(labels, start, tokens, state, checksum)


def read_state(file: BinaryIO, head: Head) -> State:
    """Reads the state after `read_head`. Raises Damaged or OSError."""
    state = np.empty(head.state_bytes, np.uint8)
    if file.readinto(state.data) != head.state_bytes or _checksum(state.data) != head.checksum:  # type: ignore[attr-defined]
        raise Damaged("it is torn or damaged")
    return state


def _checksum(content: bytes | memoryview) -> bytes:
    return blake2b(content, digest_size=_CHECKSUM_BYTES).digest()
