"""Measures the limit of Python: the whole server on a model that computes nothing, with as many clients as slots.

The table has, for each number of slots, the tokens per second through SSE, CPU microseconds per token, and the
fractions of time that the engine thread and the event loop are on a core. With a model that takes no time the engine
thread is never idle: while it is neither on a core nor in a run queue, it is blocked on the GIL. The client is another
process on the same cores. With --parts a second run of each server measures the CPU microseconds of a token by part
(`bench.parts`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.figures import save, show
from bench.load import closed_loop, run_measured
from bench.server import QUEUED, Server, free_port, running
from bench.workloads import story


def command(
    port: int, slots: int, cost: str, accept: float, more: list[str], module: tuple[str, ...] = ("api",)
) -> list[str]:
    """Returns the command of a server on the model that computes nothing. `module` is the module that runs
    the command line, with arguments of its own."""
    sim = ["--sim", "--sim-cost", cost, "--sim-accept", str(accept)]
    size = ["-np", str(slots), "-c", str(slots * 1024), "--queue", "1000"]
    return [sys.executable, "-m", *module, "serve", *sim, *size, "--port", str(port), *more]


def engine_thread(server: Server) -> int:
    """Returns the id of the thread with most CPU time except the main thread, which runs the event loop."""
    spent = server.thread_seconds()
    return max((task for task in spent if task != server.pid), key=spent.__getitem__)


def client(port: int, clients: int, count: int, tokens: int, words: int) -> dict[str, Any]:
    """Returns the figures of `count` requests from `clients` clients, with the number of events."""
    sessions = [[story(number, tokens, words)] for number in range(count)]
    figures, outcomes = run_measured(closed_loop(port, clients, sessions))
    return {**figures, "events": sum(len(outcome.arrivals) for outcome in outcomes)}


def shares(server: Server, slots: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one run, with the CPU time of the server's threads."""
    client(server.port, slots, slots, 8, options.words)
    before, queued, cpu_before = server.thread_seconds(), server.thread_seconds(QUEUED), server.cpu_seconds()
    figures = client(server.port, slots, max(slots, options.requests), options.tokens, options.words)
    after, seconds = server.thread_seconds(), figures["seconds"]
    engine, loop = engine_thread(server), server.pid
    tokens, engine_share = figures["completion_tokens"], (after[engine] - before[engine]) / seconds
    queued_share = (server.thread_seconds(QUEUED)[engine] - queued[engine]) / seconds
    return {
        "slots": slots,
        "tokens_per_second": figures["tokens_per_second"],
        "tokens_per_event": tokens / figures["events"],
        "cpu_us_per_token": 1e6 * (server.cpu_seconds() - cpu_before) / tokens,
        "engine_percent": 100 * engine_share,
        "gil_wait_percent": 100 * (1 - engine_share - queued_share),
        "loop_percent": 100 * (after[loop] - before[loop]) / seconds,
        "client_percent": figures["client_cpu_percent"],
        "gap_p50_ms": figures["gap_ms"]["p50"],
        "gap_p99_ms": figures["gap_ms"]["p99"],
    }


def flags(options: argparse.Namespace) -> list[str]:
    """Returns further flags of the server."""
    return ["--sim-vocabulary", str(options.vocabulary), "--temp", str(options.temperature), *options.more]


def run(slots: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of a server with `slots` slots. Raises RuntimeError if the server does not start."""
    port = free_port()
    with running(command(port, slots, options.cost, options.accept, flags(options)), port, 60) as server:
        return shares(server, slots, options)


def part_microseconds(slots: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the CPU microseconds of a token by part, in a server with `slots` slots."""
    port = free_port()
    with TemporaryDirectory() as folder:
        out = Path(folder) / "parts.json"
        module = "bench.parts", str(out)
        with running(command(port, slots, options.cost, options.accept, flags(options), module), port, 60):
            figures = client(port, slots, max(slots, options.requests), options.tokens, options.words)
        seconds = json.loads(out.read_text())
    return {"slots": slots, **{name: 1e6 * spent / figures["completion_tokens"] for name, spent in seconds.items()}}


def main() -> None:
    """Prints a table and writes `limits.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--slots", type=int, nargs="+", default=[1, 8, 32, 128, 256], help="slots, and concurrent clients, of each run"
    )
    parser.add_argument("--cost", default="free", help="--sim-cost of the server")
    parser.add_argument("--accept", type=float, default=0.0, help="--sim-accept of the server")
    parser.add_argument(
        "--requests", type=int, default=64, help="minimum number of requests; each client sends at least one"
    )
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--words", type=int, default=12, help="words of each prompt")
    parser.add_argument("--vocabulary", type=int, default=0, help="--sim-vocabulary of the server")
    parser.add_argument("--temperature", type=float, default=0.8, help="temperature of all requests; 0 is greedy")
    parser.add_argument("--parts", action="store_true", help="also measure the CPU time of a token by part")
    parser.add_argument("--name", default="limits", help="name of the result file")
    parser.add_argument("more", nargs="*", help="further flags of the server, after --")
    options = parser.parse_args()
    rows = [run(slots, options) for slots in options.slots]
    show(
        "a model that computes nothing", [name.replace("_", " ") for name in rows[0]], [[*row.values()] for row in rows]
    )
    save(options.name, rows)
    if options.parts:
        found = [part_microseconds(slots, options) for slots in options.slots]
        names = list(dict.fromkeys(name for each in found for name in each))
        show("CPU microseconds of a token", names, [[each.get(name, 0.0) for name in names] for each in found])
        save(f"{options.name}_parts", found)


if __name__ == "__main__":
    main()
