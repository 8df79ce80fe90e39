"""Measures concurrent agent conversations in fewer cells than the conversations need together.

Each turn should compute only its new tokens. `python -m bench.conversations` serves the model with
unified KV and `--cache-disk`, runs conversations of many turns concurrently, restarts the server, and sends one more
turn of each conversation.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from bench.client import Outcome, chat, stream
from bench.figures import save, show
from bench.models import SOURCES
from bench.server import serving
from bench.workloads import CHAT_PATH

TOOLS = ("read_file", "list_folder", "run_tests", "search")
NAMES = ("main", "parser", "server", "index", "queue", "tables", "report", "client")


def system_prompt(number: int) -> str:
    """Returns the system prompt of agent `number`, a few hundred tokens."""
    rules = " ".join(f"Rule {n}: use {TOOLS[(n + number) % 4]} before you change {NAMES[n % 8]}.py." for n in range(12))
    return f"You are agent {number}. You work on a program in small steps. {rules}"


def tool_output(random: Random, lines: int) -> str:
    """Returns the random output of a tool."""
    return "\n".join(
        f"{random.choice(NAMES)}.py:{random.randint(1, 900)}: {random.choice(TOOLS)} took {random.random():.3f} s"
        for _ in range(lines)
    )


async def turn(port: int, messages: list[dict[str, str]], random: Random, tokens: int) -> Outcome:
    """Sends the next turn, and appends its question and its answer to `messages`."""
    messages.append({"role": "user", "content": f"Tool output:\n{tool_output(random, 3)}\nWhat next?"})
    outcome = await stream(port, CHAT_PATH, chat(messages, tokens, temperature=0.0))
    messages.append({"role": "assistant", "content": outcome.text})
    return outcome


async def converse(port: int, number: int, turns: int, tokens: int) -> tuple[list[dict[str, str]], list[Outcome]]:
    """Runs one conversation; returns its messages and the outcome of each turn."""
    random = Random(number)
    messages = [{"role": "system", "content": system_prompt(number)}]
    outcomes = [await turn(port, messages, random, tokens) for _ in range(turns)]
    return messages, outcomes


def prefill_counts(outcomes: list[Outcome]) -> dict[str, Any]:
    """Returns the counts of one conversation: `computed` and `new` prompt tokens among others.

    New tokens are neither in the previous prompt nor in the previous answer. The last token of an answer counts as new,
    because it has no cell yet.
    """
    computed = new = known = 0
    for outcome in outcomes:
        computed += outcome.prompt_tokens - outcome.cached_tokens
        new += outcome.prompt_tokens - max(0, known - 1)
        known = outcome.prompt_tokens + outcome.completion_tokens
    return {
        "turns": len(outcomes),
        "failed": sum(outcome.failed for outcome in outcomes),
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in outcomes),
        "new": new,
        "computed": computed,
        "computed_per_new": computed / new,
    }


async def measure(options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Returns the figures of all conversations, and of one turn of each after a restart of the server."""
    begun = time.perf_counter()
    with serving(options.model, flags) as server:
        conversations = [converse(server.port, n, options.turns, options.tokens) for n in range(options.conversations)]
        results = await asyncio.gather(*conversations)
        seconds = time.perf_counter() - begun
        counts = {name: server.metric(f"paceline_{name}_total") for name in ("retractions", "restores", "hits")}
        await asyncio.sleep(1.0)  # time to write the idle prefixes to disk
    with serving(options.model, flags) as server:
        again = [await turn(server.port, messages, Random(99), options.tokens) for messages, _ in results]
    last = [outcomes[-1] for _, outcomes in results]
    known = [outcome.prompt_tokens + outcome.completion_tokens - 1 for outcome in last]
    return {
        "seconds": seconds,
        "conversations": [prefill_counts(outcomes) for _, outcomes in results],
        **counts,
        "after_restart_cached_of_known": [
            (outcome.cached_tokens, expected) for outcome, expected in zip(again, known, strict=True)
        ],
    }


def main() -> None:
    """Prints a table and writes `conversations.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument("-c", "--cells", type=int, default=4096, help="cells, fewer than all conversations need")
    parser.add_argument("--conversations", type=int, default=4, help="concurrent conversations")
    parser.add_argument("--turns", type=int, default=20, help="turns of each conversation")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each answer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-c", str(options.cells), "--kv-unified", "--cache-disk", folder]
        figures = asyncio.run(measure(options, flags))
    rows = [[number, *counts.values()] for number, counts in enumerate(figures["conversations"])]
    show("prompt tokens of each conversation", ["", *figures["conversations"][0]], rows)
    print({name: value for name, value in figures.items() if name != "conversations"})
    save("conversations", figures)


if __name__ == "__main__":
    main()
