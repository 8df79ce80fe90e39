"""What formats share that write each argument by itself, as bare text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from api.tools.formats.base import Parser, Tool
from api.tools.formats.lark import Lark
from api.tools.formats.values import as_json, properties, unwritable, value_rule


class Members:
    """The arguments of one call, told as JSON, each once its value is complete.

    The call itself is told with its first argument or its end, so that one that was cut off before is none.
    """

    def __init__(self, parser: Parser, name: str, id: str = "") -> None:
        self._parser, self._name, self._id = parser, name, id
        self._schema = parser.calls.schema(name)
        self._count = 0
        self.begun = False

    def text(self, key: str, text: str) -> None:
        """An argument as bare text, which becomes what its schema asks for."""
        found = self._schema.get("properties")
        self.json(key, as_json(text, found.get(key) if isinstance(found, dict) else None, self._schema))

    def string(self, key: str, text: str) -> None:
        """An argument that is a text."""
        self.json(key, json.dumps(text, ensure_ascii=False))

    def json(self, key: str, value: str) -> None:
        """An argument that is JSON."""
        self._begin()
        self._parser.arguments(f"{', ' if self._count else '{'}{json.dumps(key, ensure_ascii=False)}: {value}")
        self._count += 1

    def close(self) -> None:
        """There are no more."""
        self._begin()
        self._parser.arguments("}" if self._count else "{}")

    def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            self._parser.begin(self._name, self._id)


def parameter_rules(
    lark: Lark, tool: Tool, index: int, opening: Callable[[str, Any], str], close: str, signs: str = ""
) -> str:
    """The grammar of the arguments in the order of the schema's properties, optional ones perhaps. Raises
    RequestRefused for what cannot be said, such as a name with one of `signs`."""
    parts: list[str] = []
    for name, schema, required in properties(tool.parameters, tool.name):
        if set(name) & set(signs):
            raise unwritable(tool.name, name)
        value = value_rule(
            lark, f"v{index}_{len(parts)}", schema, tool.parameters, close, tool=tool.name, path=f"/properties/{name}"
        )
        parts.append(f"({lark.text(opening(name, schema))} {value}){'' if required else '?'}")
    return " ".join(parts)
