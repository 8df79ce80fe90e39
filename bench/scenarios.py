"""Measures two scenarios over HTTP: gaps of running streams during a long prefill, and prefill of a shared prefix."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench.client import Outcome, chat, run_closed_loop, stream, user
from bench.figures import percentile, save, show
from bench.models import SOURCES
from bench.server import Server, serving
from bench.workloads import CHAT_PATH, text_of

# Tokens of each stream that runs beside the long prompt.
STREAM_TOKENS = 2500


def slot_tokens(prompt: int) -> int:
    """Returns the context of a slot for prompts of about `prompt` tokens and for the streams of `long_prompt`."""
    return max(prompt, STREAM_TOKENS) + 608


async def long_prompt(
    server: Server,
    streams: int = 4,
    prompt: int = 4000,
    lead: float = 6.0,
    adapt_body: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: body,
) -> dict[str, Any]:
    """Returns the gaps of running streams in the `lead` seconds before a long prompt and during its prefill.

    `prompt` is the approximate length of the long prompt in tokens; a slot needs `slot_tokens(prompt)`. `adapt_body`
    adapts the body of each request to the server.
    """
    outcomes = [Outcome(0.0) for _ in range(streams)]

    async def send(text: str, tokens: int, seed: int, outcome: Outcome) -> Outcome:
        body = adapt_body(chat(user(text), tokens, seed=seed))
        return await stream(server.port, CHAT_PATH, body, outcome=outcome)

    async with asyncio.TaskGroup() as group:
        running = [
            group.create_task(send(f"Count slowly. {number}", STREAM_TOKENS, number, outcome))
            for number, outcome in enumerate(outcomes)
        ]
        await asyncio.sleep(lead)
        long = await send(text_of(prompt), 4, 1, Outcome(0.0))
        num_running = sum(not task.done() for task in running)
        for task in running:
            task.cancel()
    if long.failed:
        raise RuntimeError(f"the long prompt failed ({long.status}): {long.error}")
    first_arrival = long.arrivals[0]
    pairs = [pair for outcome in outcomes for pair in zip(outcome.arrivals[8:], outcome.arrivals[9:], strict=False)]
    before = [later - earlier for earlier, later in pairs if later < long.begun]
    during = [later - earlier for earlier, later in pairs if earlier < first_arrival and later > long.begun]
    return {
        "prompt_tokens": long.prompt_tokens,
        "prompt_seconds": first_arrival - long.begun,
        "streams_still_running": num_running,
        "median_gap_before_ms": 1000 * median(before),
        "median_gap_during_prefill_ms": 1000 * median(during),
        "p99_gap_during_prefill_ms": 1000 * percentile(during, 0.99),
        "largest_gap_during_prefill_ms": 1000 * max(during),
        "largest_against_median_before": max(during) / median(before),
        "largest_against_median_of_all": max(during) / median([*before, *during]),
    }


async def shared_prefix(server: Server, clients: int = 8, requests: int = 24, prompt: int = 2000) -> dict[str, Any]:
    """Returns the prompt tokens sent and computed for requests that all begin with one long system prompt."""
    system = {"role": "system", "content": text_of(prompt)}
    bodies = (chat([system, *user(f"Question {n}?")], 16, seed=n) for n in range(requests))
    loop = asyncio.get_running_loop()
    begun = loop.time()
    outcomes = await run_closed_loop(clients, bodies, partial(stream, server.port, CHAT_PATH))
    seconds = loop.time() - begun
    sent = sum(outcome.prompt_tokens for outcome in outcomes)
    cached = sum(outcome.cached_tokens for outcome in outcomes)
    return {
        "requests": len(outcomes),
        "failed": sum(outcome.failed for outcome in outcomes),
        "seconds": seconds,
        "prompt_tokens_of_one": max(outcome.prompt_tokens for outcome in outcomes),
        "prompt_tokens": sent,
        "prompt_tokens_computed": sent - cached,
        "requests_that_computed_the_prefix": sum(
            outcome.cached_tokens < outcome.prompt_tokens // 2 for outcome in outcomes
        ),
    }


async def run(model: Path, only: str) -> dict[str, dict[str, Any]]:
    """Returns the figures of each scenario, or only of the scenario `only`; each scenario has its own server."""
    figures: dict[str, dict[str, Any]] = {}
    if only in ("", "long"):
        with serving(model, ["-c", str(8 * slot_tokens(4000)), "-np", "8"]) as server:
            figures["a long prompt beside four streams"] = await long_prompt(server)
    if only in ("", "prefix"):
        with serving(model, ["-c", str(8 * slot_tokens(2000)), "-np", "8"]) as server:
            figures["24 requests, 8 clients, one system prompt"] = await shared_prefix(server)
    return figures


def main() -> None:
    """Prints a table for each scenario and writes `scenarios.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument("--only", choices=["long", "prefix"], default="", help="one scenario instead of both")
    options = parser.parse_args()
    figures = asyncio.run(run(options.model, options.only))
    for title, rows in figures.items():
        show(title, ["", ""], [[name.replace("_", " "), value] for name, value in rows.items()])
    save("scenarios", figures)


if __name__ == "__main__":
    main()
