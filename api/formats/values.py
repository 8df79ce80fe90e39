"""Arguments that a format writes as bare text, made JSON by the schema's types; and their grammar."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jiter

from api.formats.lark import ANY, Lark, literal
from engine import RequestRefused

Schema = Mapping[str, Any]
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
SILENT = frozenset(("type", "description", "title", "default", "examples", "deprecated", "nullable", "$schema", "$id"))
"""What says nothing about a text."""


def types(schema: Any, root: Schema) -> frozenset[str]:
    """The JSON types that a value may have; empty if the schema does not say.

    >>> sorted(types({"anyOf": [{"type": "integer"}, {"type": "null"}]}, {}))
    ['integer', 'null']
    """
    if not isinstance(schema, Mapping):
        return frozenset()
    if isinstance(ref := schema.get("$ref"), str):
        return types(_resolved(ref, root), {})  # what it refers to may refer to itself
    if isinstance(kind := schema.get("type"), str):
        return frozenset((kind, "null")) if schema.get("nullable") is True else frozenset((kind,))
    if isinstance(kind, Sequence):
        return frozenset(map(str, kind))
    for name in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(name), Sequence):
            return frozenset().union(*(types(option, root) for option in options))
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return frozenset(_kind(value) for value in values)


def as_json(text: str, schema: Any, root: Schema) -> str:
    """`text` as JSON of a type that the schema allows, if it can be read so; else as a JSON string.

    >>> as_json("True", {"type": "boolean"}, {}), as_json("02139", {"type": "string"}, {}), as_json("7", {}, {})
    ('true', '"02139"', '7')
    """
    allowed = types(schema, root)
    if allowed == {"string"}:
        return _string(text)
    try:
        value, found = jiter.from_json(text.strip().encode(), allow_inf_nan=False), text.strip()
    except ValueError:
        try:
            value = ast.literal_eval(text.strip())
            found = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return _string(text)
        if not allowed:
            return _string(text)
    kind = _kind(value)
    fits = not allowed or kind in allowed or (kind == "integer" and "number" in allowed)
    return found if fits or "string" not in allowed else _string(text)


def raw_json(text: str) -> str:
    """`text` if it is JSON, else as a JSON string."""
    try:
        jiter.from_json(text.strip().encode(), allow_inf_nan=False)
    except ValueError:
        return _string(text)
    return text.strip()


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), "string")


def _resolved(ref: str, root: Schema) -> Any:
    value: Any = root
    for name in ref.removeprefix("#/").split("/"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


# ── grammar ──


def properties(schema: Schema, tool: str) -> list[tuple[str, Schema, bool]]:
    """The properties of an object, each with its schema and whether it is required. Raises RequestRefused for a schema
    that says more about the object than a list of texts can follow."""
    unknown = set(schema) - SILENT - {"properties", "required", "additionalProperties", "$defs", "definitions"}
    if unknown:
        raise refused(tool, f"/{min(unknown)}")
    required = schema.get("required", ())
    found = schema.get("properties", {})
    if missing := [name for name in required if name not in found]:
        raise refused(tool, f"/required names {missing[0]!r}, which is not among /properties, and it")
    return [(name, each if isinstance(each, Mapping) else {}, name in required) for name, each in found.items()]


def with_definitions(schema: Schema, root: Schema) -> Schema:
    """A part of a schema by itself."""
    return {**schema, **{key: root[key] for key in ("$defs", "definitions") if key in root}}


def value_rule(lark: Lark, name: str, schema: Schema, root: Schema, close: str, *, tool: str, key: str) -> str:
    """A rule of a bare value and of `close` after it. Raises RequestRefused for what a text cannot follow."""
    if types(schema, root) != {"string"}:
        return lark.rule(name, f"{lark.json(with_definitions(schema, root))} {lark.text(close)}")
    path = f"/properties/{key}"
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices is not None:
        return lark.rule(name, lark.any_of([lark.text(f"{choice}{close}") for choice in choices]))
    if unknown := set(schema) - SILENT - {"minLength", "maxLength", "pattern"}:
        raise refused(tool, f"{path}/{min(unknown)}")
    text = _pattern(schema["pattern"]) if "pattern" in schema else ANY
    if {"minLength", "maxLength"} & set(schema):
        if "pattern" in schema:
            raise refused(tool, f"{path}/pattern together with a length")
        text = rf"(.|\n){{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}"
    if text == ANY:
        return lark.before(name, close)
    return lark.rule(name, f"/{text}/ {lark.text(close)}")


def _pattern(pattern: str) -> str:
    """A regular expression that matches whole texts, of one that may match anywhere."""
    before = "" if pattern.startswith("^") else ANY
    after = "" if pattern.endswith("$") and not pattern.endswith(r"\$") else ANY
    inner = pattern.removeprefix("^") if not before else pattern
    inner = inner.removesuffix("$") if not after else inner
    return before + f"({inner})".replace("/", literal("/")) + after


def refused(tool: str, what: str) -> RequestRefused:
    """What to say if a schema cannot be enforced."""
    return RequestRefused(
        f"The parameters of {tool!r} cannot be enforced in the way this model writes calls: {what} is not supported.",
        field="tools",
    )
