"""JSON schemas in the forms that clients send: those of pydantic 2, of zod 4 and of MCP servers.

Each property of `PYDANTIC`, `ZOD` and `MCP` has the keywords that the library or that servers write for one type. They
are put into objects, definitions and lists as these clients do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_LETTERS = ["a", "b"]


def _text(**keywords: Any) -> dict[str, Any]:
    return {"type": "string", **keywords}


def _cat_or_dog(**keywords: Any) -> dict[str, Any]:
    cat, dog = (
        {"type": "object", "properties": {"kind": _text(const=kind), "size": {"type": "number"}}, "required": ["kind"]}
        for kind in ("cat", "dog")
    )
    return {"oneOf": [cat, dog], **keywords}


PYDANTIC: dict[str, Any] = {
    "set": {"items": _text(), "title": "Tags", "type": "array", "uniqueItems": True},
    "frozenset": {"items": {"type": "integer"}, "type": "array", "uniqueItems": True, "minItems": 1},
    "optional": {"anyOf": [_text(), {"type": "null"}], "default": None, "title": "Name"},
    "path": _text(format="path"),
    "file_path": _text(format="file-path"),
    "directory": _text(format="directory-path"),
    "any_url": _text(format="uri", minLength=1),
    "http_url": _text(format="uri", maxLength=2083, minLength=1),
    "dsn": _text(format="multi-host-uri", minLength=1),
    "secret": _text(format="password", writeOnly=True),
    "bytes": _text(format="binary"),
    "base64": _text(format="base64url"),
    "decimal": {"anyOf": [{"type": "number"}, _text(pattern=r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$")]},
    "datetime": _text(format="date-time"),
    "timedelta": _text(format="duration"),
    "uuid4": _text(format="uuid4"),
    "network": _text(format="ipv4network"),
    "address": _text(format="ipvanyaddress"),
    "email": _text(format="email"),
    "name_email": _text(format="name-email"),
    "regex": _text(format="regex"),
    "color": _text(format="color"),
    "json": _text(contentMediaType="application/json", contentSchema={"type": "object"}),
    "literal": _text(const="a"),
    "enum": _text(enum=_LETTERS),
    "map": {"additionalProperties": {"type": "integer"}, "type": "object"},
    "enum_map": {"additionalProperties": {"type": "integer"}, "propertyNames": {"enum": _LETTERS}, "type": "object"},
    "full_map": {"additionalProperties": True, "minProperties": 1, "type": "object"},
    "pattern_map": {"patternProperties": {"^[a-z]+$": {"type": "integer"}}, "type": "object"},
    "tuple": {"maxItems": 2, "minItems": 2, "prefixItems": [{"type": "integer"}, _text()], "type": "array"},
    "tagged": _cat_or_dog(discriminator={"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat"}}),
    "union": {"anyOf": [{"type": "integer"}, _text(), {"items": _text(), "type": "array", "uniqueItems": True}]},
    "positive": {"exclusiveMinimum": 0, "multipleOf": 5, "type": "integer"},
    "any": {"title": "Anything"},
}

ZOD: dict[str, Any] = {
    "email": _text(
        format="email", pattern=r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9-]*\.)+[A-Za-z]{2,}$"
    ),
    "url": _text(format="uri"),
    "uuid": _text(format="uuid", pattern="^([0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12})$"),
    "base64": _text(format="base64", contentEncoding="base64", pattern="^$|^(?:[0-9a-zA-Z+/]{4})*$"),
    "jwt": _text(format="jwt"),
    "e164": _text(format="e164", pattern=r"^\+(?:[0-9]){6,14}[0-9]$"),
    "cidrv4": _text(format="cidrv4"),
    "cidrv6": _text(format="cidrv6"),
    "nanoid": _text(format="nanoid", pattern="^[a-zA-Z0-9_-]{21}$"),
    "cuid2": _text(format="cuid2", pattern="^[0-9a-z]+$"),
    "ulid": _text(format="ulid", pattern="^[0-9A-HJKMNP-TV-Za-hjkmnp-tv-z]{26}$"),
    "emoji": _text(format="emoji", pattern=r"^(\p{Extended_Pictographic}|\p{Emoji_Component})+$"),
    "regex": _text(format="regex", pattern="^[A-Z]{3}$"),
    "parts": _text(allOf=[{"pattern": "^a.*"}, {"pattern": ".*z$"}]),
    "date": _text(format="date", pattern=r"^\d{4}-\d{2}-\d{2}$"),
    "int": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
    "record": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "number"}},
    "enum_record": {
        "type": "object",
        "propertyNames": {"type": "string", "enum": _LETTERS},
        "required": _LETTERS,
        "additionalProperties": {"type": "number"},
    },
    "regex_record": {
        "type": "object",
        "propertyNames": {"type": "string", "pattern": "^k_"},
        "additionalProperties": {},
    },
    "tuple": {"type": "array", "prefixItems": [_text(), {"type": "number"}], "items": {"type": "boolean"}},
    "never": {"not": {}},
    "literals": {"enum": ["a", 1, None, True]},
    "nullable": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    "tagged": _cat_or_dog(),
    "either": {"oneOf": [_text(), _text(minLength=3), {"type": "number"}]},
    "intersection": {
        "allOf": [
            {"type": "object", "properties": {"a": _text()}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "number"}}, "required": ["b"]},
        ]
    },
    "loose": {"type": "object", "properties": {"a": _text()}, "required": ["a"], "additionalProperties": {}},
    "recursive": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1},
    "file": _text(format="binary", contentEncoding="binary", minLength=1),
    "default": {"default": "x", "type": "string"},
}

MCP: dict[str, Any] = {
    "tuple": {"type": "array", "items": [_text(), {"type": "number"}], "additionalItems": False, "minItems": 2},
    "labels": {"type": "array", "items": _text(), "uniqueItems": True, "default": []},
    "ordered": {"type": "array", "items": _text(), "uniqueItems": False},
    "one": {"type": "array", "items": _text(), "uniqueItems": True, "maxItems": 1},
    "nulls": {"type": "string", "format": None, "pattern": None, "enum": None, "minLength": None, "description": None},
    "empty_format": _text(format=""),
    "url": _text(format="url"),
    "reference": _text(format="uri-reference"),
    "textarea": _text(format="textarea", **{"x-order": 3}),
    "byte": _text(format="byte"),
    "int64": {"type": "integer", "format": "int64"},
    "double": {"type": "number", "format": "double"},
    "nullable": _text(nullable=True),
    "several": {"type": ["string", "number", "null"]},
    "any": {"description": "anything", "deprecated": True, "readOnly": True},
    "object": {"type": "object", "properties": {}, "additionalProperties": True},
    "either": {
        "type": "object",
        "properties": {"id": _text(), "name": _text()},
        "anyOf": [{"required": ["id"]}, {"required": ["name"]}],
    },
    "one_of": {
        "type": "object",
        "properties": {"id": _text(), "name": _text()},
        "oneOf": [{"required": ["id"]}, {"required": ["name"]}],
    },
    "conditional": {
        "type": "object",
        "properties": {"kind": _text(enum=["file", "text"]), "path": _text()},
        "if": {"properties": {"kind": {"const": "file"}}},
        "then": {"required": ["path"]},
    },
    "conditionals": {
        "type": "object",
        "properties": {"kind": _text(), "path": _text()},
        "allOf": [{"if": {"required": ["kind"]}, "then": {"required": ["path"]}, "else": {}}],
    },
    "dependent": {"type": "object", "properties": {"a": _text(), "b": _text()}, "dependentRequired": {"a": ["b"]}},
    "no_dependencies": {"type": "object", "properties": {"a": _text()}, "dependencies": {}},
    "dependencies": {"type": "object", "properties": {"a": _text(), "b": _text()}, "dependencies": {"b": ["a"]}},
    "contains": {"type": "array", "items": _text(), "contains": {"const": "a"}, "minContains": 1},
    "not_null": {"not": {"type": "null"}},
    "not_empty": _text(**{"not": {"const": ""}}),
    "unevaluated": {"type": "object", "properties": {"a": _text()}, "unevaluatedProperties": False},
    "all_names": {"type": "object", "propertyNames": True, "unevaluatedProperties": True},
    "short_names": {"type": "object", "propertyNames": {"maxLength": 8}, "additionalProperties": _text()},
    "few": {"type": "object", "properties": {"a": _text(), "b": _text()}, "minProperties": 1, "maxProperties": 2},
    "required_flag": _text(required=True),
    "python_type": {"type": "str"},
    "any_type": {"type": "any"},
    "draft4": {"type": "number", "minimum": 0, "exclusiveMinimum": True},
    "look_behind": _text(pattern="(?<!/)$"),
    "remote": {"$ref": "https://example.org/schemas/point.json"},
    "hour": {"type": "integer", "minimum": 0, "maximum": 23, "examples": [7], "default": None},
    "wrong_enum": {"type": "integer", "enum": ["1", "2"]},
}

_DRAFTS = {
    "pydantic": {},
    "zod": {"$schema": "https://json-schema.org/draft/2020-12/schema"},
    "mcp": {"$schema": "https://json-schema.org/draft-07/schema#"},
}


def client_schemas() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields more than 200 object schemas, each with a name."""
    for source, properties in (("pydantic", PYDANTIC), ("zod", ZOD), ("mcp", MCP)):
        head = _DRAFTS[source]
        for name, value in properties.items():
            record = {"type": "object", "properties": {name: value, "note": _text()}, "required": [name]}
            item = {"$ref": "#/$defs/Item"}
            yield f"{source} {name}", {**head, **record, "title": name.title()}
            definitions = {"Item": {**record, "additionalProperties": False}}
            yield (
                f"{source} {name} in a definition",
                {**head, "type": "object", "properties": {"item": item}, "required": ["item"], "$defs": definitions},
            )
            many = {"type": "array", "items": {"anyOf": [item, {"type": "null"}]}, "maxItems": 3}
            yield (
                f"{source} {name} in a list",
                {**head, "type": "object", "properties": {"items": many}, "$defs": definitions},
            )
