"""The real server as a subprocess."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
QUICK = ("-t", "1", "-c", "4096", "--no-warmup")
"""One thread: two would wait for each other whenever something else runs on the machine."""
PATIENCE = 60.0
"""Seconds for anything to happen."""


class Server:
    """A running `paceline serve`, and what it has written."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "api", "serve", *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self.lines: list[str] = []
        self._coming: SimpleQueue[str | None] = SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._coming.put(line.rstrip("\n"))
        self._coming.put(None)

    def until(self, pattern: str) -> re.Match[str]:
        """Waits for a line in which `pattern` is found."""
        while True:
            try:
                line = self._coming.get(timeout=PATIENCE)
            except Empty:
                raise AssertionError(f"nothing like {pattern!r} in {self.lines}") from None
            assert line is not None, f"it ended without {pattern!r}: {self.lines}"
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found

    def ready(self) -> str:
        """Waits until requests are served; the address."""
        self.url = self.until(r"^Serving .* on (http://\S+) ").group(1)
        return self.url

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Sends a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Waits for its end; the exit code. All its lines are known then."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        while (line := self._coming.get(timeout=1)) is not None:
            self.lines.append(line)
        return code

    def close(self) -> None:
        """Ends it, if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """A server on a free port with the small model, or as told; killed at the end if it still runs."""
    server = Server("-m", str(MODEL), "--port", "0", *QUICK, *arguments)
    try:
        yield server
    finally:
        server.close()
