"""The SHA-256 digest of all bytes of a model's files, computed in the background.

Saved states are used only with weights of the same digest. The cache folder keeps the digest of each file, with the
file's inode, size and times, so that a file is hashed once and not at every start.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from engine.background import run_in_background
from engine.checksummed import AtomicFile
from engine.config.machine import cache_folder
from engine.contract import EngineFault

log = logging.getLogger("paceline.memory")

# Bytes that are read at once, and niceness of the thread above that of the process.
READ_BYTES = 2**22
HASH_NICENESS = 10
# Version of the cached files.
_FORMAT = 1

_SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class ContentDigest:
    """The digest of the GGUF at a path, or of all parts of a split GGUF. Any thread may use it."""

    def __init__(self, path: Path) -> None:
        self._files = [file for file in model_files(path) if file.is_file()]
        self._future: Future[str] = Future()
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def future(self) -> Future[str]:
        """Returns the future digest. The first call starts the computation. The digest is empty if no file exists, as
        for a simulated model. A failure is an EngineFault."""
        with self._lock:
            if not self._future.running() and not self._future.done():
                self._future.set_running_or_notify_cancel()
                threading.Thread(target=self._run, name="paceline-digest", daemon=True).start()
        return self._future

    def close(self) -> None:
        """Ends a running computation with an EngineFault."""
        self._closing.set()

    def _run(self) -> None:
        run_in_background(HASH_NICENESS)
        try:
            digests = [self._digest(file) for file in self._files]
        except OSError as error:
            self._future.set_exception(EngineFault(f"the model's file cannot be read: {error.strerror}"))
        except EngineFault as fault:
            self._future.set_exception(fault)
        else:
            self._future.set_result(_combine(digests))

    def _digest(self, path: Path) -> str:
        """Returns the digest of one file. Raises OSError, and EngineFault after `close`."""
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            cached = _cache_path(before)
            if (digest := _read(cached)) is not None:
                return digest
            begun, hashed, buffer = time.perf_counter(), hashlib.sha256(), memoryview(bytearray(READ_BYTES))
            while size := file.readinto(buffer):
                if self._closing.is_set():
                    raise EngineFault("the engine is shutting down")
                hashed.update(buffer[:size])
            log.info("hashed %s in %.1f s", path, time.perf_counter() - begun)
            if _cache_path(os.fstat(file.fileno())) == cached:
                _write(cached, hashed.hexdigest())
        return hashed.hexdigest()


def _combine(digests: Sequence[str]) -> str:
    """Returns one digest for the digests of all parts; empty for no parts."""
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if len(digests) > 1 else "".join(digests)


def model_files(path: Path) -> list[Path]:
    """Returns the files of the GGUF at `path`: `path` itself, or all parts of a split GGUF."""
    if not (found := _SPLIT.fullmatch(path.name)):
        return [path]
    return [path.with_name(f"{found[1]}-{number:05}-of-{found[2]}.gguf") for number in range(1, int(found[2]) + 1)]


def _cache_path(stat: os.stat_result) -> Path:
    # st_ctime_ns differs even after a program has restored the modification time of changed content.
    file = f"{_FORMAT} {stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    return cache_folder() / f"content-{hashlib.sha256(file.encode()).hexdigest()[:24]}.txt"


def _read(path: Path) -> str | None:
    """Returns a cached digest; None if there is no valid one."""
    try:
        text = path.read_text("ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return text if _DIGEST.fullmatch(text) else None


def _write(path: Path, digest: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with AtomicFile(path, f"{path.stem}.", ".part") as new:
            new.file.write(digest.encode())
            new.commit(durable=False)
    except OSError as error:
        log.warning("cannot save the digest of the model: %s", error)
