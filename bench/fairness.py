"""Measures how long a client waits for its first token while another one floods the server.

    python -m bench.fairness                    # a simulated model, about a minute
    python -m bench.fairness -m model.gguf

Both clients have an API key of their own. The table has the times to first token on the empty server and during the
flood, their ratio, and the same with one key for both, which is first come, first served. The goal is twice the time on
the empty server plus one step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from statistics import median
from typing import Any

from msgspec import structs

from bench.client import chat, stream, user
from bench.figures import save, show
from bench.server import Server, serving
from bench.workloads import CHAT_PATH
from engine import SIMULATED_MODEL

FLOODING_KEY, OTHER_KEY = "flooding", "other"
SLOTS = 4
FLOOD_REQUESTS, FLOOD_TOKENS = 200, 100
# First tokens measured on the empty server and during the flood.
REPETITIONS = 8
# Maximum time for the other client's request; first come, first served would take minutes.
_PATIENCE_SECONDS = 10.0
_PROMPT_WORDS = 150


def body(number: int, tokens: int) -> dict[str, Any]:
    """Returns a request whose prompt shares no prefix with those of other numbers."""
    return chat(user(f"{number}: " + " ".join(f"word{number}x{at}" for at in range(_PROMPT_WORDS))), tokens)


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def first_token_seconds(server: Server, number: int, key: str) -> float:
    """Returns the time to first token, or the seconds of patience without one."""
    outcome = await stream(
        server.port,
        CHAT_PATH,
        body(number, 4),
        max_arrivals=1,
        abandon_after=_PATIENCE_SECONDS,
        headers=_bearer(key),
    )
    return outcome.ttft if outcome.arrivals else _PATIENCE_SECONDS


async def measure(server: Server, key: str, repetitions: int) -> tuple[list[float], list[float]]:
    """Returns the times to first token of requests with `key`: on the empty server, and during the flood."""
    alone = [await first_token_seconds(server, number, key) for number in range(repetitions)]
    flood = [asyncio.create_task(_flood_request(server, number)) for number in range(FLOOD_REQUESTS)]
    await asyncio.sleep(2.0)
    during = []
    for number in range(repetitions):
        during.append(await first_token_seconds(server, 1000 + number, key))
        await asyncio.sleep(0.3)
    assert not all(task.done() for task in flood), "the flood goes on"
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    return alone, during


def _flood_request(server: Server, number: int) -> Coroutine[Any, Any, object]:
    return stream(server.port, CHAT_PATH, body(5000 + number, FLOOD_TOKENS), headers=_bearer(FLOODING_KEY))


async def run(server: Server) -> dict[str, Any]:
    """Returns the figures of two keys, and of one key for both."""
    alone, during = await measure(server, OTHER_KEY, REPETITIONS)
    _, shared = await measure(server, FLOODING_KEY, 1)
    step = server.metric("paceline_native_seconds_total") / server.metric("paceline_steps_total")
    return {
        "alone_ms": 1e3 * median(alone),
        "flood_ms": 1e3 * median(during),
        "flood_max_ms": 1e3 * max(during),
        "ratio": median(during) / median(alone),
        "step_ms": 1e3 * step,
        "goal_ms": 1e3 * (2 * median(alone) + step),
        "one_key_ms": 1e3 * max(shared),
    }


def main() -> None:
    """Prints one table and writes `fairness.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, help="GGUF; without it the model is simulated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.json"
        entries = [{"key": FLOODING_KEY, "admin": True}, {"key": OTHER_KEY, "name": OTHER_KEY}]
        keys.write_text(json.dumps({"keys": entries}))
        flags = ["--keys", str(keys), "-np", str(SLOTS), *([] if options.model else ["--sim"])]
        with serving(options.model or Path(SIMULATED_MODEL), flags) as server:
            figures = asyncio.run(run(structs.replace(server, key=FLOODING_KEY)))
    show("time to first token of one client, while another floods", ["", "value"], [*map(list, figures.items())])
    save("fairness", figures)


if __name__ == "__main__":
    main()
