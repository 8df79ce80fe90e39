"""Measures the cost of viewers of the live view: tokens per second of 8 streams with five viewers, and without.

    python -m bench.viewers                     # a simulated model, about 2 minutes
    python -m bench.viewers -m model.gguf

Each round has a run with viewers and one without, in an order that alternates from round to round. All runs are on one
server, with new prompts. Viewers read `GET /v1/paceline/events` on connections of their own. The table has the tokens
per second of each run and the ratio of the medians, and the CPU time of the idle server in percent of a core.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from bench.client import Outcome
from bench.figures import save, show
from bench.limits import command
from bench.load import closed_loop, run_measured
from bench.server import HOST, Server, free_port, running, serving
from bench.workloads import story

STREAMS = 8
VIEWERS = 5
IDLE_SECONDS = 10.0
EVENTS_REQUEST = f"GET /v1/paceline/events HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()


@asynccontextmanager
async def viewing(port: int, viewers: int) -> AsyncIterator[None]:
    """Connects `viewers` viewers for the length of the block. Raises RuntimeError if one of them ended before."""
    tasks = [asyncio.create_task(view(port)) for _ in range(viewers)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        if any(not isinstance(result, asyncio.CancelledError) for result in results):
            raise RuntimeError(f"a viewer ended: {results}")


async def view(port: int) -> None:
    """Reads the events of the live view until it is cancelled. Raises RuntimeError if the server ends the stream."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(EVENTS_REQUEST)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise RuntimeError(head.decode())
        while await reader.read(2**16):
            pass
        raise RuntimeError("the server ended the stream")
    finally:
        writer.close()


async def watched_load(port: int, viewers: int, numbers: Sequence[int], tokens: int) -> list[Outcome]:
    """Returns the outcomes of one request for each of `numbers`, sent on `STREAMS` connections beside the viewers."""
    async with viewing(port, viewers):
        return await closed_loop(port, STREAMS, [[story(number, tokens)] for number in numbers])


async def idle_cpu_percent(server: Server, viewers: int) -> float:
    """Returns the CPU time of the server without requests, in percent of a core."""
    async with viewing(server.port, viewers):
        await asyncio.sleep(1)
        before = server.cpu_seconds()
        await asyncio.sleep(IDLE_SECONDS)
        return 100 * (server.cpu_seconds() - before) / IDLE_SECONDS


def run(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one server. Raises RuntimeError if a request fails."""
    numbers = count()
    rates: dict[int, list[float]] = {0: [], VIEWERS: []}

    def measure(viewers: int, requests: int) -> float:
        chosen = [next(numbers) for _ in range(requests)]
        figures, outcomes = run_measured(watched_load(server.port, viewers, chosen, options.tokens))
        if failed := [outcome.error for outcome in outcomes if outcome.failed]:
            raise RuntimeError(failed[0])
        return float(figures["tokens_per_second"])

    # Not counted, as the first steps are slow.
    measure(0, STREAMS)
    for number in range(options.rounds):
        for viewers in (0, VIEWERS) if number % 2 == 0 else (VIEWERS, 0):
            rates[viewers].append(measure(viewers, options.requests))
    without, with_viewers = rates[0], rates[VIEWERS]
    return {
        "tokens_per_second_without": without,
        "tokens_per_second_with": with_viewers,
        "ratio": median(with_viewers) / median(without),
        "round_ratios": [one / other for one, other in zip(with_viewers, without, strict=True)],
        "idle_cpu_percent_without": asyncio.run(idle_cpu_percent(server, 0)),
        "idle_cpu_percent_with": asyncio.run(idle_cpu_percent(server, VIEWERS)),
    }


def main() -> None:
    """Prints one table and writes `viewers.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, help="GGUF; without it the model is simulated")
    parser.add_argument("--rounds", type=int, default=6, help="runs with viewers, and as many without")
    parser.add_argument("--requests", type=int, default=16, help="requests of each run")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--cost", default="flat", help="--sim-cost of the simulated model")
    parser.add_argument("--name", default="viewers", help="name of the result file")
    options = parser.parse_args()
    if options.model:
        with serving(options.model, ["-np", str(STREAMS), "-c", str(1024 * STREAMS)]) as server:
            figures = run(server, options)
    else:
        port = free_port()
        with running(command(port, STREAMS, options.cost, 0.7, []), port, 60) as server:
            figures = run(server, options)
    rows = [[name, *(value if isinstance(value, list) else [value])] for name, value in figures.items()]
    runs = [f"round {number + 1}" for number in range(options.rounds)]
    show(f"{STREAMS} streams with {VIEWERS} viewers, and without", ["", *runs], rows)
    save(options.name, figures)


if __name__ == "__main__":
    main()
