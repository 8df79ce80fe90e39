"""What a text turns out to be, piece by piece. The pieces of one kind, put together, are a field of the message."""

from __future__ import annotations

from msgspec import Struct


class Content(Struct, frozen=True):
    """More of the answer."""

    text: str


class Reasoning(Struct, frozen=True):
    """More of what the model thinks before it answers."""

    text: str


class Begun(Struct, frozen=True):
    """A call of a tool begins: the `index`-th of the message, from 0."""

    index: int
    id: str
    name: str


class Arguments(Struct, frozen=True):
    """More of a call's arguments, which are JSON."""

    index: int
    text: str


Delta = Content | Reasoning | Begun | Arguments
