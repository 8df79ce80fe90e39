"""KV events as NVIDIA Dynamo's indexer reads them: by tier, with replay, eviction and the end of a worker."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.fleet import ENVIRONMENTS, MODEL_NAME, fleet_workers
from bench.server import HOST, free_port, running
from engine import BLOCK_TOKENS

# One slot with so few cells that the third prompt evicts the first one.
FLAGS = ("--sim", "--sim-cost", "free", "-np", "1", "-kvu", "-c", "256", "--cache-ram", "64")
WAIT_SECONDS = 30.0


def post(port: int, path: str, body: dict[str, Any]) -> Any:
    """Returns the reply to a JSON body."""
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://{HOST}:{port}{path}", msgspec.json.encode(body), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return msgspec.json.decode(response.read())


@contextmanager
def indexing(folder: Path) -> Iterator[int]:
    """Runs the indexer for the length of the block, and yields its port."""
    port = free_port()
    command = [str(ENVIRONMENTS / "routers" / "bin" / "python"), "-m", "dynamo.indexer", "--port", str(port)]
    with (folder / "log").open("w+") as log, running(command, port, WAIT_SECONDS, log):
        yield port


def complete(port: int, tokens: range) -> None:
    """Sends a prompt, which is then in the cache."""
    post(port, "/v1/completions", {"prompt": [*tokens], "max_tokens": 2, "ignore_eos": True})


def matched(indexer: int, tokens: range) -> dict[str, int]:
    """Returns the numbers of tokens that the indexer finds in cells, and in cells or RAM."""
    reply = post(indexer, "/query", {"token_ids": [*tokens], "model_name": MODEL_NAME})
    found = reply["instances"].get("1", {"gpu": 0, "cpu": 0})
    return {"cells": found["gpu"], "ram": found["cpu"]}


def wait_for(indexer: int, tokens: range, **expected: int) -> None:
    """Blocks until the indexer finds the expected numbers of tokens."""
    until = time.monotonic() + WAIT_SECONDS
    while (found := matched(indexer, tokens)) != expected:
        assert time.monotonic() < until, f"{found} instead of {expected}"
        time.sleep(0.05)


@pytest.mark.parametrize("form", ["array", "map"])
def test_the_indexer_follows_the_cache(form: str, tmp_path: Path) -> None:
    events, replay = free_port(), free_port()
    flags = ("--kv-events-endpoint", f"@tcp://{HOST}:{events}", "--kv-events-replay-endpoint", f"tcp://{HOST}:{replay}")
    first, second, third = range(1, 101), range(300, 500), range(600, 840)
    full = len(first) // BLOCK_TOKENS * BLOCK_TOKENS
    with indexing(tmp_path) as indexer:
        with fleet_workers(1, *FLAGS, *flags, "--kv-events-format", form) as (worker,):
            complete(worker.port, first)
            own = {"instance_id": 1, "model_name": MODEL_NAME, "block_size": BLOCK_TOKENS}
            sockets = {"endpoint": f"tcp://{HOST}:{events}", "replay_endpoint": f"tcp://{HOST}:{replay}"}
            post(indexer, "/register", own | sockets)
            # The indexer asks for earlier messages when it receives a later one, and its subscription takes time.
            for tokens in (second, first) * 20:
                complete(worker.port, tokens)
                time.sleep(0.05)
            wait_for(indexer, first, cells=full, ram=full)
            complete(worker.port, third)
            wait_for(indexer, first, cells=0, ram=full)
            assert matched(indexer, third)["cells"] == len(third) // BLOCK_TOKENS * BLOCK_TOKENS
        wait_for(indexer, third, cells=0, ram=0)
