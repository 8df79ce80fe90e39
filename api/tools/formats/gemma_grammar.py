"""The grammar of Gemma's arguments: JSON with bare keys and a token as the quote of strings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from api.tools.formats.lark_builder import LarkBuilder
from api.tools.formats.values import (
    ARRAY_RESTRICTIONS,
    ParameterSchema,
    definition_path,
    enum_values,
    json_types,
    properties,
    refuse_keywords,
    resolved,
    unsupported_name,
    unsupported_schema,
    value_rule,
    with_definitions,
)


class GemmaGrammar:
    """Adds the rules of one tool's arguments to a grammar."""

    def __init__(self, lark: LarkBuilder, quote: str, tool: str, root: ParameterSchema, prefix: str) -> None:
        """`prefix` starts the names of all rules."""
        self._lark, self._quote, self._tool, self._root, self._prefix = lark, quote, tool, root, prefix
        self._count = 0
        self._definitions: dict[str, str] = {}  # rule names by the JSON of a schema with `$ref`

    def object(self, schema: ParameterSchema, path: str = "") -> str:
        """Returns the expression of an object with the schema's properties, at `path` in the tool's parameters. Raises
        RequestRefused for unsupported schemas."""
        members = []
        for key, each, required in properties(schema, self._tool, path):
            if ":" in key:
                raise unsupported_name(self._tool, key)
            value = self._value(each, f"{path}/properties/{key}")
            members.append((f"{self._lark.text(f'{key}:')} {value}", required))
        return f'"{{" {self._lark.members(self._rule_name(), members, ",")} "}}"'

    def _value(self, schema: ParameterSchema, path: str) -> str:
        if "$ref" in schema:
            return self._reference(schema, path)
        if (values := enum_values(schema, self._tool)) is not None:
            return self._lark.any_of([self._lark.text(self._constant(value)) for value in values])
        for name in ("anyOf", "oneOf"):
            if name in schema:
                options = enumerate(self._options(schema[name]))
                return self._lark.any_of([self._value(each, f"{path}/{name}/{at}") for at, each in options])
        kinds = json_types(schema, self._root)
        if not kinds:
            return self._any_value()
        return self._lark.any_of([self._typed(schema, kind, path) for kind in sorted(kinds)])

    def _reference(self, schema: ParameterSchema, path: str) -> str:
        """Returns the rule of a definition. The name is stored before the body exists: definitions may be recursive."""
        key = json.dumps(schema, sort_keys=True)
        if key not in self._definitions:
            definition = resolved(schema, self._root)
            if "$ref" in definition:
                raise unsupported_schema(self._tool, f"{path}/$ref", (f"{path}/$ref",))
            self._definitions[key] = name = self._rule_name()
            self._lark.rule(name, self._value(definition, definition_path(schema, path)))
        return self._definitions[key]

    def _options(self, options: Any) -> list[ParameterSchema]:
        if not isinstance(options, list) or not all(isinstance(option, Mapping) for option in options):
            raise unsupported_schema(self._tool, "an option that is not an object")
        return options

    def _typed(self, schema: ParameterSchema, kind: str, path: str) -> str:
        if kind == "object":
            return self.object(schema, path)
        if kind == "array":
            return self._array(schema, path)
        of_kind = {**schema, "type": kind}
        if kind != "string":
            return self._lark.json(with_definitions(of_kind, self._root))
        quote, name = self._lark.text(self._quote), self._rule_name()
        return f"{quote} {value_rule(self._lark, name, of_kind, {}, self._quote, tool=self._tool, path=path)}"

    def _array(self, schema: ParameterSchema, path: str) -> str:
        refuse_keywords(schema, ARRAY_RESTRICTIONS, self._tool, path)
        items = schema.get("items")
        if not isinstance(items, Mapping):
            items = {}
        item = self._lark.rule(self._rule_name(), self._value(items, f"{path}/items"))
        return f'"[" ({item} ("," {item})*)? "]"'

    def _any_value(self) -> str:
        """Returns the rule of a value of any type."""
        lark, quote = self._lark, self._lark.text(self._quote)
        text = lark.text_until("any_text", self._quote)
        lark.rule("any_member", r'/[\w$-]+/ ":" any_value')
        lark.rule("any_object", '"{" (any_member ("," any_member)*)? "}"')
        lark.rule("any_array", '"[" (any_value ("," any_value)*)? "]"')
        scalar = lark.json({"type": ["number", "boolean", "null"]})
        return lark.rule("any_value", f"{quote} {text} | any_object | any_array | {scalar}")

    def _constant(self, value: Any) -> str:
        return f"{self._quote}{value}{self._quote}" if isinstance(value, str) else json.dumps(value)

    def _rule_name(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"
