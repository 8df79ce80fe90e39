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

# Niceness of the thread above that of the process. On busy cores the thread gets about a third of the time of a step's
# threads: a step takes 1.5 times as long as alone, and an image three times.
_THREAD_NICENESS = 4
# Maximum seconds that `close` blocks for the running encoding.
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
    """The encoding thread and its cache. The methods belong to the engine thread.

    The cache has up to `capacity` bytes of embeddings. Above that, the least recently used embeddings are dropped,
    except those of wanted runs. The result of a failed encoding is an exception. Exceptions, and the embeddings of
    requests without cache, are dropped once their runs are not wanted.
    """

    def __init__(self, projector: Projector, capacity: int) -> None:
        """Takes the ownership of `projector`."""
        self.projector = projector
        self._capacity = capacity
        # Guards the attributes below.
        self._changed = threading.Condition()
        self._wanted: Sequence[WantedRun] = ()
        self._results: dict[tuple[str, bytes], Embeddings | Exception] = {}  # the least recently used first
        self._cached_bytes = 0
        # True if there are results to drop once their runs are not wanted: errors, and embeddings of uncached requests.
        self._has_transient = False
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="paceline-media", daemon=True)
        self._thread.start()

    def want(self, wanted: Sequence[WantedRun]) -> None:
        """Replaces the list of the runs to encode next, in this order."""
        with self._changed:
            self._wanted = wanted
            self._trim()
            if self._next() is not None:
                self._changed.notify_all()

    def result(self, wanted: WantedRun) -> Embeddings | Exception | None:
        """Returns the embeddings of a run, or the error of its encoding. None before the end of the encoding."""
        with self._changed:
            if (found := self._results.pop(wanted.cache_key, None)) is not None:
                self._results[wanted.cache_key] = found
            return found

    def wait(self, seconds: float) -> None:
        """Blocks until a wanted run is encoded, for at most `seconds`. No effect if all wanted runs are encoded."""
        with self._changed:
            if self._next() is not None:
                self._changed.wait(seconds)

    def close(self) -> None:
        """Ends the thread, and closes the projector if the running encoding ends within `_CLOSE_SECONDS`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():
            self.projector.close()

    def _next(self) -> WantedRun | None:
        """Returns the first wanted run without a result."""
        return next((each for each in self._wanted if each.cache_key not in self._results), None)

    def _trim(self) -> None:
        """Drops transient results, and the least recently used ones above the capacity. Keeps those of wanted runs."""
        if self._cached_bytes <= self._capacity and not self._has_transient:
            return
        wanted_keys, self._has_transient = {each.cache_key for each in self._wanted}, False
        for key, result in [*self._results.items()]:
            transient = isinstance(result, Exception) or is_uncached(key[0])
            if key in wanted_keys or not (transient or self._cached_bytes > self._capacity):
                self._has_transient |= transient
                continue
            del self._results[key]
            self._cached_bytes -= 0 if isinstance(result, Exception) else result.nbytes

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
                self._has_transient |= isinstance(result, Exception) or is_uncached(wanted.namespace)
                self._cached_bytes += 0 if isinstance(result, Exception) else result.nbytes
                self._trim()
                self._changed.notify_all()

    def _encode(self, run: MediaRun) -> Embeddings | Exception:
        begun = time.perf_counter()
        try:
            embeddings = self.projector.encode(run.chunk)
        except Exception as error:
            # The request of the run fails; the thread continues.
            log.exception("an image or sound cannot be encoded")
            return error
        log.debug("encoded %d embeddings in %.0f ms", len(embeddings), 1e3 * (time.perf_counter() - begun))
        return embeddings
