"""Files that proposers keep between runs: whole or refused.

    magic (8 bytes) | version (uint32) | vocabulary key (32 bytes) | body | BLAKE2b-256 of all before it

A vocabulary key is any 32 bytes that two models share only if a token id means the same in both.
"""

from __future__ import annotations

import struct
from hashlib import blake2b
from pathlib import Path

from engine.replacement import Replacement

VERSION = 1
_HEAD = struct.Struct("<8sI32s")
_CHECKSUM = 32


class DamagedFile(Exception):
    """A file that cannot be used: torn, damaged, of another kind or for another vocabulary. Its text is one line."""


def write(path: Path, magic: bytes, vocabulary: bytes, body: bytes) -> None:
    """Puts a file in place of what was at `path`, readable by its owner only.

    On failure, which is an OSError, what was there stays, and nothing is left beside it.
    """
    assert len(magic) == 8, "a magic has 8 bytes"
    assert len(vocabulary) == 32, "a vocabulary key has 32 bytes"
    content = _HEAD.pack(magic, VERSION, vocabulary) + body
    with Replacement(path, path.name) as new:
        new.file.write(content)
        new.file.write(_checksum(content))
        new.commit()


def read(path: Path, magic: bytes, vocabulary: bytes) -> bytes:
    """The body of the file at `path`. Raises DamagedFile, or OSError if it cannot be read at all."""
    content = path.read_bytes()
    if len(content) < _HEAD.size + _CHECKSUM:
        raise DamagedFile(f"{path} is torn: it has only {len(content)} bytes")
    found, version, owner = _HEAD.unpack_from(content)
    if found != magic:
        raise DamagedFile(f"{path} is another kind of file: it begins with {found!r}, not {magic!r}")
    if version != VERSION:
        raise DamagedFile(f"{path} has version {version} of its format, not {VERSION}")
    if _checksum(content[:-_CHECKSUM]) != content[-_CHECKSUM:]:
        raise DamagedFile(f"{path} is torn or damaged: its checksum is wrong")
    if owner != vocabulary:
        raise DamagedFile(f"{path} was written for a model with another vocabulary")
    return content[_HEAD.size : -_CHECKSUM]


def _checksum(content: bytes) -> bytes:
    return blake2b(content, digest_size=_CHECKSUM).digest()
