"""What the person who started the server sees."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from api.config import ServerConfig
from api.served import Served

QUARTER = 0.25


def say(line: str) -> None:
    """One line on stderr, as it is."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class LoadingBar:
    """Shows how far a model is loaded: a bar on a terminal, elsewhere a line for each quarter."""

    def __init__(self, model: str) -> None:
        self._words = f"Loading {Path(model).name}"
        self._next = QUARTER
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(self._words, total=1.0)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        else:
            say(self._words)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, share: float) -> None:
        """The share that is loaded, 0 to 1."""
        if self._bar is not None:
            self._bar.update(self._task, completed=share)
            return
        if share >= self._next:
            say(f"{self._words}: {int(share / QUARTER) * 25} %")
            self._next = (int(share / QUARTER) + 1) * QUARTER


def welcome(served: Served, address: str) -> str:
    """What is served and where, and a command that tries it."""
    engine = served.engine
    facts = [
        f"Serving {served.name} on {address}",
        f"{engine.slots} slot{'s' if engine.slots > 1 else ''}",
        f"{engine.info.context} tokens of context",
        engine.info.device,
    ]
    key = " -H 'Authorization: Bearer YOUR_KEY'" if served.config.api_keys else ""
    lines = [
        " · ".join(facts),
        f"Try: curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} \\",
        """  -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64}'""",
    ]
    return "\n".join([*([f"Note: {served.prompts.trouble}"] if served.prompts.trouble else []), *lines])


def address_of(config: ServerConfig, port: int) -> str:
    """Where a client on this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"
