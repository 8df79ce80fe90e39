"""Public routers in front of simulated workers: prefix affinity, a killed worker, a drained worker, overhead.

- Affinity: the share of later turns of conversations that find nine tenths of the turn before in a worker's cache.
- Kill: one worker gets SIGKILL under load. A request is lost if it fails before its first token; a stream that had
  begun is `broken` and ends with an error event, or with the connection alone (`cut`).
- Drain: one worker gets SIGTERM under load, and no request may fail.
- Overhead: tokens per second and median time to first token, of many clients and of one, with the router and with
  clients that take turns between the workers.

`make test-scale` installs the routers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import uvloop
from msgspec import Struct, structs

from bench.client import Outcome, chat, run_closed_loop, stream, user
from bench.figures import save, show
from bench.fleet import MODEL_NAME, PUBLIC_ROUTERS, Fleet, fleet_workers, routed
from bench.workloads import CHAT_PATH, random_text

CONVERSATIONS, TURNS, CLIENTS = 80, 3, 16
# Tokens of each message of a user and of each answer.
MESSAGE_TOKENS, ANSWER_TOKENS = 120, 40
# A turn has found its prefix if so much of the prompt of the turn before is cached.
FOUND_SHARE = 0.9
LOAD_REQUESTS, LOAD_CLIENTS, LOAD_TOKENS = 144, 48, 60
# Requests one after the other, for the time to first token.
LONE_REQUESTS = 40
# Share of the requests of a load that have been sent when the signal is sent.
SIGNAL_AFTER = 0.5
WORKER_FLAGS = ("--sim", "--sim-cost", "flat", "-np", "32", "-c", "131072", "--spec-type", "none")


class LoadResult(Struct, frozen=True):
    """The outcomes of a load during which a worker ends."""

    complete: int
    lost: int
    """Requests that failed before their first token."""
    broken: int
    """Streams that ended with an error event."""
    cut: int
    """Streams that ended without one."""


class Speed(Struct, frozen=True):
    """Throughput and median time to first token of a load, and the latter for requests one after the other."""

    tokens_per_second: float
    ttft_ms: float
    lone_ttft_ms: float


class RouterFigures(Struct, frozen=True):
    """The figures of one router that do not depend on the speed of the machine."""

    affinity: float
    kill: LoadResult
    drain: LoadResult


class RouterOverhead(Struct, frozen=True):
    """The speed of two workers, `routed` by a router, and `direct` with clients that take turns between the workers."""

    direct: Speed
    routed: Speed


async def _send(port: int, messages: list[dict[str, str]], tokens: int, number: int) -> Outcome:
    # LiteLLM and Ray keep sessions by these ids; the other routers look at the text.
    session = f"conversation-{number}"
    body = chat(messages, tokens, seed=number, model=MODEL_NAME, metadata={"session_id": session})
    return await stream(port, CHAT_PATH, body, headers={"x-session-id": session})


async def affinity(port: int, conversations: int = CONVERSATIONS) -> float:
    """Returns the share of the later turns of conversations that find their prefix cached."""
    found: list[bool] = []

    async def converse(number: int) -> None:
        messages: list[dict[str, str]] = []
        before = 0
        for turn in range(TURNS):
            messages += user(random_text(TURNS * number + turn, MESSAGE_TOKENS))
            outcome = await _send(port, messages, ANSWER_TOKENS, number)
            assert not outcome.failed, outcome.error
            messages.append({"role": "assistant", "content": outcome.text})
            if turn:
                found.append(outcome.cached_tokens >= FOUND_SHARE * before)
            before = outcome.prompt_tokens

    await run_closed_loop(CLIENTS, range(conversations), converse)
    return sum(found) / len(found)


async def load(ports: Sequence[int], on_half: Callable[[], None] = lambda: None) -> list[Outcome]:
    """Sends the requests of a load to `ports` in turn, and calls `on_half` while half of them run or have ended."""
    turns = cycle(ports)

    async def send(number: int) -> Outcome:
        if number == int(SIGNAL_AFTER * LOAD_REQUESTS):
            asyncio.get_running_loop().call_later(0.3, on_half)
        try:
            return await _send(next(turns), user(random_text(7 * number, MESSAGE_TOKENS)), LOAD_TOKENS, number)
        except OSError as error:
            return Outcome(0.0, error=str(error))

    return await run_closed_loop(LOAD_CLIENTS, range(LOAD_REQUESTS), send)


def load_result(outcomes: Sequence[Outcome]) -> LoadResult:
    """Returns the outcomes by kind."""
    failed = [each for each in outcomes if not _is_complete(each)]
    begun = [each for each in failed if each.arrivals]
    broken = sum(each.error.startswith("{") for each in begun)
    return LoadResult(len(outcomes) - len(failed), len(failed) - len(begun), broken, len(begun) - broken)


def _is_complete(outcome: Outcome) -> bool:
    ends = (outcome.finish_reasons, outcome.done_markers, outcome.completion_tokens)
    return not outcome.failed and ends == (1, 1, LOAD_TOKENS)


async def speed(ports: Sequence[int]) -> Speed:
    """Returns the speed of requests to `ports` in turn."""
    outcomes = await load(ports)
    seconds = max(each.ended for each in outcomes) - min(each.begun for each in outcomes)
    tokens = sum(each.completion_tokens for each in outcomes)
    turns = cycle(ports)
    lone = [await _send(next(turns), user(random_text(number, 10)), 2, number) for number in range(LONE_REQUESTS)]
    ttft_ms, lone_ttft_ms = (1e3 * median(each.ttft for each in some) for some in (outcomes, lone))
    return Speed(tokens / seconds, ttft_ms, lone_ttft_ms)


def ending(fleet: Fleet, number: signal.Signals) -> LoadResult:
    """Returns the result of a load during which the last worker of `fleet` gets the signal `number`."""
    pid = fleet.workers[-1].pid
    return load_result(asyncio.run(load([fleet.port], lambda: os.kill(pid, number))))


def measure(name: str, folder: Path) -> RouterFigures:
    """Measures a router with two workers of its own for each part; `folder` gets the router's logs."""
    with fleet_workers(2, *WORKER_FLAGS) as workers, routed(name, workers, folder / f"{name}.log") as fleet:
        share = asyncio.run(affinity(fleet.port))
        drain = ending(fleet, signal.SIGTERM)
    with fleet_workers(2, *WORKER_FLAGS) as workers, routed(name, workers, folder / f"{name}-kill.log") as fleet:
        kill = ending(fleet, signal.SIGKILL)
    return RouterFigures(share, kill, drain)


def overhead(name: str, folder: Path) -> RouterOverhead:
    """Measures two workers without and with a router; `folder` gets the router's log."""
    with fleet_workers(2, *WORKER_FLAGS) as workers:
        direct = asyncio.run(speed([worker.port for worker in workers]))
        with routed(name, workers, folder / f"{name}-speed.log") as fleet:
            return RouterOverhead(direct, asyncio.run(speed([fleet.port])))


_COLUMNS = (
    "router",
    "affinity",
    "kill: complete / error event / cut / lost",
    "drain: complete / failed",
)
_OVERHEAD_COLUMNS = (
    "router",
    "tok/s with / without router",
    "TTFT ms with / without",
    "the same, one client",
)


def _row(name: str, figures: RouterFigures) -> list[Any]:
    kill, drain = figures.kill, figures.drain
    return [
        name,
        f"{figures.affinity:.1%}",
        f"{kill.complete} / {kill.broken} / {kill.cut} / {kill.lost}",
        f"{drain.complete} / {drain.broken + drain.cut + drain.lost}",
    ]


def _overhead_row(name: str, figures: RouterOverhead) -> list[Any]:
    return [
        name,
        f"{figures.routed.tokens_per_second:.0f} / {figures.direct.tokens_per_second:.0f}",
        f"{figures.routed.ttft_ms:.0f} / {figures.direct.ttft_ms:.0f}",
        f"{figures.routed.lone_ttft_ms:.1f} / {figures.direct.lone_ttft_ms:.1f}",
    ]


def show_routers(figures: Mapping[str, RouterFigures]) -> None:
    """Prints a table of the figures by router."""
    show("Routers in front of two simulated workers", _COLUMNS, [_row(*item) for item in figures.items()])


def show_overhead(figures: Mapping[str, RouterOverhead]) -> None:
    """Prints a table of the overhead by router."""
    show("Speed of two simulated workers", _OVERHEAD_COLUMNS, [_overhead_row(*item) for item in figures.items()])


def main() -> int:
    """Measures the routers and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PUBLIC_ROUTERS, default=list(PUBLIC_ROUTERS))
    names = parser.parse_args().only
    with TemporaryDirectory() as folder:
        figures = {name: measure(name, Path(folder)) for name in names}
        overheads = {name: overhead(name, Path(folder)) for name in names}
    show_routers(figures)
    show_overhead(overheads)
    save("routers", {name: structs.asdict(figures[name]) | structs.asdict(overheads[name]) for name in names})
    return 0


if __name__ == "__main__":
    uvloop.install()
    sys.exit(main())
