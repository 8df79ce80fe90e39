"""Converts the deltas of a parsed message to the content blocks of a whole reply, and to the events of a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import groupby
from typing import Any

import jiter

from api.anthropic.messages_schema import (
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    InputJSONDelta,
    MessageEvent,
    ReplyBlock,
    SignatureDelta,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from api.tools.formats import ContentDelta, MessageDelta, ReasoningDelta, ToolCallStart

# Successive deltas with equal keys belong to one block. The key of a tool call is its index.
_BlockKey = int | type[ContentDelta] | type[ReasoningDelta]


def content_blocks(deltas: Iterable[MessageDelta], *, shows_thinking: bool) -> list[ReplyBlock]:
    """Returns the content of a whole reply. Without `shows_thinking` the texts of thinking blocks are empty."""
    return [_whole_block(key, list(group), shows_thinking) for key, group in groupby(deltas, _block_key)]


def _whole_block(key: _BlockKey, deltas: Sequence[MessageDelta], shows_thinking: bool) -> ReplyBlock:
    text = _joined_text(deltas)
    if key is ContentDelta:
        return TextBlock(text)
    if key is ReasoningDelta:
        return ThinkingBlock(text if shows_thinking else "", _signature(text))
    start = deltas[0]
    assert isinstance(start, ToolCallStart)
    return ToolUseBlock(start.id, start.name, _tool_input(text))


class BlockEvents:
    """Produces the events of a stream's content blocks."""

    def __init__(self, *, shows_thinking: bool) -> None:
        """Without `shows_thinking` thinking blocks have no text."""
        self._shows_thinking = shows_thinking
        self._index = -1
        self._key: _BlockKey | None = None  # of the block that is open
        self._thinking = ""

    def feed(self, deltas: Iterable[MessageDelta]) -> Iterator[MessageEvent]:
        """Yields the events of further deltas of the message."""
        for key, group in groupby(deltas, _block_key):
            step = list(group)
            if key != self._key:
                yield from self.finish()
                self._key, self._index = key, self._index + 1
                yield ContentBlockStart(self._index, _empty_block(step[0]))
            yield from self._increment(_joined_text(step))

    def _increment(self, text: str) -> Iterator[MessageEvent]:
        if self._key is ContentDelta:
            yield ContentBlockDelta(self._index, TextDelta(text))
        elif self._key is not ReasoningDelta:
            if text:
                yield ContentBlockDelta(self._index, InputJSONDelta(text))
        else:
            self._thinking += text
            if self._shows_thinking:
                yield ContentBlockDelta(self._index, ThinkingDelta(text))

    def finish(self) -> Iterator[MessageEvent]:
        """Yields the events that end the open block, if there is one."""
        if self._key is None:
            return
        if self._key is ReasoningDelta:
            yield ContentBlockDelta(self._index, SignatureDelta(_signature(self._thinking)))
            self._thinking = ""
        self._key = None
        yield ContentBlockStop(self._index)


def _block_key(delta: MessageDelta) -> _BlockKey:
    match delta:
        case ContentDelta() | ReasoningDelta():
            return type(delta)
    return delta.index


def _joined_text(deltas: Iterable[MessageDelta]) -> str:
    return "".join(delta.text for delta in deltas if not isinstance(delta, ToolCallStart))


def _empty_block(delta: MessageDelta) -> ReplyBlock:
    """Returns the block that begins with `delta`, without its text."""
    match delta:
        case ContentDelta():
            return TextBlock("")
        case ReasoningDelta():
            return ThinkingBlock("", "")
        case ToolCallStart():
            return ToolUseBlock(delta.id, delta.name, {})
    raise AssertionError("the arguments of a call follow its start")


def _signature(thinking: str) -> str:
    """Returns a digest of the reasoning. Clients drop thinking blocks without a signature; requests may have any."""
    return blake2b(thinking.encode(), digest_size=16).hexdigest()


def _tool_input(arguments: str) -> dict[str, Any]:
    """Returns the arguments of a call. Of arguments cut by the token limit, the part before the cut is returned."""
    try:
        value = jiter.from_json(arguments.encode() or b"{}", partial_mode="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
