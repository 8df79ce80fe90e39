"""A `paceline serve` of its own for a measurement: started, awaited, read from outside, and ended."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.error import URLError

import msgspec

HOST = "127.0.0.1"
COMPUTED, QUEUED = 0, 1
"""What Linux tells of a thread's time."""


class Server(msgspec.Struct, frozen=True):
    """A running server, and how to look at it without disturbing it."""

    port: int
    pid: int

    def loop_seconds(self) -> float:
        """CPU time of the process's main thread, which is the event loop."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    def cpu_seconds(self) -> float:
        """CPU time of the whole process."""
        return sum(self.thread_seconds().values())

    def thread_seconds(self, field: int = COMPUTED) -> dict[int, float]:
        """Seconds that each thread has COMPUTED, or was QUEUED for a core."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return {int(task.name): int((task / "schedstat").read_text().split()[field]) / 1e9 for task in tasks}

    def resident(self) -> int:
        """Bytes of memory that the process has, at its most."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))

    def metric(self, name: str) -> float:
        """The sum of a metric's samples at `/metrics`."""
        with urllib.request.urlopen(f"http://{HOST}:{self.port}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        values = [float(line.split()[-1]) for line in lines if line.partition("{")[0].split(" ")[0] == name]
        if not values:
            raise KeyError(name)
        return sum(values)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(model: Path, arguments: Sequence[str] = (), seconds: float = 120) -> Iterator[Server]:
    """Serves `model` for the length of the block. Raises RuntimeError if it is not healthy in `seconds`."""
    port = free_port()
    command = [sys.executable, "-m", "api", "serve", "-m", str(model), "--port", str(port), *arguments]
    with running(command, port, seconds) as server:
        yield server


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    seconds: float,
    log: IO[str] | None = None,
    *,
    health: str = "/health",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Runs a server's command for the length of the block, and what it says into `log`.

    Raises RuntimeError, with its last words if there is a log, if it is not healthy in `seconds`.
    """
    out = log or subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        if not _healthy(f"http://{HOST}:{port}{health}", process, seconds):
            words = f"the server did not become healthy (exit code {process.poll()})"
            raise RuntimeError("\n".join([words, *_last(log)]))
        yield Server(port, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _healthy(url: str, process: subprocess.Popen[bytes], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except (URLError, OSError):
            time.sleep(0.1)
    return False


def _last(log: IO[str] | None) -> list[str]:
    if log is None:
        return []
    log.seek(0)
    return log.read().splitlines()[-10:]
