"""Steps that do not end: the watchdog, and closing an engine whose thread hangs."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from engine import Engine, EngineConfig, EngineStalled, Request, ShutDown, hanging_threads
from engine.stats import Counters
from engine.watchdog import STALLED_STEPS, Watchdog, WorkClock
from tests.engine.test_engine import toy_backend
from tests.toy import opener


def counters(steps: int = 0, seconds: float = 0.0) -> Counters:
    counts = Counters(100, tuple, lambda rows, cells: 0.0)
    counts.steps, counts.busy_seconds = steps, seconds
    return counts


def stalled(watchdog: Watchdog, *seconds: float) -> list[bool]:
    """Returns, for each check after so many seconds, whether the work has stalled."""
    found = []
    for each in seconds:
        watchdog.check(each)
        found.append(watchdog.stall is not None)
    return found


def test_work_that_does_not_end_is_a_stall_until_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    clock = WorkClock()
    watchdog = Watchdog(clock, 3.0, counters())
    assert stalled(watchdog, 9.0, 9.0) == [False, False], "idle"
    clock.begin()
    assert stalled(watchdog, 9.0, 2.0, 1.0, 1.0) == [False, False, True, True], "the first check only finds new work"
    assert str(watchdog.stall).startswith("The engine has not finished a step for 4 s")
    assert caplog.text.count("has not finished a step") == 1
    assert "test_work_that_does_not_end" in caplog.text, "the stacks are in the log"
    clock.begin()
    assert stalled(watchdog, 1.0, 2.0) == [False, False], "the next work"
    clock.end()
    assert stalled(watchdog, 9.0) == [False]
    assert "has finished the step" in caplog.text


def test_slow_steps_are_no_stall() -> None:
    clock = WorkClock()
    watchdog = Watchdog(clock, 1.0, counters(steps=4, seconds=8.0))
    clock.begin()
    assert stalled(watchdog, 0.0, 2.0 * STALLED_STEPS - 1, 1.0) == [False, False, True]


async def test_an_engine_whose_thread_hangs_fails_its_requests_and_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.watchdog.HANG_SECONDS", 0.05)
    backend, blocked, go_on = toy_backend(), threading.Event(), threading.Event()

    def block() -> None:
        blocked.set()
        go_on.wait()

    config = EngineConfig.of(path="toy.gguf", slots=2)
    engine: Any
    async with Engine.open(config, opener=opener(backend)) as engine:
        backend.context.before_decode = block
        async with engine.generate(Request(prompt=(1, 2))) as generation:
            await asyncio.to_thread(blocked.wait)
            assert stalled(engine._core._watchdog, 0.0, 1000.0) == [False, True]
            assert isinstance(engine.stall, EngineStalled)
            await engine.drain(60.0)
            with pytest.raises(ShutDown):
                await anext(generation)
    assert hanging_threads() == ["paceline-engine"]
    assert not backend.closed
    go_on.set()
    await asyncio.to_thread(engine._core._thread._thread.join)
    assert backend.closed
