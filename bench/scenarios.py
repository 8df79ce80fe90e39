"""Two promises, measured over HTTP: a long prompt does not stall running streams, and a prefix is computed once."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench.client import Outcome, chat, closed, stream, user
from bench.figures import percentile, save, show
from bench.server import Server, serving
from bench.workloads import text_of


async def long_prompt(
    server: Server,
    streams: int = 4,
    prompt: int = 4000,
    lead: float = 6.0,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: body,
) -> dict[str, Any]:
    """Gaps between texts of running streams, in the `lead` seconds before a long prompt and while it is read. Requests
    are sent as `change` makes them."""
    outcomes = [Outcome(0.0) for _ in range(streams)]

    async def ask(text: str, tokens: int, seed: int, outcome: Outcome) -> Outcome:
        body = change(chat(user(text), tokens, seed=seed))
        return await stream(server.port, "/v1/chat/completions", body, outcome=outcome)

    async with asyncio.TaskGroup() as group:
        running = [group.create_task(ask(f"Count slowly. {n}", 2500, n, outcome)) for n, outcome in enumerate(outcomes)]
        await asyncio.sleep(lead)
        long = await ask(text_of(prompt), 4, 1, Outcome(0.0))
        still = sum(not task.done() for task in running)
        for task in running:
            task.cancel()
    first = long.arrivals[0]
    pairs = [pair for outcome in outcomes for pair in zip(outcome.arrivals[8:], outcome.arrivals[9:], strict=False)]
    before = [later - earlier for earlier, later in pairs if later < long.begun]
    inside = [later - earlier for earlier, later in pairs if earlier < first and later > long.begun]
    return {
        "prompt_tokens": long.prompt_tokens,
        "prompt_seconds": first - long.begun,
        "streams_running_all_the_while": still,
        "median_gap_before_ms": 1000 * median(before),
        "median_gap_while_reading_ms": 1000 * median(inside),
        "p99_gap_while_reading_ms": 1000 * percentile(inside, 0.99),
        "largest_gap_while_reading_ms": 1000 * max(inside),
        "largest_against_median_before": max(inside) / median(before),
        "largest_against_median_of_all": max(inside) / median([*before, *inside]),
    }


async def shared_prefix(server: Server, clients: int = 8, requests: int = 24, prompt: int = 2000) -> dict[str, Any]:
    """How many prompt tokens are computed for requests that all begin with one long system prompt."""
    system = {"role": "system", "content": text_of(prompt)}
    bodies = (chat([system, *user(f"Question {n}?")], 16, seed=n) for n in range(requests))
    loop = asyncio.get_running_loop()
    begun = loop.time()
    outcomes = await closed(clients, bodies, partial(stream, server.port, "/v1/chat/completions"))
    seconds = loop.time() - begun
    asked = sum(outcome.prompt_tokens for outcome in outcomes)
    cached = sum(outcome.cached_tokens for outcome in outcomes)
    return {
        "requests": len(outcomes),
        "failed": sum(outcome.failed for outcome in outcomes),
        "seconds": seconds,
        "prompt_tokens_of_one": max(outcome.prompt_tokens for outcome in outcomes),
        "prompt_tokens_asked": asked,
        "prompt_tokens_computed": asked - cached,
        "requests_that_computed_the_prefix": sum(
            outcome.cached_tokens < outcome.prompt_tokens // 2 for outcome in outcomes
        ),
    }


async def run(model: Path, only: str) -> dict[str, dict[str, Any]]:
    """Each scenario on a server of its own."""
    figures: dict[str, dict[str, Any]] = {}
    if only in ("", "long"):
        with serving(model, ["-c", "36864", "-np", "8"]) as server:
            figures["a long prompt beside four streams"] = await long_prompt(server)
    if only in ("", "prefix"):
        with serving(model, ["-c", "24576", "-np", "8"]) as server:
            figures["24 requests, 8 clients, one system prompt"] = await shared_prefix(server)
    return figures


def main() -> None:
    """Prints a table for each scenario and writes `scenarios.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--only", choices=["long", "prefix"], default="", help="one scenario instead of both")
    options = parser.parse_args()
    figures = asyncio.run(run(options.model, options.only))
    for title, rows in figures.items():
        show(title, ["", ""], [[name.replace("_", " "), value] for name, value in rows.items()])
    save("scenarios", figures)


if __name__ == "__main__":
    main()
