"""Keywords are judged by their effect: those without one are ignored, and without strict the others that no grammar
follows are listed while the rest is enforced."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.client_schemas import client_schemas
from engine.grammar import GrammarError, JsonSchema, Lark, relax_schema
from engine.grammar.relax import ENFORCED_FORMATS, rewritten, simplified
from tests.engine.test_grammar import permitted, schema
from tests.engine.vocabularies import ASCII, grammar


def lenient(value: Any) -> JsonSchema:
    return JsonSchema(json.dumps(value).encode(), strict=False)


def permits(spec: Any, text: str) -> bool:
    """Returns True if the masks permit `text` as a whole output."""
    matcher = grammar(spec).begin()
    for token in ASCII.tokenize(text, special=False):
        if token not in permitted(matcher):
            return False
        matcher.accept_token(token)
    return matcher.complete or bool(ASCII.ends & permitted(matcher))


FORMATS = ("path", "url", "password", "byte", "uri-reference", "regex", "base64", "cidrv4", "jwt", "e164", "")


@pytest.mark.parametrize(
    "part",
    [
        *({"type": "string", "format": name} for name in FORMATS),
        {"type": "object", "propertyNames": {"type": "string"}},
        {"type": "object", "propertyNames": {}},
        {"type": "object", "propertyNames": True},
        {"type": "array", "uniqueItems": False},
        {"type": "array", "uniqueItems": True, "maxItems": 1},
        {"type": "array", "contains": {}, "minItems": 1},
        {"type": "array", "minContains": 2},
        {"type": "string", "not": False},
        {"type": "string", "not": {"not": {}}},
        {"type": "string", "if": {"minLength": 3}},
        {"type": "string", "then": {"minLength": 3}},
        {"type": "object", "dependencies": {}},
        {"type": "object", "dependentRequired": {"a": []}},
        {"type": "object", "unevaluatedProperties": True},
        {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a"], "minProperties": 1},
        {"type": "string", "$schema": "https://json-schema.org/draft-07/schema#"},
        {"type": "string", "format": None, "pattern": None, "enum": None, "minLength": None, "not": None},
    ],
    ids=json.dumps,
)
def test_keywords_without_effect_are_ignored(part: Any) -> None:
    """Also with strict, in a definition and in a schema that a Lark grammar contains."""
    assert permits(
        schema({"$ref": "#/$defs/a", "$defs": {"a": part}}), {"s": '"x"', "a": "[1]", "o": '{"a":1}'}[part["type"][0]]
    )
    grammar(Lark(f"start: %json {json.dumps(part)}"))
    assert relax_schema(part, strict=False).unenforced == ()


@pytest.mark.parametrize("name", sorted(ENFORCED_FORMATS - {"unknown"}))
def test_known_formats_are_enforced(name: str) -> None:
    assert not permits(schema({"type": "string", "format": name}), '"no / !"')


@pytest.mark.parametrize(
    ("part", "valid", "invalid"),
    [
        ({"properties": {"a": {"not": {}}, "b": {}}, "type": "object"}, '{"b":1}', '{"a":1}'),
        ({"not": {"type": "null"}}, "1", "null"),
        ({"type": ["string", "null"], "not": {"type": "null"}}, '"a"', "null"),
        (
            {"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": {"type": "null"}},
            '{"a":null}',
            '{"b":null}',
        ),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, '{"ab":1}', '{"b":1}'),
        ({"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}, '{"a":1}', '{"b":1}'),
        ({"const": None}, "null", "1"),
    ],
    ids=json.dumps,
)
def test_keywords_that_others_express_are_enforced(part: Any, valid: str, invalid: str) -> None:
    for spec in (schema(part), lenient(part), Lark(f"start: %json {json.dumps(part)}")):
        assert permits(spec, valid)
        assert not permits(spec, invalid)


@pytest.mark.parametrize(
    ("part", "unenforced", "valid", "invalid"),
    [
        ({"type": "array", "uniqueItems": True, "items": {"type": "null"}}, ["/uniqueItems"], "[null,null]", "[1]"),
        ({"type": "string", "maxLength": 1, "not": {"const": "a"}}, ["/not"], '"a"', '"aa"'),
        ({"type": "string", "if": {"minLength": 2}, "then": False, "else": True}, ["/if"], '"aa"', "1"),
        ({"type": "array", "contains": {"const": 1}}, ["/contains"], "[2]", "{}"),
        ({"type": "array", "maxItems": 1, "items": {"pattern": "(?=a)"}}, ["/items/pattern"], '["b"]', "[1,1]"),
        ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 3}]}, ["/oneOf"], "4", '"a"'),
        ({"type": "integer", "multipleOf": 999_999_937}, ["/multipleOf"], "1", "1.5"),
        ({"type": "strng", "enum": ["a", 1]}, ["/type"], "1", "2"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"uniqueItems": True, "type": "array"}}},
            ["/$defs/a/uniqueItems"],
            "[]",
            "1",
        ),
        ({"type": "null", "$defs": {"a": {"uniqueItems": True}}}, [], "null", "1"),
    ],
    ids=json.dumps,
)
def test_without_strict_the_rest_is_enforced(part: Any, unenforced: list[str], valid: str, invalid: str) -> None:
    relaxed = grammar(lenient(part)).relaxed
    assert relaxed is not None
    assert list(relaxed.unenforced) == unenforced
    assert permits(lenient(part), valid)
    assert not permits(lenient(part), invalid)
    if unenforced:
        with pytest.raises(GrammarError) as refusal:
            grammar(schema(part))
        assert refusal.value.pointer in (*unenforced, None)


def test_schemas_of_clients_compile_or_are_enforced_in_part() -> None:
    schemas = dict(client_schemas())
    assert len(schemas) > 200
    relaxed = {name: grammar(lenient(value)).relaxed for name, value in schemas.items()}
    whole = [name for name, found in relaxed.items() if found is not None and not found.unenforced]
    assert len(whole) >= 240
    assert all(found is not None and len(found.unenforced) <= 2 for found in relaxed.values())


def test_copies_of_map_values_are_bounded() -> None:
    """Nested maps with listed names would double the schema at each level."""
    deep: Any = {"type": "null"}
    for _ in range(30):
        deep = {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": deep}
    assert len(json.dumps(rewritten(simplified(deep)))) < 10_000
