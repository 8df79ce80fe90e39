"""GET /v1/paceline/events: a snapshot of the server each second, as server-sent events."""

from __future__ import annotations

import asyncio
import math
import time

from starlette.requests import Request
from starlette.responses import Response

from api.generation.loaded_model import AppState
from api.http.events import sse_event
from api.http.responses import EventStream, EventStreamResponse
from api.ui.snapshot import Sample, live_snapshot

EVENTS_PATH = "/v1/paceline/events"

# Rates are not computed from an older sample, as no sample was taken in between.
_MAX_SAMPLE_AGE_SECONDS = 5.0


class LiveEventsEndpoint:
    """The endpoint of the live view. All viewers get the same event, which the first of them computes in each
    interval; without viewers nothing is computed."""

    def __init__(self, state: AppState, interval_seconds: float = 1.0) -> None:
        self._state = state
        self._interval_seconds = interval_seconds
        self._lock = asyncio.Lock()
        self._interval = -1  # number of the interval of `_event`
        self._event = b""
        self._sample: Sample | None = None

    async def stream(self, request: Request) -> Response:
        """Streams snapshots until the client disconnects or the server shuts down. Raises ModelLoading, Draining or
        EngineFault."""
        _ = self._state.model
        return EventStreamResponse(self._follow, self._state.config.sse_ping)

    async def _follow(self, stream: EventStream) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            interval = math.floor(clock() / self._interval_seconds)
            await stream.send(await self._event_of(interval))
            await asyncio.sleep(max(0.0, (interval + 1) * self._interval_seconds - clock()))

    async def _event_of(self, interval: int) -> bytes:
        """Returns the event of an interval or of a later one."""
        async with self._lock:
            if self._interval < interval:
                self._event = await self._next_event()
                self._interval = interval
            return self._event

    async def _next_event(self) -> bytes:
        model = self._state.model
        engine = model.engine
        slots = await engine.slot_states() if self._state.config.slots_endpoint else ()
        now = Sample(time.monotonic(), engine.stats(), slots)
        before, self._sample = self._sample, now
        if before is not None and now.seconds - before.seconds > _MAX_SAMPLE_AGE_SECONDS:
            before = None
        return sse_event(live_snapshot(time.time(), model.name, engine.request_limit, engine.memory, before, now))
