"""Blocks on disk: one file with one record for each block, written and read by a worker thread.

Only their owner may read the files, as they contain prompts.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from itertools import count
from math import inf
from pathlib import Path
from queue import PriorityQueue
from threading import Thread
from time import monotonic, time
from typing import BinaryIO, NamedTuple

from engine.backend import State
from engine.background import run_in_background
from engine.checksummed import AtomicFile, DamagedFile
from engine.kv import record

log = logging.getLogger("paceline.memory")

# After a failed write no write is tried for this long, so that a full disk does not fill the log.
WRITE_PAUSE_SECONDS = 60.0

_KEY = re.compile(r"[0-9a-f]{1,64}")
_BLOCK = re.compile(r"[0-9a-f]{1,64}\.block")
_LEFTOVER = re.compile(r"[0-9a-f]{1,64}\.[a-z0-9_]{8}\.part")  # as tempfile names them
# Priorities in the queue, the most urgent first. Touches have that of writes and removals.
_READ, _CHANGE, _CLOSE = range(3)


class UnusableFolder(OSError):
    """Files cannot be created in the folder. The message is one line with the folder and the reason."""


def prepare_folder(folder: Path) -> None:
    """Creates `folder` if it does not exist. Raises UnusableFolder if files cannot be created there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UnusableFolder(f"cannot write prefixes to {folder}: {error.strerror or error}") from error


class DiskEntry(NamedTuple):
    """The content of a block's file except the state."""

    key: str
    """Key of the block in hexadecimal. It is the name of the file without the suffix."""
    parent: str
    """Key of the parent block, or of the root for the first block of a sequence."""
    start: int
    """Position of the first token."""
    tokens: array[int]
    bytes: int
    """Size of the file."""
    used_at: float
    """Time of the last write or touch, in seconds since the epoch."""


class Written(NamedTuple):
    """Result of a write."""

    key: str
    bytes: int | None
    """Size of the file; None if no file was written."""


class _Change(NamedTuple):
    """A pending write or removal of a key. `state` is None for a removal."""

    state: State | None


class Disk:
    """The blocks of one identity in a folder. Other processes may use and empty the folder at the same time.

    Contexts with equal identities can load each other's states. Belongs to the engine thread. All methods except
    `entries` and `close` return at once. Operations on one key take effect in the order of the calls; reads are done
    before queued writes of other keys.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """Creates `folder` and a subfolder for `identity`. Raises UnusableFolder if files cannot be created there."""
        self.folder = folder / blake2b(identity.encode(), digest_size=8).hexdigest()
        self._identity = record.identity_digest(identity)
        prepare_folder(self.folder)
        self._jobs: PriorityQueue[tuple[int, int, Callable[[], object] | None]] = PriorityQueue()
        self._job_numbers = count()  # keep jobs of equal priority in order
        self._changes: dict[str, _Change] = {}  # the latest unfinished change of each key
        self._finished: deque[tuple[str, _Change, int | None]] = deque()
        self._thread: Thread | None = None
        self._deadline = inf  # monotonic time after which no job is begun; inf until `close`
        self._submitted_bytes = 0  # bytes of all states submitted for writing since the start
        self._done_bytes = 0  # submitted bytes that were written or given up; changed on the worker thread only
        # Monotonic time at which writes are tried again; -inf if the last one succeeded. Changed on the worker only.
        self._writes_resume_at = -inf

    def entries(self) -> list[DiskEntry]:
        """Returns the blocks in the folder, the least recently used first. Must be called before the first write.

        Does not read states. Removes files that can never be used: torn blocks, blocks of another version or identity,
        and temporary files of processes that died while writing. Files with other names stay.
        """
        found: list[DiskEntry] = []
        useless: list[Path] = []
        with os.scandir(self.folder) as names:
            paths = [Path(name.path) for name in names if name.is_file(follow_symlinks=False)]
        for path in paths:
            if _LEFTOVER.fullmatch(path.name):
                useless.append(path)
            elif _BLOCK.fullmatch(path.name):
                try:
                    with suppress(OSError):
                        found.append(_entry(path, self._identity))
                except DamagedFile:
                    useless.append(path)
        for path in useless:
            _unlink(path)
        if useless:
            log.info("removed %d unusable files from %s", len(useless), self.folder)
        return sorted(found, key=lambda entry: entry.used_at)

    def write(self, key: str, parent: str, start: int, tokens: array[int], state: State) -> None:
        """Queues the write of a block, which replaces an earlier file. `finished` returns the result later. The caller
        must not change `tokens` and `state` afterwards."""
        assert tokens.typecode == "i", "tokens are C ints"
        assert state.ndim == 1, "a state is one run of bytes"
        assert state.flags.c_contiguous, "a state is one run of bytes"
        assert _KEY.fullmatch(parent), f"{parent} is no key"
        self._submitted_bytes += state.nbytes
        self._change(key, state, partial(self._save, key, parent, start, tokens, state, time()))

    def read(self, key: str) -> Future[State | None]:
        """Queues the read of a block. The result is the block's state, read-only; None if the file is missing or
        damaged. A damaged file is removed.

        The future never has an exception. If it is cancelled before the read begins, nothing is read.
        """
        result: Future[State | None] = Future()
        change = self._changes.get(key)
        if change is None:
            self._submit(_READ, key, partial(self._read, key, result))
        else:
            result.set_result(change.state)
        return result

    def touch(self, key: str) -> None:
        """Queues an update of the file's time of last use. No effect if the file does not exist."""
        self._submit(_CHANGE, key, partial(_touch, self._path(key), time()))

    def remove(self, key: str) -> None:
        """Queues the removal of a block."""
        self._change(key, None, partial(_unlink, self._path(key)))

    def finished(self) -> list[Written]:
        """Returns the results of the writes that finished since the last call, in the order of the writes. Takes no
        lock."""
        written: list[Written] = []
        for _ in range(len(self._finished)):
            key, change, size = self._finished.popleft()
            if self._changes.get(key) is change:
                del self._changes[key]
            if change.state is not None:
                written.append(Written(key, size))
        return written

    @property
    def queued(self) -> int:
        """Bytes of the states that are queued for writing."""
        return self._submitted_bytes - self._done_bytes

    @property
    def paused(self) -> bool:
        """True for `WRITE_PAUSE_SECONDS` after a failed write. Writes are skipped during that time."""
        return monotonic() < self._writes_resume_at

    def close(self, seconds: float = 5.0) -> None:
        """Waits up to `seconds` for queued jobs. No method may be called afterwards.

        Jobs that have not begun by then are skipped: reads return None, writes write nothing.
        """
        self._deadline = monotonic() + seconds
        if self._thread is not None:
            self._jobs.put((_CLOSE, next(self._job_numbers), None))
            self._thread.join(seconds)

    def _change(self, key: str, state: State | None, job: Callable[[], int | None]) -> None:
        self._changes[key] = change = _Change(state)
        self._submit(_CHANGE, key, partial(self._run_change, key, change, job))

    def _submit(self, priority: int, key: str, job: Callable[[], object]) -> None:
        assert self._deadline == inf, "a closed disk takes no jobs"
        assert _KEY.fullmatch(key), f"{key} is no key"
        if self._thread is None:
            # A daemon thread, so that the process can end while a network drive hangs.
            self._thread = Thread(target=self._work, name="paceline-disk", daemon=True)
            self._thread.start()
        self._jobs.put((priority, next(self._job_numbers), job))

    # ── on the worker thread ──

    def _work(self) -> None:
        run_in_background()
        while (job := self._jobs.get()[2]) is not None:
            job()
            del job  # so that its state does not stay in memory until the next job

    def _run_change(self, key: str, change: _Change, job: Callable[[], int | None]) -> None:
        self._finished.append((key, change, job()))
        if change.state is not None:
            self._done_bytes += change.state.nbytes

    def _read(self, key: str, result: Future[State | None]) -> None:
        if result.set_running_or_notify_cancel():
            result.set_result(self._load(key))

    def _load(self, key: str) -> State | None:
        path = self._path(key)
        if monotonic() >= self._deadline:
            return None
        try:
            with path.open("rb") as file:
                return record.read_state(file, _head(file, path, self._identity))
        except FileNotFoundError:
            return None
        except Exception as error:
            # After any exception the block counts as missing, as the future must get a result.
            log.warning("removing %s, which cannot be read: %s", path, error)
            _unlink(path)
            return None

    def _save(self, key: str, parent: str, start: int, tokens: array[int], state: State, at: float) -> int | None:
        size = None
        if not self.paused and monotonic() < self._deadline:
            block = (key, parent), start, tokens, state
            try:
                try:
                    size = _save(self._path(key), at, self._identity, *block)
                except FileNotFoundError:
                    # Another process that opens the folder removes the temporary file as a leftover, but only once.
                    size = _save(self._path(key), at, self._identity, *block)
            except Exception as error:
                self._pause_writes(error)
            else:
                self._resume_writes()
        return size

    def _pause_writes(self, error: Exception) -> None:
        if self._writes_resume_at == -inf:
            log.warning("cannot write prefixes to %s: %s; next try in %.0f s", self.folder, error, WRITE_PAUSE_SECONDS)
        self._writes_resume_at = monotonic() + WRITE_PAUSE_SECONDS

    def _resume_writes(self) -> None:
        if self._writes_resume_at > -inf:
            log.info("prefixes are written to %s again", self.folder)
            self._writes_resume_at = -inf

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.block"


def _save(
    path: Path, at: float, identity: bytes, labels: tuple[str, str], start: int, tokens: array[int], state: State
) -> int:
    """Writes the file of a block, with `at` as its time of last use. Returns the size in bytes. On failure the earlier
    file stays and the temporary file is removed.

    The file is not flushed to the device: a cache need not survive a power failure, and checksums detect damaged files.
    """
    with AtomicFile(path, f"{path.stem}.", ".part") as new:
        record.write(new.file, identity, labels, start, tokens, state)
        new.file.flush()
        os.utime(new.file.fileno(), (at, at))
        return new.commit(durable=False)


def _head(file: BinaryIO, path: Path, identity: bytes) -> record.Head:
    """Returns the head of the only record in a block's file. Raises DamagedFile."""
    head = record.read_head(file, identity)
    if head.labels[0] != path.stem or file.tell() + head.state_bytes != os.fstat(file.fileno()).st_size:
        raise DamagedFile("it is torn or renamed")
    return head


def _entry(path: Path, identity: bytes) -> DiskEntry:
    with path.open("rb", buffering=0) as file:
        (key, parent), start, tokens, _, _ = _head(file, path, identity)
        stat = os.fstat(file.fileno())
    return DiskEntry(key, parent, start, tokens, stat.st_size, stat.st_mtime)


def _touch(path: Path, at: float) -> None:
    with suppress(OSError):
        os.utime(path, (at, at))


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
