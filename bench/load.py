"""Load over HTTP against a running server: closed loop (so many clients) or open loop (so many requests a second).

Prints time to first text, gaps between texts and tokens per second, and writes `load.json`. The client's own share
of the CPU is printed too: on a small machine it is taken from the server.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from functools import partial
from typing import Any

import uvloop

from bench.client import Outcome, chat, closed, stream, user
from bench.figures import save, show, spread

TOPICS = ("the sea", "a clock", "the desert", "an orchestra", "a lighthouse", "snow", "a library", "bees")


def body(number: int, tokens: int, words: int) -> dict[str, Any]:
    """The request of this number: the same for the same number, unlike its neighbours."""
    rng = random.Random(number)
    topic = TOPICS[number % len(TOPICS)]
    filler = " ".join(rng.choice(TOPICS) for _ in range(words // 2))
    return chat(user(f"Story {number}: write about {topic}. {filler}"), tokens, seed=number)


async def open_loop(port: int, rate: float, requests: int, tokens: int, words: int) -> list[Outcome]:
    """Requests that arrive as a Poisson process of `rate` a second, whatever became of the others."""
    rng, tasks = random.Random(0), []
    async with asyncio.TaskGroup() as group:
        for n in range(requests):
            tasks.append(group.create_task(stream(port, "/v1/chat/completions", body(n, tokens, words))))
            await asyncio.sleep(rng.expovariate(rate))
    return [task.result() for task in tasks]


def report(outcomes: list[Outcome], seconds: float, cpu: float) -> dict[str, Any]:
    """The figures of one run."""
    good = [outcome for outcome in outcomes if not outcome.failed]
    tokens = sum(outcome.completion_tokens for outcome in good)
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "completion_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "ttft_ms": spread([outcome.ttft for outcome in good]),
        "gap_ms": spread([gap for outcome in good for gap in outcome.gaps]),
        "client_cpu_percent": round(100 * cpu / seconds, 2),
    }


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Warms the server up with one request, then measures."""
    await stream(options.port, "/v1/chat/completions", body(10**6, 4, options.words))
    begun, cpu = time.perf_counter(), time.process_time()
    if options.rate:
        outcomes = await open_loop(options.port, options.rate, options.requests, options.tokens, options.words)
    else:
        bodies = (body(n, options.tokens, options.words) for n in range(options.requests))
        outcomes = await closed(options.clients, bodies, partial(stream, options.port, "/v1/chat/completions"))
    return report(outcomes, time.perf_counter() - begun, time.process_time() - cpu)


def main() -> None:
    """Prints one table and writes `load.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="port of the server on this machine")
    parser.add_argument("--clients", type=int, default=8, help="closed loop: clients at once")
    parser.add_argument("--rate", type=float, default=0.0, help="open loop: requests a second; 0 is closed loop")
    parser.add_argument("--requests", type=int, default=32, help="requests in all, 10000 at most")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--words", type=int, default=20, help="length of each prompt, in words")
    options = parser.parse_args()
    options.requests = min(options.requests, 10_000)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(run(options))
    rows = [[name, *(value.values() if isinstance(value, dict) else [value])] for name, value in figures.items()]
    show("load", ["", "p50 or value", "p90", "p99", "max"], rows)
    save("load", figures)


if __name__ == "__main__":
    main()
