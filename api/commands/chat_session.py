"""A conversation with a server: messages, settings, and the stream of a reply."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from api.commands.server_client import ServerClient, ServerError, without_controls

_PATH = "/v1/chat/completions"


class ReplyPart(Struct, frozen=True):
    """A part of a reply, without control characters."""

    text: str
    reasoning: bool = False


class ReplyTimings(Struct, frozen=True):
    """Tokens of a reply and their speed, in the fields of llama-server's `timings`."""

    predicted_n: int = 0
    predicted_per_second: float = 0.0
    draft_n: int = 0
    draft_n_accepted: int = 0

    def __str__(self) -> str:
        drafts = f", {self.draft_n_accepted} of {self.draft_n} draft tokens accepted" if self.draft_n else ""
        return f"{self.predicted_n} tokens, {self.predicted_per_second:.1f} tokens/s{drafts}"


# Yields the parts of a reply, and its timings at the end.
Reply = Generator[ReplyPart | ReplyTimings, None, None]


class _ChunkDelta(Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None


class _ChunkChoice(Struct, frozen=True):
    delta: _ChunkDelta = _ChunkDelta()


class _StreamError(Struct, frozen=True):
    message: str


class _Chunk(Struct, frozen=True):
    choices: list[_ChunkChoice] = []
    timings: ReplyTimings | None = None
    error: _StreamError | None = None


_CHUNK = msgspec.json.Decoder(_Chunk)


class ChatSession:
    """The messages of a conversation, and the fields of every request."""

    def __init__(self, client: ServerClient, system: str = "") -> None:
        self._client = client
        self.system = system
        """The system message; empty is none."""
        self.turns: list[dict[str, str]] = []
        """The messages of user and assistant."""
        self.fields: dict[str, Any] = {}
        """Fields of the request, such as `temperature`."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """All messages, the system message first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, text: str) -> Reply:
        """Appends a message of the user, and yields the reply as `regenerate` does."""
        earlier = [*self.turns]
        self.turns.append({"role": "user", "content": text})
        return self._reply(earlier)

    def regenerate(self) -> Reply:
        """Yields the parts of a new reply to the last message of the user, and the timings at its end.

        When the iterator ends, is closed or raises, the text so far becomes the last message; without any text the
        conversation does not change. Requires a message of the user. Raises ServerError.
        """
        earlier = [*self.turns]
        if self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        return self._reply(earlier)

    def _reply(self, earlier: list[dict[str, str]]) -> Reply:
        """Yields the parts and timings of a reply. `earlier` are the turns to restore after a reply without text."""
        content: list[str] = []
        body = {**self.fields, "messages": self.messages, "stream": True}
        try:
            with closing(self._client.stream(_PATH, body)) as events:
                for event in events:
                    for part in _parts(event):
                        if isinstance(part, ReplyPart) and not part.reasoning:
                            content.append(part.text)
                        yield part
        finally:
            if content:
                self.turns.append({"role": "assistant", "content": "".join(content)})
            else:
                self.turns = earlier

    def save(self, path: Path) -> None:
        """Writes the messages to `path`: as a JSON list if its suffix is .json, else as Markdown. Raises OSError."""
        if path.suffix == ".json":
            text = json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n".join(f"## {each['role']}\n\n{each['content'].strip()}\n" for each in self.messages)
        path.write_text(text, "utf-8")


def _parts(event: str) -> Iterator[ReplyPart | ReplyTimings]:
    """Yields the contents of an event. Raises ServerError for an error event."""
    try:
        chunk = _CHUNK.decode(event)
    except msgspec.MsgspecError as error:
        raise ServerError(f"an event is not a chat completion chunk: {error}") from None
    if chunk.error is not None:
        raise ServerError(without_controls(chunk.error.message))
    for choice in chunk.choices:
        if choice.delta.reasoning_content:
            yield ReplyPart(without_controls(choice.delta.reasoning_content), reasoning=True)
        if choice.delta.content:
            yield ReplyPart(without_controls(choice.delta.content))
    if chunk.timings is not None:
        yield chunk.timings
