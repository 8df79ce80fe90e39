"""The grammar of Gemma's notation: JSON with bare keys, and strings between quotes of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from api.tools.formats.lark import Lark
from api.tools.formats.values import (
    SILENT,
    Schema,
    choices,
    properties,
    refused,
    resolved,
    types,
    unwritable,
    value_rule,
    with_definitions,
)


class Notation:
    """Writes the rules of one tool's arguments."""

    def __init__(self, lark: Lark, quote: str, tool: str, root: Schema, prefix: str) -> None:
        self._lark, self._quote, self._tool, self._root, self._prefix = lark, quote, tool, root, prefix
        self._count = 0
        self._known: dict[str, str] = {}  # rules of what is referred to

    def object(self, schema: Schema, path: str = "") -> str:
        """The expression of an object with the schema's properties. Raises RequestRefused for what cannot be said."""
        members = []
        for key, each, required in properties(schema, self._tool):
            if ":" in key:
                raise unwritable(self._tool, key)
            value = self.value(each, f"{path}/properties/{key}")
            members.append((f"{self._lark.text(f'{key}:')} {value}", required))
        return f'"{{" {self._lark.members(self._name(), members, ",")} "}}"'

    def value(self, schema: Schema, path: str) -> str:
        """The same of any value."""
        if "$ref" in schema:
            return self._referred(schema, path)
        if (values := choices(schema, self._tool)) is not None:
            return self._lark.any_of([self._lark.text(self._constant(value)) for value in values])
        for name in ("anyOf", "oneOf"):
            if name in schema:
                return self._lark.any_of([self.value(each, path) for each in self._options(schema[name])])
        kinds = types(schema, self._root)
        if not kinds:
            raise refused(self._tool, f"{path}, a value of any type,")
        return self._lark.any_of([self._typed(schema, kind, path) for kind in sorted(kinds)])

    def _referred(self, schema: Schema, path: str) -> str:
        """A rule for each thing that is referred to, which may refer to itself."""
        key = json.dumps(schema, sort_keys=True)
        if key not in self._known:
            made = resolved(schema, self._root)
            if "$ref" in made:
                raise refused(self._tool, f"{path}/$ref")
            self._known[key] = name = self._name()
            self._lark.rule(name, self.value(made, path))
        return self._known[key]

    def _options(self, options: Any) -> list[Schema]:
        if not isinstance(options, list) or not all(isinstance(option, Mapping) for option in options):
            raise refused(self._tool, "an option that is no object")
        return options

    def _typed(self, schema: Schema, kind: str, path: str) -> str:
        if kind == "object":
            return self.object(schema, path)
        if kind == "array":
            return self._array(schema, path)
        alone = {**schema, "type": kind}
        if kind != "string":
            return self._lark.json(with_definitions(alone, self._root))
        quote, name = self._lark.text(self._quote), self._name()
        return f"{quote} {value_rule(self._lark, name, alone, {}, self._quote, tool=self._tool, path=path)}"

    def _array(self, schema: Schema, path: str) -> str:
        if unknown := set(schema) - SILENT - {"items"}:
            raise refused(self._tool, f"{path}/{min(unknown)}")
        items = schema.get("items")
        if not isinstance(items, Mapping):
            raise refused(self._tool, f"{path}, an array without items,")
        item = self._lark.rule(self._name(), self.value(items, f"{path}/items"))
        return f'"[" ({item} ("," {item})*)? "]"'

    def _constant(self, value: Any) -> str:
        return f"{self._quote}{value}{self._quote}" if isinstance(value, str) else json.dumps(value)

    def _name(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"
