"""Time limits of requests: the errors of requests that exceed them, and the times at which requests are checked."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from engine.contract import EngineError
from engine.sequence import Sequence

# Times of ended requests are dropped at each multiple of this many times, from more than twice as many on.
_MAX_STALE = 1024
_MAX_RETRY_SECONDS = 60.0


class QueueTimeout(EngineError):
    """The request was queued for longer than the server allows: 503. `retry_after` is in seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"The request was queued for more than {seconds:g} s without a free slot (--queue-timeout). Retry later."
        )
        self.retry_after = min(seconds, _MAX_RETRY_SECONDS)


class DeadlineExceeded(EngineError):
    """The request's own time limit passed before its first token: 408."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request had no token within its timeout_ms of {seconds * 1e3:.0f} ms.")


class TimeLimits:
    """The times at which waiting and running sequences exceed a limit. Belongs to the engine thread."""

    def __init__(self, queue_timeout: float) -> None:
        """`queue_timeout` is the maximum number of seconds before the start of a request; 0 is no maximum."""
        self._queue_timeout = queue_timeout
        self._times: list[tuple[float, int]] = []  # a heap of times and keys

    def add(self, sequence: Sequence, is_open: Callable[[int], bool]) -> None:
        """Adds the limits of a new sequence. `is_open` returns True for the keys of requests that have not ended."""
        if self._queue_timeout:
            heapq.heappush(self._times, (sequence.submitted + self._queue_timeout, sequence.key))
        if sequence.request.timeout is not None:
            heapq.heappush(self._times, (sequence.due, sequence.key))
        if len(self._times) > 2 * _MAX_STALE and len(self._times) % _MAX_STALE == 0:
            self._times = [item for item in self._times if is_open(item[1])]
            heapq.heapify(self._times)

    def reached(self, now: float) -> Iterator[int]:
        """Yields the keys of requests with a time up to `now`, and drops these times."""
        while self._times and self._times[0][0] <= now:
            yield heapq.heappop(self._times)[1]

    def error(self, sequence: Sequence, now: float) -> EngineError | None:
        """Returns the error of a sequence that exceeds a limit before its first token; None for all others."""
        if sequence.first_token is not None:
            return None
        if sequence.request.timeout is not None and sequence.due <= now:
            return DeadlineExceeded(sequence.request.timeout)
        if self._queue_timeout and sequence.admitted is None and now - sequence.submitted >= self._queue_timeout:
            return QueueTimeout(self._queue_timeout)
        return None
