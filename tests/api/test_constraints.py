"""Output constraints in each dialect: the grammar that the engine gets, and the field of an error."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.types import ASGIApp

from engine import Gbnf, GrammarSpec, JsonObject, JsonSchema, Lark, OneOfTexts, Regex
from tests.api.asgi import post
from tests.api.fake import FakeEngine

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
NATIVE = "/completion"
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}}
RAW = b'{"type":"object","properties":{"n":{"type":"integer"}}}'
LENIENT = JsonSchema(RAW, strict=False)
OBJECT = JsonSchema(b'{"type":"object"}', strict=False)
NAMED = {"name": "number", "schema": NUMBER}


@pytest.mark.parametrize(
    ("fields", "spec"),
    [
        ({}, None),
        ({"response_format": None, "grammar": None, "guided_json": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"grammar": ""}, None),
        ({"structured_outputs": {"json_object": False}}, None),
        ({"response_format": {"type": "json_object"}}, JsonObject()),
        ({"response_format": {"type": "json_object", "schema": NUMBER}}, LENIENT),
        ({"response_format": {"type": "json_object", "schema": {}}}, OBJECT),
        ({"response_format": {"type": "json_object", "schema": {"type": None}}}, OBJECT),
        ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, LENIENT),
        ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": True}}}, JsonSchema(RAW)),
        ({"response_format": {"type": "json_schema", "json_schema": {**NAMED, "strict": False}}}, LENIENT),
        ({"response_format": {"type": "text"}, "guided_regex": "a+"}, Regex("a+")),
        ({"json_schema": NUMBER}, LENIENT),
        ({"grammar": 'root ::= "a" start\nstart ::= "b"'}, Gbnf('root ::= "a" start\nstart ::= "b"')),
        ({"grammar": '%llguidance {}\nstart: "a"'}, Lark('%llguidance {}\nstart: "a"')),
        ({"grammar": 'x: "a"\nstart: x'}, Lark('x: "a"\nstart: x')),
        ({"grammar": '\n \n\t start : "a"'}, Lark('\n \n\t start : "a"')),
        ({"grammar": "\n" * 100_000 + 'root ::= "a"'}, Gbnf("\n" * 100_000 + 'root ::= "a"')),
        ({"guided_json": NUMBER}, LENIENT),
        ({"guided_json": RAW.decode()}, LENIENT),
        ({"guided_choice": ["a", "b"]}, OneOfTexts(("a", "b"))),
        ({"guided_grammar": 'root ::= "a"'}, Gbnf('root ::= "a"')),
        ({"structured_outputs": {"json": NUMBER}}, LENIENT),
        ({"structured_outputs": {"json_object": True}}, JsonObject()),
        ({"structured_outputs": {"regex": "[ab]"}}, Regex("[ab]")),
        ({"structured_outputs": {"choice": ["a"]}}, OneOfTexts(("a",))),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Lark('start: "a"')),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE])
async def test_the_engine_gets_the_grammar(
    app: ASGIApp, engine: FakeEngine, path: str, fields: dict[str, Any], spec: GrammarSpec | None
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    for stream in (False, True):
        answer = await post(app, path, {**body, **fields, "n": 2, "stop": "x", "stream": stream})
        assert answer.status == 200, answer.json
        grammars = [request.grammar.spec if request.grammar is not None else None for request in engine.requests[-2:]]
        assert grammars == [spec, spec]
        assert engine.requests[-1].grammar is engine.requests[-2].grammar, "compiled once"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"items": {"not": {"const": 1}}}, "strict": True},
                }
            },
            "response_format.json_schema.schema/items/not",
            "/items/not",
        ),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json", "JSON object"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"grammar": "root ::= nowhere"}, "grammar", "nowhere"),
        ({"json_schema": NUMBER, "guided_json": NUMBER}, "guided_json", "json_schema and guided_json exclude"),
        ({"structured_outputs": {"regex": "a", "json": NUMBER}}, "structured_outputs.regex", "exclude each other"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type", "json_object, json_schema"),
    ],
)
@pytest.mark.parametrize("path", [TEXT, NATIVE])
async def test_errors_name_the_field(
    app: ASGIApp, engine: FakeEngine, path: str, fields: dict[str, Any], param: str, message: str
) -> None:
    answer = await post(app, path, {"prompt": "hi", **fields})
    assert answer.status == 400
    assert answer.json["error"]["param"] == param
    assert message in answer.json["error"]["message"]
    assert engine.log == []
