"""Arguments that a format writes as bare text, made JSON by the schema's types; and their grammar."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import jiter
import msgspec
from msgspec import Meta, Struct

from api.tools.formats.lark import ANY, Lark
from engine import RequestRefused

Schema = Mapping[str, Any]
Count = Annotated[int, Meta(ge=0, le=2**31)]
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
        return types(_found(ref, root), {})  # what it refers to may refer to itself
    if isinstance(kind := schema.get("type"), str):
        return frozenset((kind, "null")) if schema.get("nullable") is True else frozenset((kind,))
    if isinstance(kind, Sequence):
        return frozenset(map(str, kind))
    for name in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(name), Sequence):
            return frozenset().union(*(types(option, root) for option in options))
    values = _left(schema)
    return frozenset(map(_kind, values)) if isinstance(values, list) else frozenset()


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
            found = written(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return _string(text)
        if not allowed:
            return _string(text)
    kind = _kind(value)
    fits = not allowed or kind in allowed or (kind == "integer" and "number" in allowed)
    return found if fits or "string" not in allowed else _string(text)


def written(value: Any) -> str:
    """A value of Python's as JSON. Raises ValueError or TypeError if it has none.

    >>> written({"a": "\\u00e9"}), written("\\ud83d")
    ('{"a": "é"}', '"\\\\ud83d"')
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which only an escape can say
        return json.dumps(value, allow_nan=False)
    return text


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


def resolved(schema: Schema, root: Schema) -> Schema:
    """The schema with what it refers to in it."""
    found = _found(schema["$ref"], root) if isinstance(schema.get("$ref"), str) else None
    if not isinstance(found, Mapping):
        return schema
    return {**found, **{name: value for name, value in schema.items() if name != "$ref"}}


def _found(ref: str, root: Schema) -> Any:
    value: Any = root
    for name in ref.removeprefix("#/").split("/"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


# ── grammar ──


class Properties(Struct):
    """What is read of an object's schema."""

    properties: dict[str, Any] = {}
    required: list[str] = []


class Limits(Struct):
    """What is read of a text's schema."""

    pattern: str | None = None
    minLength: Count = 0
    maxLength: Count | None = None


Keywords = TypeVar("Keywords", bound=Struct)


def properties(schema: Schema, tool: str) -> list[tuple[str, Schema, bool]]:
    """The properties of an object, each with its schema and whether it is required. Raises RequestRefused for a schema
    that says more about the object than a list of texts can follow."""
    unknown = set(schema) - SILENT - {"properties", "required", "additionalProperties", "$defs", "definitions"}
    if unknown:
        raise refused(tool, f"/{min(unknown)}")
    keywords = _checked(schema, Properties, tool)
    if missing := [name for name in keywords.required if name not in keywords.properties]:
        raise refused(tool, f"/required names {missing[0]!r}, which is not among /properties, and it")
    return [
        (name, each if isinstance(each, Mapping) else {}, name in keywords.required)
        for name, each in keywords.properties.items()
    ]


def _checked(schema: Schema, kind: type[Keywords], tool: str) -> Keywords:
    """The keywords of a schema. Raises RequestRefused for one whose value makes no sense."""
    try:
        return msgspec.convert(schema, kind)
    except msgspec.ValidationError as error:
        raise RequestRefused(f"The parameters of {tool!r} are no JSON schema: {error}", field="tools") from None


def choices(schema: Schema, tool: str) -> list[Any] | None:
    """The values among which `enum` or `const` leaves the choice; None if neither is there. Raises RequestRefused."""
    found = _left(schema)
    if found is not None and not (isinstance(found, list) and found):
        raise refused(tool, "an enum that is no list of values")
    return found


def _left(schema: Schema) -> Any:
    return schema.get("enum", [schema["const"]] if "const" in schema else None)


def with_definitions(schema: Schema, root: Schema) -> Schema:
    """A part of a schema by itself."""
    return {**schema, **{key: root[key] for key in ("$defs", "definitions") if key in root}}


def value_rule(lark: Lark, name: str, schema: Schema, root: Schema, close: str, *, tool: str, path: str) -> str:
    """A rule of a bare value and of `close` after it. Raises RequestRefused for what a text cannot follow; a `format`
    is no more than a remark, as it is by default in JSON Schema."""
    if types(schema, root) != {"string"}:
        return lark.rule(name, f"{lark.json(with_definitions(schema, root))} {lark.text(close)}")
    schema = resolved(schema, root)  # a reference is how pydantic writes an enumeration
    if (values := choices(schema, tool)) is not None:
        return lark.rule(name, lark.any_of([lark.text(f"{value}{close}") for value in values]))
    if unknown := set(schema) - SILENT - {"minLength", "maxLength", "pattern", "format"}:
        raise refused(tool, f"{path}/{min(unknown)}")
    limits = _checked(schema, Limits, tool)
    text = ANY if limits.pattern is None else _pattern(limits.pattern)
    if {"minLength", "maxLength"} & set(schema):
        if limits.pattern is not None:
            raise refused(tool, f"{path}/pattern together with a length")
        text = rf"(.|\n){{{limits.minLength},{'' if limits.maxLength is None else limits.maxLength}}}"
    if text == ANY:
        return lark.before(name, close)
    return lark.rule(name, f"/{text}/ {lark.text(close)}")


_BARE = re.compile(r"\\.|[/\n]", re.DOTALL)
_BETWEEN = {"/": r"\/", "\n": r"\n"}
"""What cannot stand between slashes as it is."""


def _pattern(pattern: str) -> str:
    r"""A regular expression between slashes that matches whole texts, of one that may match anywhere.

    >>> _pattern(r"^a/b\/c$")
    '(a\\/b\\/c)'
    """
    before = "" if pattern.startswith("^") else ANY
    after = "" if pattern.endswith("$") and not pattern.endswith(r"\$") else ANY
    inner = pattern.removeprefix("^") if not before else pattern
    inner = inner.removesuffix("$") if not after else inner
    return before + _BARE.sub(lambda part: _BETWEEN.get(part[0], part[0]), f"({inner})") + after


def refused(tool: str, what: str) -> RequestRefused:
    """What to say if a schema cannot be enforced."""
    return RequestRefused(
        f"The parameters of {tool!r} cannot be enforced in the way this model writes calls: {what} is not supported.",
        field="tools",
    )


def unwritable(tool: str, name: str) -> RequestRefused:
    """The same of a property's name with a sign in it that ends names where the model writes them."""
    return refused(tool, f"a property named {name[:64]!r}")
