"""Calls that are a JSON object of a name and arguments, in whatever order."""

from __future__ import annotations

import json

import jiter

from api.formats.base import Parser, Tool
from api.formats.lark import Lark
from api.formats.source import Reading

ARGUMENTS = ("arguments", "parameters")
"""Under which of these the arguments may be."""


def read_object(parser: Parser, *, known: bool = False, id: str = "") -> Reading[bool]:
    """Reads the object of a call and tells it; False if it is none. With `known` the tool must be one that there is."""
    return (yield from _Object(parser, known, id).read())


class _Object:
    """One object. Arguments that come before the name wait for it."""

    def __init__(self, parser: Parser, known: bool, id: str) -> None:
        self._parser, self._known, self._id = parser, known, id
        self._name: str | None = None
        self._waiting: str | None = None
        self._told = False

    def read(self) -> Reading[bool]:
        source = self._parser.source
        if not (yield from source.takes("{")):
            return False
        while True:
            sign = yield from source.takes("}", ",", '"')
            if sign == '"':
                if not (yield from self._member()):
                    return self._name is not None
            elif sign == "}":
                return self._end()
            elif sign is None:
                return self._name is not None

    def _member(self) -> Reading[bool]:
        """Reads a name, of which the quote is read, and its value. False if that cannot be."""
        source = self._parser.source
        key, end = yield from source.collect(('"',))
        if end is None or not (yield from source.takes(":")):
            return False
        if key in ARGUMENTS and self._name is not None and (yield from source.sees("{")):
            self._told = True
            return (yield from source.value(self._parser.arguments))
        parts: list[str] = []
        if not (yield from source.value(parts.append)):
            return False
        text = "".join(parts)
        if key == "name" and self._name is None:
            return self._begin(text)
        if key in ARGUMENTS:
            self._waiting = _decoded(text)
            self._flush()
        return True

    def _begin(self, text: str) -> bool:
        name = _parsed(text)
        if not isinstance(name, str) or not name or (self._known and name not in self._parser.calls):
            return False
        self._name = name
        self._parser.begin(name, self._id)
        self._flush()
        return True

    def _flush(self) -> None:
        if self._name is not None and self._waiting is not None and not self._told:
            self._told = True
            self._parser.arguments(self._waiting)

    def _end(self) -> bool:
        if self._name is None:
            return False
        self._waiting = self._waiting or "{}"
        self._flush()
        return True


def _parsed(text: str) -> object:
    try:
        return jiter.from_json(text.encode(), allow_inf_nan=False)
    except ValueError:
        return None


def _decoded(text: str) -> str:
    """Arguments, out of a JSON string if a model wrapped them in one."""
    value = _parsed(text)
    return value if isinstance(value, str) and isinstance(_parsed(value), dict) else text


def object_body(lark: Lark, tool: Tool, arguments: str = "arguments") -> str:
    """The grammar of a call's object."""
    head = lark.text(f'{{"name": {json.dumps(tool.name)}, "{arguments}": ')
    return f'{head} {lark.json(tool.parameters)} "}}"'
