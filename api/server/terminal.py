"""What the person who started the server sees."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from api.config.server import ServerConfig
from api.generation.loaded_model import Served

QUARTER = 0.25


def say(line: str) -> None:
    """One line on stderr, as it is."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class Bar:
    """Shows how far something is done: a bar on a terminal, elsewhere a line for each quarter."""

    def __init__(self, words: str) -> None:
        self._words = words
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
        """The share that is done, 0 to 1."""
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
        f"unified KV, {engine.info.context} tokens"
        if engine.memory.kv_unified
        else f"per-slot KV, {engine.request_limit} tokens each",
        engine.info.device,
        *(["deterministic"] if engine.info.exact else []),
    ]
    key = " -H 'Authorization: Bearer YOUR_KEY'" if served.options.server.api_keys else ""
    lines = [
        " · ".join(facts),
        *([f"KV layout: {engine.memory.kv_reason}"] if engine.memory.kv_reason else []),
        *_guessing(served),
        f"Try: curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} \\",
        """  -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64}'""",
    ]
    return "\n".join([*(f"Note: {note}" for note in _notes(served)), *lines])


def _notes(served: Served) -> Iterator[str]:
    """What the person may have expected otherwise."""
    if served.prompts.trouble:
        yield served.prompts.trouble
    wanted = {*served.options.speculation.chosen, *(["draft"] if served.options.draft.path else [])}
    for kind, reason in served.engine.silent.items():
        if kind in wanted:
            yield f"Nobody guesses by {kind}: {reason}."


def _guessing(served: Served) -> Iterator[str]:
    """A line about who guesses ahead, if anybody may."""
    draft = served.options.draft.path if "draft" in served.engine.proposers else ""
    if served.guessers:
        names = [f"draft ({Path(draft).name})" if kind == "draft" else kind for kind in served.guessers]
        yield f"Guessing ahead: {', '.join(names)}"
    elif draft:
        yield f"{Path(draft).name} guesses only for requests that ask for it; for all with --spec-type draft"


def address_of(config: ServerConfig, port: int) -> str:
    """Where a client on this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"
