"""Pieces of prefixes on disk: a file each, written and read by one thread beside the engine's.

    magic (8 bytes) | version (uint32) | identity (32 bytes) | sizes of key and parent (uint8 each)
    | position of the first token (int64) | tokens (uint32) | size of the state (uint64) | checksum of the state
    | key | parent | the tokens (int32 each) | checksum of all before it | the state

All little-endian; checksums are BLAKE2b-128. The second one covers the first, so that tokens can be trusted without
reading the state. Files are their owner's only, as prompts can be read back from them.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import tempfile
from array import array
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from hashlib import blake2b
from math import inf
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from time import monotonic, time
from typing import BinaryIO, NamedTuple

import numpy as np

from engine.backend import State
from engine.replacement import Replacement

log = logging.getLogger("paceline.memory")

PAUSE = 60.0
"""Seconds for which nothing is written after a write has failed."""

_MAGIC = b"paceline"
_VERSION = 1
_FIXED = struct.Struct("<8sI32sBBqIQ16s")
_CHECKSUM = 16
_KEY = re.compile(r"[0-9a-f]{1,64}")
_PIECE = re.compile(r"[0-9a-f]{1,64}\.piece")
_LEFTOVER = re.compile(r"[0-9a-f]{1,64}\.[a-z0-9_]{8}\.part")  # as tempfile names them


class UnusableFolder(OSError):
    """Nothing can be kept in the folder; the text is one line that says which and why."""


class Entry(NamedTuple):
    """What a file says of its piece."""

    key: str
    """Hexadecimal; the name of the file without its suffix."""
    parent: str
    """The key of the piece before it, or of its namespace's root."""
    start: int
    """Position of its first token."""
    tokens: array[int]
    bytes: int
    """Size of the file."""
    used: float
    """When it was last written or touched, in seconds since the epoch."""


class Written(NamedTuple):
    """What became of a write: the size of the file, or None if none was written."""

    key: str
    bytes: int | None


class _Write(NamedTuple):
    key: str
    parent: str
    start: int
    tokens: array[int]
    state: State
    at: float


class _Read(NamedTuple):
    key: str
    answer: Future[State | None]


class _Remove(NamedTuple):
    key: str


class _Touch(NamedTuple):
    keys: tuple[str, ...]
    at: float


class _Damaged(Exception):
    """Not a whole file of this version and identity under its own name."""


class Disk:
    """The pieces of one identity in a folder. Other processes may use and empty it at the same time.

    All methods are for one thread, the engine's, and return at once, `entries` and `close` excepted. What is asked of
    a key is as if done in the order of asking, though reads pass what waits for other keys. Equal identities promise
    that states are interchangeable.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """Makes `folder` and one for `identity` in it; raises UnusableFolder if files cannot be made there."""
        self.folder = folder / blake2b(identity.encode(), digest_size=8).hexdigest()
        self._identity = blake2b(identity.encode(), digest_size=32).digest()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UnusableFolder(f"cannot keep prefixes in {self.folder}: {error.strerror or error}") from error
        self._inbox: SimpleQueue[_Write | _Read | _Remove | _Touch | None] = SimpleQueue()
        self._finished: deque[Written] = deque()
        self._thread: Thread | None = None
        self._deadline = inf  # by the monotonic clock; finite once closed
        self._asked = 0  # bytes to be written, ever
        # What follows only the worker changes.
        self._done = 0  # bytes of these
        self._reads: deque[_Read] = deque()
        self._others: deque[_Write | _Remove | _Touch | None] = deque()
        self._resume = -inf  # when writes are tried again, since the last one failed

    def entries(self) -> list[Entry]:
        """What is there, the longest unused first. For the start, before anything is written; reads no states.

        Removes what can never be of use: pieces that are torn or of another version or identity, and files that were
        being written when a process died. Files with names that this class does not give are left alone.
        """
        found: list[Entry] = []
        useless: list[Path] = []
        with os.scandir(self.folder) as names:
            paths = [Path(name.path) for name in names if name.is_file(follow_symlinks=False)]
        for path in paths:
            if _LEFTOVER.fullmatch(path.name):
                useless.append(path)
            elif _PIECE.fullmatch(path.name):
                try:
                    with suppress(OSError), path.open("rb", buffering=0) as file:
                        found.append(_head(file, path.stem, self._identity)[0])
                except _Damaged:
                    useless.append(path)
        for path in useless:
            _unlink(path)
        if useless:
            log.info("removed %d unusable files from %s", len(useless), self.folder)
        return sorted(found, key=lambda entry: entry.used)

    def write(self, key: str, parent: str, start: int, tokens: array[int], state: State) -> None:
        """Has a piece written, in place of what has its key; `finished` will say what came of it.

        Nobody changes `tokens` or `state` any more.
        """
        assert tokens.typecode == "i", "tokens are C ints"
        assert state.ndim == 1, "a state is one run of bytes"
        assert state.flags.c_contiguous, "a state is one run of bytes"
        self._asked += state.nbytes
        self._submit(_Write(key, parent, start, tokens, state, time()), key, parent)

    def read(self, key: str) -> Future[State | None]:
        """Will have the state of a piece, not to be changed; None if it is gone or damaged: then no file is left.

        It never has an exception. One that is cancelled in time reads nothing.
        """
        answer: Future[State | None] = Future()
        self._submit(_Read(key, answer), key)
        return answer

    def touch(self, keys: Iterable[str]) -> None:
        """Marks pieces as of use now; those that are gone are skipped."""
        job = _Touch(tuple(keys), time())
        self._submit(job, *job.keys)

    def remove(self, key: str) -> None:
        """Has a piece removed, if it is there."""
        self._submit(_Remove(key), key)

    def finished(self) -> list[Written]:
        """What became of writes since the last call, in their order. Takes no lock."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    @property
    def queued(self) -> int:
        """Bytes of states that wait in memory to be written."""
        return self._asked - self._done

    @property
    def paused(self) -> bool:
        """Whether writes fail untried, because one failed less than `PAUSE` ago."""
        return monotonic() < self._resume

    def close(self, seconds: float = 5.0) -> None:
        """Waits until all is done, but no longer than `seconds`; nothing is asked for afterwards.

        What is not begun by then is given up: reads have None, writes are not done.
        """
        self._deadline = monotonic() + seconds
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join(seconds)

    def _submit(self, job: _Write | _Read | _Remove | _Touch, *keys: str) -> None:
        assert self._deadline == inf, "nothing is asked of a closed disk"
        assert all(map(_KEY.fullmatch, keys)), f"not all of {keys} are keys"
        if self._thread is None:
            # A daemon, as a process must be able to end while a network drive hangs.
            self._thread = Thread(target=self._work, name="paceline-disk", daemon=True)
            self._thread.start()
        self._inbox.put(job)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            match job:
                case _Read():
                    if job.answer.set_running_or_notify_cancel():
                        job.answer.set_result(self._load(job.key))
                case _Write():
                    self._finished.append(Written(job.key, self._save(job)))
                    self._done += job.state.nbytes
                case _Remove():
                    _unlink(self._path(job.key))
                case _Touch():
                    for key in job.keys:
                        with suppress(OSError):
                            os.utime(self._path(key), (job.at, job.at))
            del job  # or its state would stay in memory until there is another

    def _next(self) -> _Read | _Write | _Remove | _Touch | None:
        """Waits for something to do; reads come first. None when closed and all is done."""
        while not self._inbox.empty() or not (self._reads or self._others):
            self._sort(self._inbox.get())
        return self._reads.popleft() if self._reads else self._others.popleft()

    def _sort(self, job: _Read | _Write | _Remove | _Touch | None) -> None:
        """Queues a job; a read that would pass a write or removal of its key is answered by that."""
        if not isinstance(job, _Read):
            self._others.append(job)
            return
        changes = (other for other in reversed(self._others) if isinstance(other, _Write | _Remove))
        last = next((change for change in changes if change.key == job.key), None)
        if last is None:
            self._reads.append(job)
        elif job.answer.set_running_or_notify_cancel():
            job.answer.set_result(last.state if isinstance(last, _Write) else None)

    def _load(self, key: str) -> State | None:
        path = self._path(key)
        try:
            return _load(path, self._identity) if monotonic() < self._deadline else None
        except FileNotFoundError:
            return None
        except Exception as error:
            # Whatever it is, somebody waits for the answer, and takes the piece for gone from now on.
            log.warning("removing %s, which cannot be read: %s", path, error)
            _unlink(path)
            return None

    def _save(self, piece: _Write) -> int | None:
        if self.paused or monotonic() >= self._deadline:
            return None
        path = self._path(piece.key)
        try:
            try:
                size = _save(path, self._identity, piece)
            except FileNotFoundError:
                # A process that begins to use the folder takes our temporary file for a dead one's, but only once.
                size = _save(path, self._identity, piece)
        except Exception as error:
            if self._resume == -inf:
                log.warning("cannot keep prefixes in %s: %s; trying again every %.0f s", self.folder, error, PAUSE)
            self._resume = monotonic() + PAUSE
            return None
        if self._resume > -inf:
            log.info("prefixes are kept in %s again", self.folder)
            self._resume = -inf
        return size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.piece"


def _checksum(content: bytes | memoryview) -> bytes:
    return blake2b(content, digest_size=_CHECKSUM).digest()


def _save(path: Path, identity: bytes, piece: _Write) -> int:
    """Puts a file in place and returns its size. On failure what was there stays, and nothing is left beside it.

    It is not flushed to the device: a cache need not survive a power failure, and a checksum tells what did.
    """
    key, parent, state = piece.key.encode(), piece.parent.encode(), piece.state.data
    sizes = len(key), len(parent), piece.start, len(piece.tokens), state.nbytes
    head = _FIXED.pack(_MAGIC, _VERSION, identity, *sizes, _checksum(state))
    head += key + parent + struct.pack(f"<{len(piece.tokens)}i", *piece.tokens)
    head += _checksum(head)
    with Replacement(path, f"{piece.key}.", ".part") as new:
        new.file.write(head)
        new.file.write(state)
        new.file.flush()
        os.utime(new.file.fileno(), (piece.at, piece.at))
        return new.commit(durable=False)


def _head(file: BinaryIO, key: str, identity: bytes) -> tuple[Entry, int, bytes]:
    """What the file of `key` says, and its state's size and checksum; leaves it at the state. Raises _Damaged."""
    about = os.fstat(file.fileno())
    fixed = file.read(_FIXED.size).ljust(_FIXED.size, b"\0")  # too short a file fails one of the checks
    magic, version, owner, own, parent, start, count, state, checksum = _FIXED.unpack(fixed)
    if (magic, version, owner) != (_MAGIC, _VERSION, identity):
        raise _Damaged("it is of another version or identity")
    length = own + parent + 4 * count + _CHECKSUM
    if about.st_size != _FIXED.size + length + state:  # before a read as large as it says
        raise _Damaged("it is torn")
    rest = file.read(length)
    body = rest[:-_CHECKSUM]
    if _checksum(fixed + body) != rest[-_CHECKSUM:] or body[:own] != key.encode():
        raise _Damaged("its head is damaged")
    tokens = array("i", struct.unpack_from(f"<{count}i", body, own + parent))
    before = body[own : own + parent].decode()
    return Entry(key, before, start, tokens, about.st_size, about.st_mtime), state, checksum


def _load(path: Path, identity: bytes) -> State:
    with path.open("rb") as file:
        _, size, checksum = _head(file, path.stem, identity)
        state = np.empty(size, np.uint8)
        if file.readinto(state.data) != size or _checksum(state.data) != checksum:
            raise _Damaged("its state is damaged")
    return state


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
