"""Starts a server as a subprocess, waits until it is healthy, reads its CPU time and memory, and ends it."""

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
# Fields of /proc/PID/task/TID/schedstat: nanoseconds on a core, and nanoseconds in a run queue.
COMPUTED, QUEUED = 0, 1


class Server(msgspec.Struct, frozen=True):
    """A running server process on loopback."""

    port: int
    pid: int
    key: str = ""
    """API key for the metrics."""

    def loop_seconds(self) -> float:
        """Returns the CPU time of the main thread, which runs the event loop."""
        return self.thread_seconds()[self.pid]

    def cpu_seconds(self) -> float:
        """Returns the CPU time of all running threads."""
        return sum(self.thread_seconds().values())

    def thread_seconds(self, field: int = COMPUTED) -> dict[int, float]:
        """Returns by thread id the seconds on a core (COMPUTED) or in a run queue (QUEUED), of the server and its
        child processes."""
        found = [task for process in self._processes() for task in Path(f"/proc/{process}/task").iterdir()]
        return {int(task.name): int((task / "schedstat").read_text().split()[field]) / 1e9 for task in found}

    def resident_bytes(self, *, peak: bool = True) -> int:
        """Returns the resident memory of the server and its child processes, at the peak of each or now."""
        field = "VmHWM:" if peak else "VmRSS:"
        lines = [line for each in self._processes() for line in Path(f"/proc/{each}/status").read_text().splitlines()]
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

    def _processes(self) -> list[int]:
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return [self.pid, *(int(child) for task in tasks for child in (task / "children").read_text().split())]

    def metric(self, name: str) -> float:
        """Returns the sum of the samples of a metric. Raises KeyError if `/metrics` has no such metric."""
        lines = self.metrics().splitlines()
        values = [float(line.split()[-1]) for line in lines if line.partition("{")[0].split(" ")[0] == name]
        if not values:
            raise KeyError(name)
        return sum(values)

    def metrics(self) -> str:
        """Returns the text of `/metrics`."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(f"http://{HOST}:{self.port}/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            text: str = response.read().decode()
        return text


def free_port() -> int:
    """Returns a port of loopback that no process listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(model: Path, arguments: Sequence[str] = (), seconds: float = 120) -> Iterator[Server]:
    """Runs `paceline serve` on `model` for the length of the block.

    Raises RuntimeError if the server is not healthy in `seconds`.
    """
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
    """Runs the command of a server for the length of the block; `log` gets its output.

    Raises RuntimeError, with the last lines of the log if there is one, if the server is not healthy in `seconds`.
    """
    out = log or subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        if not _wait_until_healthy(f"http://{HOST}:{port}{health}", process, seconds):
            failure = f"the server did not become healthy (exit code {process.poll()})"
            raise RuntimeError("\n".join([failure, *_last_lines(log)]))
        yield Server(port, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except (URLError, OSError):
            time.sleep(0.1)
    return False


def _last_lines(log: IO[str] | None) -> list[str]:
    if log is None:
        return []
    log.seek(0)
    return log.read().splitlines()[-10:]
