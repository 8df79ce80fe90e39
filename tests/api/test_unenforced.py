"""Keywords that no grammar follows: refused with strict, else listed in the reply with the result of their check."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.generation.json_validation import satisfies_schema
from bench.client_schemas import MCP, PYDANTIC, ZOD
from tests.api.asgi import post
from tests.api.test_tools import WEATHER, app_of, ask, engine_with_output, streamed

UNIQUE = {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}}}
PATH = "response_format.json_schema.schema/properties/tags/uniqueItems"
TOOL = "tools[1].function.parameters/properties/tags/uniqueItems"
HERMES = "{# <tool_call> #}{% if tools %}tools{% endif %}{{ messages[0].content }}"


def response_format(schema: Any, **fields: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


def tool(schema: Any, **fields: Any) -> Any:
    return {"type": "function", "function": {"name": "tag", "parameters": schema, **fields}}


def call(arguments: str) -> str:
    return f'<tool_call>\n{{"name": "tag", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("output", "satisfied"),
    [('{"tags": ["a", "b"]}', True), ('{"tags": ["a", "a"]}', False), ('{"tags": ["a"', None)],
)
async def test_the_reply_lists_the_keywords_and_the_check(output: str, satisfied: bool | None) -> None:
    expected = {"keywords": [PATH], "satisfied": [satisfied, satisfied]}
    fields = {"response_format": response_format(UNIQUE), "n": 2}
    assert (await ask(engine_with_output(output, HERMES), **fields))["unenforced_schema_keywords"] == expected
    *chunks, last = await streamed(engine_with_output(output, HERMES), **fields)
    assert last["unenforced_schema_keywords"] == expected
    assert not any("unenforced_schema_keywords" in chunk for chunk in chunks)
    text = {"prompt": "x", "json_schema": UNIQUE, "n_predict": 99}
    answer = await post(app_of(engine_with_output(output, HERMES)), "/v1/completions", text)
    assert answer.json["unenforced_schema_keywords"] == {
        "keywords": ["json_schema/properties/tags/uniqueItems"],
        "satisfied": [satisfied],
    }
    for stream in (False, True):
        answer = await post(app_of(engine_with_output(output, HERMES)), "/completion", {**text, "stream": stream})
        reply = answer.events[-1] if stream else answer.json
        assert reply["unenforced_schema_keywords"]["satisfied"] == [satisfied]


@pytest.mark.parametrize(
    ("output", "satisfied"),
    [
        (call('{"tags": ["a", "b"]}'), True),
        (call('{"tags": ["a", "b"]}') + "\n" + call('{"tags": ["a", "a"]}'), False),
        ("no call", None),
    ],
)
async def test_calls_are_checked_by_the_schema_of_their_tool(output: str, satisfied: bool | None) -> None:
    reply = await ask(engine_with_output(output, HERMES), tools=[WEATHER, tool(UNIQUE)])
    assert reply["unenforced_schema_keywords"] == {"keywords": [TOOL], "satisfied": [satisfied]}


async def test_strict_refuses_the_keyword_by_its_path() -> None:
    engine = engine_with_output("x", HERMES)
    reply = await ask(engine, response_format=response_format(UNIQUE, strict=True))
    assert reply["error"]["param"] == PATH
    choice = {"type": "function", "function": {"name": "tag"}}
    reply = await ask(engine, tools=[WEATHER, tool(UNIQUE, strict=True)], tool_choice=choice)
    assert reply["error"]["param"] == TOOL, "the position in the request, although only one tool may be called"
    reply = await ask(engine, response_format=response_format({**UNIQUE, "title": "x"}), tools=[WEATHER])
    assert reply["unenforced_schema_keywords"]["keywords"] == [PATH]


async def test_types_that_do_not_exist_are_refused_in_forms_and_not_in_tools() -> None:
    engine = engine_with_output("x", HERMES)
    for kind in ("hiccup", 123, ["string", "any"]):
        schema = {"type": "object", "properties": {"a": {"type": kind}}}
        reply = await ask(engine, response_format={"type": "json_object", "schema": schema})
        assert reply["error"]["param"] == "response_format.schema/properties/a/type"
        reply = await ask(engine, tools=[tool(schema)])
        assert reply["unenforced_schema_keywords"]["keywords"] == ["tools[0].function.parameters/properties/a/type"]
    nothing = {"type": ["string", "null"], "$defs": {"unused": {"type": "any"}}}
    assert "error" not in await ask(engine, response_format=response_format(nothing))


async def test_a_whole_schema_has_no_field() -> None:
    harmless = {"type": "object", "properties": {"a": {"type": "string", "format": "path"}}, "propertyNames": {}}
    reply = await ask(engine_with_output('{"a": "x"}', HERMES), response_format=response_format(harmless, strict=True))
    assert "unenforced_schema_keywords" not in reply


TEMPLATES = {
    "hermes": HERMES,
    "qwen_xml": HERMES.replace("<tool_call>", "<tool_call><function=<parameter="),
    "gemma": HERMES.replace("<tool_call>", "<|tool_call>"),
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
@pytest.mark.parametrize("properties", [PYDANTIC, ZOD, MCP], ids=["pydantic", "zod", "mcp"])
async def test_no_notation_refuses_the_tools_of_clients(template: str, properties: dict[str, Any]) -> None:
    tools = [
        {"function": {"name": name, "parameters": {"type": "object", "properties": {name: value}}}}
        for name, value in properties.items()
    ]
    reply = await ask(engine_with_output("x", template), tools=tools, tool_choice="auto")
    assert "error" not in reply, reply


@pytest.mark.parametrize(
    ("schema", "text", "valid"),
    [
        ({"pattern": "^(?!a)"}, '"b"', True),
        ({"pattern": "^(?!a)"}, '"a"', False),
        ({"items": [{"type": "string"}], "uniqueItems": True, "dependencies": {}}, '["a", "a"]', False),
        ({"format": "email", "minLength": 1}, '"a"', True),
        ({"properties": {"a": {"$ref": "#"}}}, "{}", None),
        ({"$ref": "https://example.org/schema.json"}, "{}", None),
        ({"$ref": "file:///etc/passwd"}, "{}", None),
        ({"type": "strng"}, '"a"', None),
        ({}, "[" * 100_000, None),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_the_check_of_a_whole_schema(schema: Any, text: str, valid: bool | None) -> None:
    assert satisfies_schema(text, schema) is valid


def test_an_expensive_check_is_left_out() -> None:
    """Each definition refers to the next one twice, so that a check would take 2^40 steps."""
    doubling = {f"d{at}": {"allOf": [{"$ref": f"#/$defs/d{at + 1}"}] * 2} for at in range(40)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**doubling, "d40": {"type": "string"}}}
    assert satisfies_schema('"a"', schema) is None


async def test_a_deep_schema_of_a_tool_is_refused_by_its_path() -> None:
    deep: Any = {"type": "string", "uniqueItems": True}
    for _ in range(90):
        deep = {"type": "object", "properties": {"a": deep}}
    reply = await ask(engine_with_output("x", HERMES), tools=[tool(deep)])
    assert reply["error"]["param"] == "tools[0].function.parameters"
    assert "levels deep" in reply["error"]["message"]
