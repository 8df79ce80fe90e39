"""The grammar of Gemma's notation: JSON with bare keys, and strings between quotes of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from api.formats.lark import Lark
from api.formats.values import SILENT, Schema, choices, properties, refused, types, with_definitions


class Notation:
    """Writes the rules of one tool's arguments."""

    def __init__(self, lark: Lark, quote: str, tool: str, root: Schema, prefix: str) -> None:
        self._lark, self._quote, self._tool, self._root, self._prefix = lark, quote, tool, root, prefix
        self._count = 0

    def object(self, schema: Schema) -> str:
        """The expression of an object with the schema's properties. Raises RequestRefused for what cannot be said."""
        members = [
            (f"{self._lark.text(f'{key}:')} {self.value(each)}", required)
            for key, each, required in properties(schema, self._tool)
        ]
        return f'"{{" {self._lark.members(self._name(), members, ",")} "}}"'

    def value(self, schema: Schema) -> str:
        """The same of any value."""
        if (values := choices(schema, self._tool)) is not None:
            return self._lark.any_of([self._lark.text(self._constant(value)) for value in values])
        for name in ("anyOf", "oneOf"):
            if name in schema:
                return self._lark.any_of([self.value(option) for option in self._options(schema[name])])
        kinds = types(schema, self._root)
        if not kinds or "$ref" in schema:
            raise refused(self._tool, f"{'$ref' if '$ref' in schema else 'a value of any type'}")
        return self._lark.any_of([self._typed(schema, kind) for kind in sorted(kinds)])

    def _options(self, options: Any) -> list[Schema]:
        if not isinstance(options, list) or not all(isinstance(option, Mapping) for option in options):
            raise refused(self._tool, "an option that is no object")
        return options

    def _typed(self, schema: Schema, kind: str) -> str:
        if kind == "object":
            return self.object(schema)
        if kind == "array":
            return self._array(schema)
        if kind != "string":
            return self._lark.json(with_definitions({**schema, "type": kind}, self._root))
        if unknown := set(schema) - SILENT:
            raise refused(self._tool, min(unknown))
        return f"{self._lark.text(self._quote)} {self._lark.before('quoted', self._quote)}"

    def _array(self, schema: Schema) -> str:
        if unknown := set(schema) - SILENT - {"items"}:
            raise refused(self._tool, min(unknown))
        items = schema.get("items")
        if not isinstance(items, Mapping):
            raise refused(self._tool, "an array without items")
        item = self._lark.rule(self._name(), self.value(items))
        return f'"[" ({item} ("," {item})*)? "]"'

    def _constant(self, value: Any) -> str:
        return f"{self._quote}{value}{self._quote}" if isinstance(value, str) else json.dumps(value)

    def _name(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"
