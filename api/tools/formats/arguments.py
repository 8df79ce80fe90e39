"""Tool-call arguments in formats that write each argument as bare text between tags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from api.tools.formats.base import MessageParser, Tool
from api.tools.formats.lark_builder import LarkBuilder
from api.tools.formats.text_buffer import Parse, TextBuffer
from api.tools.formats.values import json_string, properties, text_to_json, unsupported_name, value_rule


class ArgumentWriter:
    """Emits the arguments of one call as JSON, each argument once its value is complete.

    The call starts with its first argument, or at its end if it has none. Output that is cut off earlier has no call.
    """

    def __init__(self, parser: MessageParser, name: str) -> None:
        self._parser, self._name = parser, name
        self._schema = parser.calls.schema(name)
        self._count = 0
        self.begun = False
        """True once the call has started."""

    def text(self, key: str, text: str) -> None:
        """Emits an argument written as bare text, converted to JSON by the types of its schema."""
        schemas = self._schema.get("properties")
        self.json(key, text_to_json(text, schemas.get(key) if isinstance(schemas, dict) else None, self._schema))

    def string(self, key: str, text: str) -> None:
        """Emits an argument whose value is the string `text`."""
        self.json(key, json_string(text))

    def json(self, key: str, value: str) -> None:
        """Emits an argument whose value is the JSON text `value`."""
        self._begin()
        self._parser.arguments(f"{', ' if self._count else '{'}{json_string(key)}: {value}")
        self._count += 1

    def close(self) -> None:
        """Emits the end of the arguments."""
        self._begin()
        self._parser.arguments("}" if self._count else "{}")

    def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            self._parser.begin_call(self._name)


def collect_value(buffer: TextBuffer, close: str, ends: Mapping[str, Sequence[str]]) -> Parse[str | None]:
    """Returns the bare value up to its end marker. Returns None if the text ends first.

    `ends` maps each end marker to its followers. A marker ends the value if one of its followers comes next, or if it
    has no followers; otherwise it is a part of the value. The marker `close` is consumed, others stay in the buffer.
    """
    parts: list[str] = []
    while (end := (yield from buffer.until(tuple(ends), parts.append))) is not None:
        buffer.mark(len(end))
        if not ends[end] or (yield from buffer.peek(*ends[end])) is not None:
            if end == close:
                buffer.drop_mark()
            else:
                buffer.rewind()
            return "".join(parts)
        buffer.rewind()
        parts.append(buffer.advance(len(end)))
    return None


def parameter_rules(
    lark: LarkBuilder, tool: Tool, index: int, opening: Callable[[str, Any], str], close: str, forbidden: str = ""
) -> str:
    """Returns the expression of the arguments, in the order of the schema's properties. Optional ones may be absent.

    `opening` returns the text before a value from the property's name and schema. Raises RequestRefused for
    unsupported schemas and for names that contain a character of `forbidden`.
    """
    parts: list[str] = []
    for name, schema, required in properties(tool.parameters, tool.name):
        if set(name) & set(forbidden):
            raise unsupported_name(tool.name, name)
        value = value_rule(
            lark, f"v{index}_{len(parts)}", schema, tool.parameters, close, tool=tool.name, path=f"/properties/{name}"
        )
        parts.append(f"({lark.text(opening(name, schema))} {value}){'' if required else '?'}")
    return " ".join(parts)
