"""Files with a magic, a version, an owner and a checksum, written whole or not at all.

    magic (8 bytes) | version (uint32, little-endian) | owner (32 bytes) | payload | BLAKE2b of all preceding bytes

KV blocks, slot files, the n-gram pool and n-gram counts have this envelope. The owner is a hash of everything that must
be equal for the payload to be usable, for example of the model and its KV types.
"""

from __future__ import annotations

import os
import struct
import tempfile
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Self

_PREFIX = struct.Struct("<8sI32s")
PREFIX_BYTES = _PREFIX.size


class DamagedFile(Exception):
    """The file is truncated, damaged, of another format or of another owner. The message is one line."""


class FileFormat(NamedTuple):
    """The envelope of one kind of file."""

    magic: bytes
    """The first 8 bytes of the file."""
    version: int
    checksum_bytes: int
    owner_mismatch: str
    """The error message for a file of another owner."""

    def checksum(self, content: bytes | memoryview) -> bytes:
        """Returns the BLAKE2b digest of `content`, `checksum_bytes` long."""
        return blake2b(content, digest_size=self.checksum_bytes).digest()

    def seal(self, owner: bytes, payload: bytes) -> bytes:
        """Returns `payload` in its envelope."""
        assert len(self.magic) == 8, "a magic has 8 bytes"
        assert len(owner) == 32, "an owner has 32 bytes"
        content = _PREFIX.pack(self.magic, self.version, owner) + payload
        return content + self.checksum(content)

    def unseal(self, content: bytes, owner: bytes) -> bytes:
        """Returns the payload of `content`. Raises DamagedFile."""
        if len(content) < PREFIX_BYTES + self.checksum_bytes:
            raise DamagedFile(f"it is torn: it has only {len(content)} bytes")
        if self.checksum(content[: -self.checksum_bytes]) != content[-self.checksum_bytes :]:
            raise DamagedFile("it is torn or damaged, or another kind of file: its checksum is wrong")
        magic, version, found = _PREFIX.unpack_from(content)
        if magic != self.magic:
            raise DamagedFile(f"it is another kind of file: it begins with {magic!r}, not {self.magic!r}")
        if version != self.version:
            raise DamagedFile(f"it has version {version} of its format, not {self.version}")
        if found != owner:
            raise DamagedFile(self.owner_mismatch)
        return content[PREFIX_BYTES : -self.checksum_bytes]

    def write(self, path: Path, owner: bytes, payload: bytes) -> None:
        """Replaces the file at `path`.

        Raises OSError if the file cannot be written, and DamagedFile if the earlier file is of another format or owner:
        the earlier file then stays, and no temporary file is left.
        """
        self.check_replaceable(path, owner)
        with AtomicFile(path, path.name) as new:
            new.file.write(self.seal(owner, payload))
            new.commit()

    def check_replaceable(self, path: Path, owner: bytes | None = None) -> None:
        """Raises DamagedFile unless `path` is free, an empty file, or a file of this format and of `owner`. `None` is
        any owner. Raises OSError if the file cannot be read."""
        if not path.exists():
            return
        if not path.is_file():
            raise DamagedFile(f"{path} cannot be replaced: it is no regular file")
        with path.open("rb") as file:
            head = file.read(PREFIX_BYTES)
        if head and head[:8] != self.magic:
            kind = f"it begins with {head[:8]!r}, not {self.magic!r}"
            raise DamagedFile(f"{path} cannot be replaced: it is another kind of file: {kind}")
        if owner is not None and len(head) == PREFIX_BYTES and _PREFIX.unpack(head)[2] != owner:
            raise DamagedFile(f"{path} cannot be replaced: {self.owner_mismatch}")

    def read(self, path: Path, owner: bytes) -> bytes:
        """Returns the payload of the file at `path`. Raises DamagedFile, or OSError if the file cannot be read."""
        try:
            return self.unseal(path.read_bytes(), owner)
        except DamagedFile as error:
            raise DamagedFile(f"{path} cannot be used: {error}") from None


class AtomicFile:
    """A temporary file in the folder of `path` that `commit` moves to `path`, with access for the current user only.

    Leaving the `with` block without `commit` removes the temporary file; an earlier file at `path` stays. Raises
    OSError.
    """

    def __init__(self, path: Path, prefix: str, suffix: str = "") -> None:
        """The temporary file's name begins with `prefix` and ends with `suffix`."""
        handle, name = tempfile.mkstemp(suffix, prefix, path.parent)
        self._path = path
        self._temporary = Path(name)
        self.file = open(handle, "wb")  # noqa: SIM115

    def commit(self, *, durable: bool = True) -> int:
        """Moves the file into place and returns its size in bytes. A `durable` file survives a power failure."""
        self.file.flush()
        if durable:
            os.fsync(self.file.fileno())
        size = self.file.tell()
        self.file.close()
        os.replace(self._temporary, self._path)
        return size

    def discard(self) -> None:
        """Removes the temporary file; no effect after `commit`."""
        with suppress(OSError):
            self.file.close()
        with suppress(OSError):
            self._temporary.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()
