"""Argument values that a format writes as bare text: conversion to JSON by the schema's types, and grammars."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

import jiter
import msgspec
from msgspec import Meta, Struct

from api.tools.formats.lark_builder import ANY_TEXT, LarkBuilder
from engine import RequestRefused, resolve_reference

# The JSON schema of a tool's arguments or of a part of them.
ParameterSchema = Mapping[str, Any]

# Keywords that restrict a value of any type, which a notation of bare values cannot enforce.
_COMBINING = frozenset(("allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef", "$recursiveRef"))
_OBJECT_RESTRICTIONS = _COMBINING | {
    *("patternProperties", "minProperties", "maxProperties", "propertyNames", "dependencies", "dependentRequired"),
    *("dependentSchemas", "enum", "const"),
}
ARRAY_RESTRICTIONS = _COMBINING | {
    *("minItems", "maxItems", "prefixItems", "uniqueItems", "contains", "unevaluatedItems"),
}
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def json_types(schema: Any, root: ParameterSchema) -> frozenset[str]:
    """Returns the JSON types that a value may have, or the empty set if the schema does not restrict them.

    >>> sorted(json_types({"anyOf": [{"type": "integer"}, {"type": "null"}]}, {}))
    ['integer', 'null']
    """
    if not isinstance(schema, Mapping):
        return frozenset()
    if isinstance(ref := schema.get("$ref"), str):
        return json_types(resolve_reference(root, ref), {})  # one step only, as definitions may be recursive
    if isinstance(kind := schema.get("type"), str):
        return frozenset((kind, "null")) if schema.get("nullable") is True else frozenset((kind,))
    if isinstance(kind, Sequence):
        return frozenset(map(str, kind))
    for name in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(name), Sequence):
            return frozenset().union(*(json_types(option, root) for option in options))
    values = _enum_keyword(schema)
    return frozenset(map(_type_of, values)) if isinstance(values, list) else frozenset()


def text_to_json(text: str, schema: Any, root: ParameterSchema) -> str:
    """Returns `text` as JSON of a type that the schema permits, otherwise as a JSON string.

    JSON of another type is returned unchanged if the schema does not permit strings either.

    >>> text_to_json("True", {"type": "boolean"}, {}), text_to_json("02139", {"type": "string"}, {})
    ('true', '"02139"')
    >>> text_to_json("7", {}, {})
    '7'
    """
    allowed = json_types(schema, root)
    if allowed == {"string"}:
        return json_string(text)
    try:
        value, found = jiter.from_json(text.strip().encode(), allow_inf_nan=False), text.strip()
    except ValueError:
        try:
            value = ast.literal_eval(text.strip())
            found = to_json(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return json_string(text)
        if not allowed:
            return json_string(text)
    kind = _type_of(value)
    fits = not allowed or kind in allowed or (kind == "integer" and "number" in allowed)
    return found if fits or "string" not in allowed else json_string(text)


def to_json(value: Any) -> str:
    """Returns a Python value as JSON. Raises ValueError or TypeError for a value without a JSON form.

    >>> to_json({"a": "\\u00e9"}), to_json("\\ud83d")
    ('{"a": "é"}', '"\\\\ud83d"')
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can express
        return json.dumps(value, allow_nan=False)
    return text


def json_or_string(text: str) -> str:
    """Returns `text`, stripped of white space, if it is JSON. Returns `text` as a JSON string otherwise."""
    try:
        jiter.from_json(text.strip().encode(), allow_inf_nan=False)
    except ValueError:
        return json_string(text)
    return text.strip()


def json_string(text: str) -> str:
    """Returns `text` as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _type_of(value: Any) -> str:
    return "null" if value is None else _JSON_TYPES.get(type(value), "string")


def resolved(schema: ParameterSchema, root: ParameterSchema) -> ParameterSchema:
    """Returns the schema with its `$ref` replaced by the definition, unchanged if there is no definition."""
    found = resolve_reference(root, schema.get("$ref"))
    if not isinstance(found, Mapping):
        return schema
    return {**found, **{name: value for name, value in schema.items() if name != "$ref"}}


# ── grammars ──

_Length = Annotated[int, Meta(ge=0, le=2**31)]


class _ObjectKeywords(Struct):
    """The supported keywords of an object's schema."""

    properties: dict[str, Any] = {}
    required: list[str] = []


class _StringKeywords(Struct):
    """The supported keywords of a string's schema."""

    pattern: str | None = None
    minLength: _Length = 0
    maxLength: _Length | None = None


_Keywords = TypeVar("_Keywords", bound=Struct)


def properties(schema: ParameterSchema, tool: str, path: str = "") -> list[tuple[str, ParameterSchema, bool]]:
    """Returns the name, the schema and the requiredness of each property of the object at `path`, those that are only
    required last, without those that permit no value. Raises RequestRefused for keywords that a list of properties
    cannot enforce."""
    refuse_keywords(schema, _OBJECT_RESTRICTIONS, tool, path)
    keywords = _decoded(schema, _ObjectKeywords, tool)
    schemas, required = keywords.properties, dict.fromkeys(keywords.required)
    names = [*schemas, *(name for name in required if name not in schemas)]
    return [
        (name, each if isinstance(each := schemas.get(name), Mapping) else {}, name in required)
        for name in names
        if schemas.get(name) not in (False, {"not": {}})
    ]


def refuse_keywords(schema: ParameterSchema, restricting: frozenset[str], tool: str, path: str) -> None:
    """Raises UnsupportedNotation for the keywords of `schema`, the schema at `path`, that are in `restricting`."""
    if found := sorted(restricting.intersection(schema)):
        pointers = tuple(f"{path}/{name}" for name in found)
        raise unsupported_schema(tool, pointers[0], pointers)


def _decoded(schema: ParameterSchema, kind: type[_Keywords], tool: str) -> _Keywords:
    """Returns the keywords of a schema. Raises RequestRefused for a keyword with an invalid value."""
    try:
        return msgspec.convert(schema, kind)
    except msgspec.ValidationError as error:
        raise RequestRefused(
            f"The parameters of {tool!r} are not a valid JSON schema: {error}.", field="tools"
        ) from None


def enum_values(schema: ParameterSchema, tool: str) -> list[Any] | None:
    """Returns the values that `enum` or `const` permits. Returns None if the schema has neither. Raises RequestRefused
    for an invalid `enum`."""
    found = _enum_keyword(schema)
    if found is not None and not (isinstance(found, list) and found):
        raise unsupported_schema(tool, "an enum that is not a list of values")
    return found


def _enum_keyword(schema: ParameterSchema) -> Any:
    return schema.get("enum", [schema["const"]] if "const" in schema else None)


def with_definitions(schema: ParameterSchema, root: ParameterSchema) -> ParameterSchema:
    """Returns `schema`, a part of `root`, with the definitions of `root`."""
    return {**schema, **{key: root[key] for key in ("$defs", "definitions") if key in root}}


def value_rule(
    lark: LarkBuilder,
    name: str,
    schema: ParameterSchema,
    root: ParameterSchema,
    close: str,
    *,
    tool: str,
    path: str,
) -> str:
    """Adds the rule of a bare value followed by `close`. Raises RequestRefused for unsupported keywords at `path`.

    `format` is ignored, as JSON Schema permits.
    """
    if json_types(schema, root) != {"string"}:
        return lark.rule(name, f"{lark.json(with_definitions(schema, root))} {lark.text(close)}")
    path = definition_path(schema, path)
    schema = resolved(schema, root)  # pydantic represents enumerations as references
    if (values := enum_values(schema, tool)) is not None:
        return lark.rule(name, lark.any_of([lark.text(f"{value}{close}") for value in values]))
    refuse_keywords(schema, _COMBINING, tool, path)
    keywords = _decoded(schema, _StringKeywords, tool)
    texts = [] if keywords.pattern is None else [_whole_match(keywords.pattern)]
    if {"minLength", "maxLength"} & set(schema):
        texts.append(rf"(.|\n){{{keywords.minLength},{'' if keywords.maxLength is None else keywords.maxLength}}}")
    if not texts:
        return lark.text_until(name, close)
    text = f"/{texts[0]}/"
    if len(texts) > 1:
        text = lark.rule(f"{name.upper()}_TEXT", " & ".join(f"/{each}/" for each in texts))
    return lark.rule(name, f"{text} {lark.text(close)}")


# An escaped character, which is kept, or a character that needs an escape between slashes.
_UNESCAPED = re.compile(r"\\.|[/\n]", re.DOTALL)
_ESCAPES = {"/": r"\/", "\n": r"\n"}


def _whole_match(pattern: str) -> str:
    r"""Returns the regular expression, for use between slashes, of all texts that contain a match of `pattern`.

    >>> _whole_match(r"^a/b\/c$")
    '(a\\/b\\/c)'
    """
    before = "" if pattern.startswith("^") else ANY_TEXT
    after = "" if pattern.endswith("$") and not pattern.endswith(r"\$") else ANY_TEXT
    inner = pattern.removeprefix("^") if not before else pattern
    inner = inner.removesuffix("$") if not after else inner
    return before + _UNESCAPED.sub(lambda part: _ESCAPES.get(part[0], part[0]), f"({inner})") + after


def definition_path(schema: ParameterSchema, path: str) -> str:
    """Returns the JSON pointer of the definition to which `schema` refers; `path` if it refers to none."""
    reference = schema.get("$ref")
    return unquote(reference[1:]) if isinstance(reference, str) and reference.startswith("#") else path


class UnsupportedNotation(RequestRefused):
    """A tool's schema cannot be enforced in the notation of the model's calls."""

    def __init__(self, message: str, tool: str, pointers: tuple[str, ...]) -> None:
        """`pointers` are those of the keywords that the notation cannot express, if there are any."""
        super().__init__(message, field="tools")
        self.tool = tool
        self.pointers = pointers


def unsupported_schema(tool: str, feature: str, pointers: tuple[str, ...] = ()) -> UnsupportedNotation:
    """Returns the error for a schema that the grammar cannot enforce because of the keywords at `pointers`."""
    return UnsupportedNotation(
        f"The parameters of {tool!r} cannot be enforced in the notation in which this model writes calls: {feature} is "
        "not supported.",
        tool,
        pointers,
    )


def unsupported_name(tool: str, name: str) -> UnsupportedNotation:
    """Returns the error for a property whose name contains a character that ends names in the notation."""
    return unsupported_schema(tool, f"a property named {name[:64]!r}")
