"""The encoding thread: computes the embeddings of the runs that prefills need next, and caches them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from engine.adapters import is_uncached
from engine.background import run_in_background
from engine.media.values import Embeddings, MediaRun, Projector

log = logging.getLogger("paceline.engine")

# Niceness of the thread above that of the process. On busy cores it gets about a third of the time of a step's threads:
# steps take half as long again, and an image three times as long as alone.
_THREAD_NICENESS = 4
# Seconds that closing waits for the running encoding.
_CLOSE_SECONDS = 5.0


class WantedRun(NamedTuple):
    """A run that a prefill needs, and the namespace within which its embeddings are shared."""

    namespace: str
    run: MediaRun

    @property
    def cache_key(self) -> tuple[str, bytes]:
        """The key of the embeddings in the cache."""
        return self.namespace, self.run.key


class MediaEncoder:
    """The encoding thread, used by the engine thread.

    Embeddings are cached in up to `capacity` bytes, the least recently used ones are dropped first. Those that are
    wanted stay. A failed encoding is an exception in place of the embeddings. It is dropped once it is not wanted, and
    so are the embeddings of requests without cache.
    """

    def __init__(self, projector: Projector, capacity: int) -> None:
        """Takes the ownership of `projector`."""
        self.projector = projector
        self._capacity = capacity
        self._changed = threading.Condition()  # guards all of the following
        self._wanted: Sequence[WantedRun] = ()
        self._results: dict[tuple[str, bytes], Embeddings | Exception] = {}  # the least recently used first
        self._bytes = 0
        # True if there are results to drop once they are not wanted: errors, and embeddings of uncached requests.
        self._has_passing = False
        self._closing = False
        self.encoded = 0
        """Number of runs encoded so far."""
        self._thread = threading.Thread(target=self._serve, name="paceline-media", daemon=True)
        self._thread.start()

    def want(self, wanted: Sequence[WantedRun]) -> None:
        """Sets the runs that are encoded next, in this order, in place of the ones before."""
        with self._changed:
            self._wanted = wanted
            self._trim()
            if self._next() is not None:
                self._changed.notify_all()

    def result(self, wanted: WantedRun) -> Embeddings | Exception | None:
        """Returns the embeddings of a run, or the error of its encoding. None while it is not encoded."""
        with self._changed:
            if (found := self._results.pop(wanted.cache_key, None)) is not None:
                self._results[wanted.cache_key] = found
            return found

    def wait(self, seconds: float) -> None:
        """Blocks until a wanted run is encoded, for at most `seconds`. No effect if all are encoded."""
        with self._changed:
            if self._next() is not None:
                self._changed.wait(seconds)

    def close(self) -> None:
        """Ends the thread and closes the projector, unless the running encoding does not end in time."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():
            self.projector.close()

    def _next(self) -> WantedRun | None:
        return next((each for each in self._wanted if each.cache_key not in self._results), None)

    def _trim(self) -> None:
        """Drops what exceeds the capacity, and passing results, those that are no longer wanted."""
        if self._bytes <= self._capacity and not self._has_passing:
            return
        needed, self._has_passing = {each.cache_key for each in self._wanted}, False
        for key, result in [*self._results.items()]:
            passing = isinstance(result, Exception) or is_uncached(key[0])
            if key in needed or not (passing or self._bytes > self._capacity):
                self._has_passing |= passing
                continue
            del self._results[key]
            self._bytes -= 0 if isinstance(result, Exception) else result.nbytes

    def _serve(self) -> None:
        run_in_background(_THREAD_NICENESS)
        while True:
            with self._changed:
                while not self._closing and (wanted := self._next()) is None:
                    self._changed.wait()
                if self._closing:
                    return
            assert wanted is not None
            result = self._encode(wanted.run)
            with self._changed:
                self._results[wanted.cache_key] = result
                self._has_passing |= isinstance(result, Exception) or is_uncached(wanted.namespace)
                self._bytes += 0 if isinstance(result, Exception) else result.nbytes
                self._trim()
                self._changed.notify_all()

    def _encode(self, run: MediaRun) -> Embeddings | Exception:
        begun = time.perf_counter()
        try:
            embeddings = self.projector.encode(run.chunk)
        except Exception as error:  # the other requests go on
            log.exception("an image or sound cannot be encoded")
            return error
        self.encoded += 1
        log.debug("encoded %d embeddings in %.0f ms", len(embeddings), 1e3 * (time.perf_counter() - begun))
        return embeddings
