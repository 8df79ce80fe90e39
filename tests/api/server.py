"""Runs `paceline serve` with a real model in a subprocess."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from tests.conftest import MODEL

ROOT = Path(__file__).parents[2]
# One thread: with two, any other load on the machine stalls both at every barrier.
_QUICK_FLAGS = ("-t", "1", "-c", "4096", "--no-warmup")
_TIMEOUT_SECONDS = 60.0


class Server:
    """A server process and the lines of its stderr."""

    def __init__(self, *arguments: str, command: Sequence[str] = (sys.executable, "-m", "api", "serve")) -> None:
        words, pipe = [*command, *arguments], subprocess.PIPE
        self.process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=pipe, text=True, encoding="utf-8"
        )
        self.lines: list[str] = []
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def until(self, pattern: str) -> re.Match[str]:
        """Blocks until a line matches `pattern`, and returns the match."""
        while True:
            try:
                line = self._queue.get(timeout=_TIMEOUT_SECONDS)
            except Empty:
                raise AssertionError(f"nothing like {pattern!r} in {self.lines}") from None
            assert line is not None, f"the process ended without {pattern!r}: {self.lines}"
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found

    def ready(self) -> str:
        """Blocks until the model is loaded, and returns the server's URL."""
        self.url = self.until(r"^Serving .* on (http://\S+) ").group(1)
        return self.url

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Sends a signal to the process."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Blocks until the process ends, and returns the exit code. After the call `lines` is complete."""
        code = self.process.wait(_TIMEOUT_SECONDS)
        self._thread.join(_TIMEOUT_SECONDS)
        while (line := self._queue.get(timeout=1)) is not None:
            self.lines.append(line)
        return code

    def close(self) -> None:
        """Kills the process if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._thread.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """Starts a server with the small model, or with `arguments`, on a free port. Kills the server at the end."""
    server = Server("-m", str(MODEL), "--port", "0", *_QUICK_FLAGS, *arguments)
    try:
        yield server
    finally:
        server.close()
