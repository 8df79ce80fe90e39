"""Increments of a parsed message. The texts of all increments of one type add up to one field of the message."""

from __future__ import annotations

from msgspec import Struct


class ContentDelta(Struct, frozen=True):
    """Text appended to the content."""

    text: str


class ReasoningDelta(Struct, frozen=True):
    """Text appended to the reasoning."""

    text: str


class ToolCallStart(Struct, frozen=True):
    """The start of a tool call; `index` counts the calls of a message from 0."""

    index: int
    id: str
    name: str


class ArgumentsDelta(Struct, frozen=True):
    """JSON text appended to the arguments of call `index`."""

    index: int
    text: str


MessageDelta = ContentDelta | ReasoningDelta | ToolCallStart | ArgumentsDelta
