"""Two promises, measured over HTTP: a long prompt does not stall running streams, and a prefix is computed once."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from statistics import median
from typing import Any

from bench.client import Outcome, chat, stream, user
from bench.figures import save, show
from bench.server import Server, serving

WORDS = "the keeper of the lighthouse wrote down every ship that passed in the night and what it carried "


def text_of(tokens: int) -> str:
    """English text of about so many tokens."""
    return (WORDS * (tokens // 18 + 1))[: int(tokens * 5.2)]


async def long_prompt(server: Server, streams: int = 4, prompt: int = 4000) -> dict[str, Any]:
    """Gaps between texts of running streams, before and while a long prompt is read."""

    async def watch(n: int) -> Outcome:
        return await stream(server.port, "/v1/chat/completions", chat(user(f"Count slowly. {n}"), 900, seed=n))

    running = [asyncio.ensure_future(watch(n)) for n in range(streams)]
    await asyncio.sleep(4)
    long = await stream(server.port, "/v1/chat/completions", chat(user(text_of(prompt)), 4))
    outcomes = await asyncio.gather(*running)
    first = long.arrivals[0]
    inside = [
        later - earlier
        for outcome in outcomes
        for earlier, later in zip(outcome.arrivals, outcome.arrivals[1:], strict=False)
        if earlier < first and later > long.begun
    ]
    every = [gap for outcome in outcomes for gap in outcome.gaps]
    before = [
        later - earlier
        for outcome in outcomes
        for earlier, later in zip(outcome.arrivals, outcome.arrivals[1:], strict=False)
        if later < long.begun
    ]
    return {
        "prompt_tokens": long.prompt_tokens,
        "prompt_seconds": first - long.begun,
        "median_gap_ms": 1000 * median(every),
        "median_gap_before_ms": 1000 * median(before),
        "median_gap_while_reading_ms": 1000 * median(inside),
        "largest_gap_while_reading_ms": 1000 * max(inside),
        "largest_against_median": max(inside) / median(every),
        "largest_against_median_before": max(inside) / median(before),
        "streams_still_running_at_its_end": sum(outcome.ended > first for outcome in outcomes),
    }


async def shared_prefix(server: Server, clients: int = 8, requests: int = 24, prompt: int = 2000) -> dict[str, Any]:
    """How many prompt tokens are computed for requests that all begin with one long system prompt."""
    system = {"role": "system", "content": text_of(prompt)}
    numbers = iter(range(requests))

    async def client() -> list[Outcome]:
        return [
            await stream(
                server.port,
                "/v1/chat/completions",
                chat([system, {"role": "user", "content": f"Question {n}?"}], 16, seed=n),
            )
            for n in numbers
        ]

    loop = asyncio.get_running_loop()
    begun = loop.time()
    outcomes = [outcome for part in await asyncio.gather(*(client() for _ in range(clients))) for outcome in part]
    seconds = loop.time() - begun
    asked = sum(outcome.prompt_tokens for outcome in outcomes)
    cached = sum(outcome.cached_tokens for outcome in outcomes)
    return {
        "requests": len(outcomes),
        "failed": sum(bool(outcome.error) or outcome.status != 200 for outcome in outcomes),
        "seconds": seconds,
        "prompt_tokens_of_one": max(outcome.prompt_tokens for outcome in outcomes),
        "prompt_tokens_asked": asked,
        "prompt_tokens_computed": asked - cached,
        "requests_that_computed_the_prefix": sum(
            outcome.cached_tokens < outcome.prompt_tokens // 2 for outcome in outcomes
        ),
    }


async def run(model: Path) -> dict[str, dict[str, Any]]:
    """Each scenario on a server of its own."""
    with serving(model, ["-c", "16384", "-np", "8"]) as server:
        long = await long_prompt(server)
    with serving(model, ["-c", "8192", "-np", "8"]) as server:
        shared = await shared_prefix(server)
    return {"a long prompt beside four streams": long, "24 requests, 8 clients, one system prompt": shared}


def main() -> None:
    """Prints a table for each scenario and writes `scenarios.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, required=True, help="GGUF file")
    figures = asyncio.run(run(parser.parse_args().model))
    for title, rows in figures.items():
        show(title, ["", ""], [[name.replace("_", " "), value] for name, value in rows.items()])
    save("scenarios", figures)


if __name__ == "__main__":
    main()
