"""Replicas on Ray Serve: streams, affinity, a killed replica, scale-down and autoscaling."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bench.client import Outcome, chat, stream, user
from bench.fleet import ENVIRONMENTS, MODEL_NAME
from bench.routers import LOAD_REQUESTS, LOAD_TOKENS, WORKER_FLAGS, affinity, load, load_result
from bench.server import free_port
from bench.workloads import CHAT_PATH, random_text
from tests.api.server import ROOT

FLAGS = " ".join(["--alias", MODEL_NAME, "--grace", "60", *WORKER_FLAGS])
STREAMS = 64
START_SECONDS = 180.0


class RayServer:
    """A cluster of its own with the application, and the numbers of running replicas that it prints."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())

    def close(self) -> None:
        """Ends the cluster."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self._reader.join(60)
        self.process.stdout.close()

    def wait_for_replicas(self, number: int) -> None:
        """Blocks until `number` replicas run."""
        while self._lines.get(timeout=START_SECONDS) != str(number):
            pass

    def deploy(self, **arguments: object) -> None:
        """Deploys the application with other arguments."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"flags": FLAGS, "cpus": 0.5, **arguments}) + "\n")
        self.process.stdin.flush()

    def replica_pids(self) -> list[int]:
        """Returns the processes of the replicas, all descendants of this cluster's process."""
        return [pid for pid in _descendants(self.process.pid) if "ServeReplica:paceline" in _command(pid)]


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from _descendants(child)


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@contextmanager
def ray_serving(**arguments: object) -> Iterator[RayServer]:
    """Runs the application on Ray for the length of the block."""
    port = free_port()
    python = str(ENVIRONMENTS / "ray" / "bin" / "python")
    given = json.dumps({"flags": FLAGS, "cpus": 0.5, **arguments})
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [python, "-m", "tests.scale.ray_server", str(port), given],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    server = RayServer(process, port)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RayServer]:
    with ray_serving(replicas=2, affinity="session") as server:
        server.wait_for_replicas(2)
        yield server


async def _streams(port: int, tokens: int = LOAD_TOKENS) -> Sequence[Outcome]:
    def body(number: int) -> dict[str, object]:
        return chat(user(random_text(number, 30)), tokens, seed=number, model=MODEL_NAME)

    return await asyncio.gather(*(stream(port, CHAT_PATH, body(number)) for number in range(STREAMS)))


async def test_streams_and_affinity(server: RayServer) -> None:
    outcomes = await _streams(server.port)
    assert load_result(outcomes).complete == STREAMS
    assert all(len(each.arrivals) > 10 for each in outcomes)  # the proxy holds no events back
    assert await affinity(server.port) >= 0.95


async def test_a_killed_replica_is_replaced(server: RayServer) -> None:
    """Ray's proxy does not repeat requests, so those of the dead replica end: with an error, or cut."""
    victim = server.replica_pids()[0]
    outcomes = await load([server.port], lambda: os.kill(victim, signal.SIGKILL))
    result = load_result(outcomes)
    assert result.complete >= LOAD_REQUESTS // 2
    assert all(each.status in (200, 500, 503) for each in outcomes)
    await asyncio.to_thread(server.wait_for_replicas, 2)
    assert victim not in server.replica_pids()
    assert load_result(await _streams(server.port)).complete == STREAMS


async def test_scale_down_drains(server: RayServer) -> None:
    def scale_down() -> None:
        server.deploy(replicas=1, affinity="session")

    assert load_result(await load([server.port], scale_down)).complete == LOAD_REQUESTS
    await asyncio.to_thread(server.wait_for_replicas, 1)


async def test_the_queue_adds_replicas() -> None:
    # The shutdown of the cluster waits `--grace` seconds for the streams.
    flags = FLAGS.replace("--grace 60", "--grace 1")
    with ray_serving(replicas=1, max_replicas=2, target_requests=8, flags=flags) as server:
        await asyncio.to_thread(server.wait_for_replicas, 1)
        running = asyncio.create_task(_streams(server.port, 4000))
        await asyncio.to_thread(server.wait_for_replicas, 2)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
