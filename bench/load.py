"""Measures a running server over HTTP: closed loop (`--clients`) or open loop (`--rate` sessions a second).

The table has time to first token, gaps between outputs, finish times, tokens per second and goodput.
The client's CPU time is printed too, since on a small machine the server lacks that time. Tokens are
counted from `usage`. A prompt that does not fit into a slot of the server fails (400).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

import uvloop

from bench.client import Outcome, run_closed_loop, stream
from bench.figures import save, show, spread
from bench.workloads import PROMPT_TOKENS, WORKLOADS, HttpRequest, Session, workload

# Limits of a good request: milliseconds to its first token, and the mean of milliseconds between tokens.
GOOD_LIMITS_MS = (1000.0, 100.0)


async def send(port: int, request: HttpRequest) -> Outcome:
    """Sends one request. If the server sends no `usage`, `max_tokens` counts as the length of the answer."""
    outcome = await stream(port, request.path, request.body)
    if not outcome.failed and not outcome.completion_tokens:
        outcome.completion_tokens = request.body["max_tokens"]
    return outcome


async def send_session(port: int, session: Session) -> list[Outcome]:
    """Sends a session's requests, one after the other."""
    return [await send(port, request) for request in session]


async def closed_loop(port: int, clients: int, sessions: Sequence[Session]) -> list[Outcome]:
    """Sends all sessions from `clients` clients; a client begins the next unsent session when its session has ended."""
    played = await run_closed_loop(clients, sessions, partial(send_session, port))
    return [outcome for outcomes in played for outcome in outcomes]


async def open_loop(port: int, rate: float, sessions: Sequence[Session]) -> list[Outcome]:
    """Begins sessions as a Poisson process of `rate` per second, independently of the progress of earlier ones."""
    rng, tasks = random.Random(0), []
    async with asyncio.TaskGroup() as group:
        for session in sessions:
            tasks.append(group.create_task(send_session(port, session)))
            await asyncio.sleep(rng.expovariate(rate))
    return [outcome for task in tasks for outcome in task.result()]


def is_good(outcome: Outcome, limits: tuple[float, float]) -> bool:
    """True if a successful request meets both limits: milliseconds to the first token, and mean milliseconds per later
    token."""
    first, each = limits
    later = max(1, outcome.completion_tokens - 1)
    return outcome.ttft * 1000 <= first and sum(outcome.gaps) * 1000 / later <= each


def finish_times(outcomes: Sequence[Outcome]) -> list[float]:
    """Returns the seconds from the start of the first request to the end of each request, in the order given."""
    start = min((outcome.begun for outcome in outcomes), default=0.0)
    return [outcome.ended - start for outcome in outcomes]


def report(
    outcomes: Sequence[Outcome], seconds: float, cpu: float, limits: tuple[float, float] = GOOD_LIMITS_MS
) -> dict[str, Any]:
    """Returns the figures of one run of `seconds`, in which the client used `cpu` seconds of CPU time.

    `finish_s` are the seconds from the start of the first request to the end of each request.
    """
    good = [outcome for outcome in outcomes if not outcome.failed]
    tokens = sum(outcome.completion_tokens for outcome in good)
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in good),
        "cached_tokens": sum(outcome.cached_tokens for outcome in good),
        "completion_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "requests_per_second": round(len(good) / seconds, 3),
        "good_requests_per_second": round(sum(is_good(outcome, limits) for outcome in good) / seconds, 3),
        "ttft_ms": spread([outcome.ttft for outcome in good if outcome.arrivals]),
        "gap_ms": spread([gap for outcome in good for gap in outcome.gaps]),
        "finish_s": spread(finish_times(good), scale=1.0),
        "client_cpu_percent": round(100 * cpu / seconds, 2),
    }


def run_measured(
    requests: Coroutine[Any, Any, list[Outcome]], limits: tuple[float, float] = GOOD_LIMITS_MS
) -> tuple[dict[str, Any], list[Outcome]]:
    """Runs `requests` on a new event loop; returns the figures of the run, `seconds` included, and the outcomes."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        begun, cpu = time.perf_counter(), time.process_time()
        outcomes = runner.run(requests)
        seconds, spent = time.perf_counter() - begun, time.process_time() - cpu
    return {**report(outcomes, seconds, spent, limits), "seconds": seconds}, outcomes


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of `--sessions` sessions; one more session is sent first as warm-up."""
    warm, *sessions = workload(
        options.workload, 1 + options.sessions, options.tokens, prompt_tokens=options.prompt_tokens
    )
    run_measured(send_session(options.port, warm))
    if options.rate:
        requests = open_loop(options.port, options.rate, sessions)
    else:
        requests = closed_loop(options.port, options.clients, sessions)
    return run_measured(requests, options.good)[0]


def main() -> None:
    """Prints one table and writes `load.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000, help="port of the server on this machine")
    parser.add_argument("--workload", choices=WORKLOADS, default="chat", help="kind of requests")
    parser.add_argument("--clients", type=int, default=8, help="closed loop: concurrent clients")
    parser.add_argument("--rate", type=float, default=0.0, help="open loop: sessions a second; 0 is closed loop")
    parser.add_argument("--sessions", type=int, default=32, help="total sessions, 10000 at most")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, help="tokens of each prompt of context")
    parser.add_argument(
        "--good",
        type=float,
        nargs=2,
        default=GOOD_LIMITS_MS,
        metavar=("FIRST", "EACH"),
        help="limits of a good request: milliseconds to the first token, and mean milliseconds between tokens",
    )
    options = parser.parse_args()
    options.sessions = min(options.sessions, 10_000)
    figures = run(options)
    rows = [[name, *(value.values() if isinstance(value, dict) else [value])] for name, value in figures.items()]
    show(f"load, {options.workload}", ["", "p50 or value", "p90", "p99", "max"], rows)
    save("load", figures)


if __name__ == "__main__":
    main()
