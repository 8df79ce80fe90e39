"""Tools and reasoning over HTTP: whole and streamed replies, template variables, grammars, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from starlette.types import ASGIApp

from api.server.app import create_app
from api.templates.builtin import BUILTIN_TEMPLATES
from api.tools.tool_choice import closed_schema
from engine import Lark, Request
from engine.grammar import GrammarCompiler
from tests.api.asgi import post
from tests.api.fake import INFO, ByteVocab, FakeEngine, app_state

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
EARLIER_CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
# A template in the style of reasoning models: the prompt opens the reasoning unless reasoning is disabled.
QWEN = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function.arguments | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% if enable_thinking is not defined or enable_thinking %}"
    "<think>\n{% else %}<think>\n\n</think>\n{% endif %}{% endif %}"
)


def engine_with_output(text: str, template: str | None = QWEN, size: int = 3) -> FakeEngine:
    """Returns an engine that emits `text` for every request, in steps of `size` bytes."""
    output = text.encode()
    steps = [output[at : at + size] for at in range(0, len(output), size)]
    return FakeEngine(lambda request: steps, info=msgspec.structs.replace(INFO, chat_template=template))


def app_of(engine: FakeEngine, **options: Any) -> ASGIApp:
    return create_app(app_state(engine, options=options))


async def ask(engine: FakeEngine, *, options: Any = None, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    answer = await post(app_of(engine, **(options or {})), "/v1/chat/completions", body)
    return json.loads(b"".join(answer.chunks))


async def streamed(engine: FakeEngine, **fields: Any) -> list[Any]:
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
    answer = await post(app_of(engine), "/v1/chat/completions", body)
    lines = b"".join(answer.chunks).decode().split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def prompt_of(engine: FakeEngine) -> str:
    return bytes(token for token in engine.requests[-1].prompt if token < 256).decode()


async def test_a_message_with_reasoning_and_a_call() -> None:
    reply = await ask(engine_with_output(f"hm\n</think>\n\nSo.\n{CALL}"), tools=[WEATHER])
    (choice,) = reply["choices"]
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": "So.", "reasoning_content": "hm"}
    assert choice["finish_reason"] == "tool_calls"
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}


async def test_a_streamed_message_with_reasoning_and_a_call() -> None:
    chunks = await streamed(engine_with_output(f"hm\n</think>\n\nSo.\n{CALL}"), tools=[WEATHER])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta["role"] for delta in deltas if "role" in delta] == ["assistant"]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content") or "" for delta in deltas) == "So."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert {call["index"] for call in calls} == {0}
    assert [call["function"]["name"] for call in calls if "name" in call["function"]] == ["weather"]
    assert sum("id" in call for call in calls) == 1
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Bern"}'
    assert len([call for call in calls if call["function"]["arguments"]]) > 2, "the arguments are streamed"
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


LEGACY = {"functions": [WEATHER["function"]], "function_call": {"name": "weather"}}


async def test_legacy_functions_are_called_in_the_legacy_shape() -> None:
    engine = engine_with_output(f"hm\n</think>\n\n{CALL}")
    (choice,) = (await ask(engine, **LEGACY))["choices"]
    called = {"name": "weather", "arguments": '{"city": "Bern"}'}
    assert choice["message"] == {
        "role": "assistant", "content": None, "reasoning_content": "hm", "function_call": called
    }  # fmt: skip
    assert choice["finish_reason"] == "function_call"
    prompt = prompt_of(engine)
    await ask(engine, tools=[WEATHER])
    assert prompt == prompt_of(engine)
    chunks = await streamed(engine, **LEGACY)
    parts = [chunk["choices"][0]["delta"].get("function_call") for chunk in chunks]
    assert [part["name"] for part in parts if part and "name" in part] == ["weather"]
    assert "".join(part["arguments"] for part in parts if part) == called["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"
    assert not any("tool_calls" in chunk["choices"][0]["delta"] for chunk in chunks)


async def test_a_call_without_tags() -> None:
    bare = '{"name": "weather", "arguments": {"city": "Bern"}}'
    reply = await ask(engine_with_output(f"</think>{bare}"), tools=[WEATHER])
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    other = bare.replace("weather", "another")
    reply = await ask(engine_with_output(f"</think>{other}"), tools=[WEATHER])
    assert (reply["choices"][0]["message"]["content"], reply["choices"][0]["finish_reason"]) == (other, "stop")


async def test_a_call_alone_has_no_content() -> None:
    reply = await ask(engine_with_output(f"</think>{CALL}"), tools=[WEATHER])
    assert reply["choices"][0]["message"]["content"] is None


async def test_a_truncated_call_finishes_by_length() -> None:
    reply = await ask(engine_with_output(f"</think>{CALL}"), tools=[WEATHER], max_tokens=60)
    assert reply["choices"][0]["finish_reason"] == "length"


async def test_a_call_without_tools_is_content() -> None:
    engine = engine_with_output(f"</think>{CALL}")
    reply = await ask(engine)
    assert reply["choices"][0]["message"]["content"] == CALL
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert engine.requests[-1].grammar is None


async def test_tool_choice_none_keeps_the_prompt_and_forbids_calls() -> None:
    engine = engine_with_output("</think>Sunny.")
    prompts = []
    for choice in ("auto", "none"):
        reply = await ask(engine, tools=[WEATHER], tool_choice=choice)
        assert reply["choices"][0]["message"]["content"] == "Sunny."
        prompts.append(prompt_of(engine))
    assert prompts[0] == prompts[1]
    grammar = engine.requests[-1].grammar
    assert grammar is not None
    assert isinstance(grammar.spec, Lark)
    matcher = (await GrammarCompiler(ByteVocab()).compile(grammar.spec)).begin()
    prefix = b"hm</think>\n\nI <tool it."
    assert matcher.validate_tokens(prefix) == len(prefix)
    assert matcher.validate_tokens(f"hm</think>{CALL}".encode()) == len("hm</think><tool_call")


async def test_templates_get_tools_and_earlier_calls_as_objects() -> None:
    engine = engine_with_output("</think>ok")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    await ask(engine, messages=messages, tools=[WEATHER])
    assert prompt_of(engine).startswith('[{"type": "function", "function": {"name": "weather"')
    assert '[assistant] <tool_call>{"city": "Bern"}</tool_call>[tool] sunny' in prompt_of(engine)


async def test_tool_instructions_for_templates_without_tools() -> None:
    plain = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    engine = engine_with_output(CALL, plain)
    engine.request_limit = 4096
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    reply = await ask(engine, messages=messages, tools=[WEATHER])
    prompt = prompt_of(engine)
    assert prompt.startswith("[system] Be brief.\n\nYou may call functions")
    assert f"[assistant] Let me see.\n\n{CALL}" in prompt
    assert "[user] <tool_response>\nsunny\n</tool_response>" in prompt
    assert reply["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
async def test_built_in_templates_describe_tools_and_calls(name: str) -> None:
    engine = engine_with_output(CALL, BUILTIN_TEMPLATES[name])
    engine.request_limit = 4096
    reply = await ask(engine, tools=[WEATHER])
    assert '"name": "weather"' in prompt_of(engine)
    assert "<tool_call>" in prompt_of(engine)
    assert reply["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"


async def test_a_llama_4_template_with_tools_has_calls_in_pythons_notation() -> None:
    template = "{{ tools }}{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>{{ m.content }}{% endfor %}"
    engine = engine_with_output("[weather(city='Bern')]", template)
    reply = await ask(engine, tools=[WEATHER])
    assert reply["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Bern"}'
    assert "You may call functions" not in prompt_of(engine)


@pytest.mark.parametrize("content", ["hi", [{"type": "text", "text": "hi"}]])
async def test_tool_instructions_for_templates_without_a_system_role(content: Any) -> None:
    gemma = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    )
    engine = engine_with_output(CALL, gemma)
    engine.request_limit = 4096
    reply = await ask(engine, tools=[WEATHER], messages=[{"role": "user", "content": content}])
    assert reply["choices"][0]["message"]["tool_calls"]
    assert prompt_of(engine).startswith("[user] You may call functions")
    assert prompt_of(engine).endswith("hi\n")


def constrained(**fields: Any) -> Callable[[], Any]:
    async def grammar() -> Any:
        engine = engine_with_output("</think>ok")
        await ask(engine, tools=[WEATHER], **fields)
        return engine.requests[-1].grammar

    return grammar


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "weather"}}])
async def test_tool_choice_has_a_grammar(choice: Any) -> None:
    assert await constrained(tool_choice=choice)() is not None


@pytest.mark.parametrize(
    ("parameters", "open_"),
    [
        ({"properties": {"a": {"type": "integer"}}}, False),
        ({"properties": {"a": {"type": "integer"}}, "additionalProperties": True}, True),
        ({"properties": {"a": {"type": "integer"}}, "required": ["b"]}, True),
        ({"properties": {"a": {"type": "integer"}}, "anyOf": [{"required": ["b"]}, {"required": ["a"]}]}, True),
        ({}, False),
        ({"type": "object"}, True),
    ],
)
async def test_additional_properties(parameters: Any, open_: bool) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    engine = engine_with_output("</think>ok")
    await ask(engine, tools=[tool], tool_choice="required")
    grammar = engine.requests[-1].grammar
    assert grammar is not None
    matcher = (await GrammarCompiler(ByteVocab()).compile(grammar.spec)).begin()
    prefix = b'</think>\n\n<tool_call>\n{"name": "f", "arguments": {"'
    assert (matcher.validate_tokens(prefix + b"b") > len(prefix)) == open_


def test_nested_schemas_are_closed() -> None:
    inner = {"type": "object", "properties": {"x": {"type": "integer"}}}
    shut = {**inner, "additionalProperties": False}
    optional = {"anyOf": [inner, {"type": "null"}]}
    found = closed_schema({"properties": {"a": {"$ref": "#/$defs/A"}, "b": optional}, "$defs": {"A": inner}})
    assert found["$defs"]["A"] == found["properties"]["b"]["anyOf"][0] == shut
    refined = {"properties": {"a": {"allOf": [{"$ref": "#/$defs/A"}]}}, "$defs": {"A": inner}}
    assert closed_schema(refined)["$defs"]["A"] == inner
    assert closed_schema({**inner, "anyOf": [inner]}) == {**inner, "anyOf": [inner]}
    assert closed_schema({**inner, "minProperties": 2}) == {**inner, "minProperties": 2}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "wether"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [WEATHER, {"type": "web_search"}]}, "tools[1].type"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}},
            "tool_choice.allowed_tools.tools",
        ),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [{"function": {"name": "f"}}]}},
            },
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters.type",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "strict": True,
                            "parameters": {"properties": {"x": {"not": {"const": 1}}}},
                        },
                    }
                ]
            },
            "tools[0].function.parameters/properties/x/not",
        ),
        ({"functions": [{"name": "f"}, {"name": "f"}]}, "functions[1].name"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"functions": [{"name": "f"}], "tools": [WEATHER]}, "function_call"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call.name"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"tools": [WEATHER], "guided_regex": "a+"}, "guided_regex"),
    ],
)
async def test_refusals_name_the_field(fields: Any, param: str) -> None:
    reply = await ask(engine_with_output("x"), **fields)
    assert reply["error"]["param"] == param


# Markers in the templates of the formats that convert schemas themselves.
SIGNS = ("<function=", "<arg_key>", "｜DSML｜", "<|open|>", "<|tool_call>", "<|header_start|>")


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": 5},
        {"required": 5},
        {"required": [[]]},
        {"properties": {"a": True}},
        {"properties": {"a": {"enum": 5}}},
        {"properties": {"a": {"type": "string", "enum": 5}}},
        {"properties": {"a": {"type": "string", "enum": []}}},
        {"properties": {"a": {"type": "string", "pattern": 5}}},
        {"properties": {"a": {"type": "string", "minLength": "x"}}},
        {"properties": {"a": {"anyOf": 5}}},
        {"properties": {"a": {"anyOf": [True]}}},
        {"properties": {"a": {"$ref": 5}}},
    ],
    ids=str,
)
async def test_invalid_schemas_cause_no_server_error(sign: str, parameters: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    reply = await ask(engine_with_output("x", sign + "{{ messages[0].content }}"), tools=[tool])
    assert "choices" in reply or reply["error"]["param"].startswith("tools")


@pytest.mark.parametrize(
    ("city", "expression"),
    [
        ({"type": "string", "pattern": r"^a/b\/c$"}, r"(a\/b\/c)"),
        ({"$ref": "#/$defs/city", "description": "where"}, '("Bern\\n</parameter>\\n" | "Oslo\\n</parameter>\\n")'),
    ],
)
async def test_string_schemas_become_expressions(city: Any, expression: str) -> None:
    definitions = {"city": {"type": "string", "enum": ["Bern", "Oslo"], "title": "City"}}
    parameters = {"properties": {"city": city}, "$defs": definitions}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    engine = engine_with_output("x", "<function={{ messages[0].content }}")
    assert "choices" in await ask(engine, tools=[tool])
    grammar = engine.requests[-1].grammar
    assert grammar is not None
    assert isinstance(grammar.spec, Lark)
    assert expression in grammar.spec.text


async def test_deep_nesting_is_refused() -> None:
    schema: Any = {"type": "string"}
    for _ in range(300):
        schema = {"type": "object", "properties": {"a": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    reply = await ask(engine_with_output("x", "<|tool_call>{{ messages[0].content }}"), tools=[tool])
    assert reply["error"]["type"] == "invalid_request_error"
    assert "nested" in reply["error"]["message"]


async def test_reasoning_may_stay_in_the_content() -> None:
    for where in ({"options": {"chat": {"reasoning_format": "none"}}}, {"reasoning_format": "none"}):
        reply = await ask(engine_with_output("hm\n</think>\n\nYes"), **where)
        assert reply["choices"][0]["message"] == {"role": "assistant", "content": "hm\n</think>\n\nYes"}


async def test_unclosed_reasoning_is_not_content() -> None:
    reply = await ask(engine_with_output("hm, hm"))
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "", "reasoning_content": "hm, hm"}


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": False},
        {"reasoning_effort": "none"},
        {"reasoning_budget": 0},
        {"thinking_budget_tokens": 0},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
async def test_reasoning_is_disabled_by_the_template(fields: Any) -> None:
    engine = engine_with_output("Yes")
    reply = await ask(engine, **fields)
    assert prompt_of(engine).endswith("</think>\n")
    assert reply["choices"][0]["message"]["content"] == "Yes"


async def test_reasoning_effort_is_a_template_variable() -> None:
    engine = engine_with_output("Yes", "{{ reasoning_effort }}!")
    await ask(engine, reasoning_effort="high")
    assert prompt_of(engine) == "high!"


@pytest.mark.parametrize(
    ("fields", "tokens"), [({}, 7), ({"reasoning_budget": 3}, 3), ({"reasoning_budget": -1}, None)]
)
async def test_reasoning_budget(fields: Any, tokens: int | None) -> None:
    engine = engine_with_output("Yes")
    await ask(engine, options={"chat": {"reasoning_budget": 7}}, **fields)
    request: Request = engine.requests[-1]
    assert (request.reasoning and request.reasoning.tokens) == tokens
    if request.reasoning is not None:
        assert (request.reasoning.opens, request.reasoning.closes) == ("", "</think>")
        assert bytes(request.reasoning.closing) == b"</think>\n\n"


@pytest.mark.parametrize(("fields", "message"), [({}, "Enough. "), ({"reasoning_budget_message": "Stop"}, "Stop")])
async def test_the_message_at_the_end_of_a_reasoning_budget(fields: Any, message: str) -> None:
    engine = engine_with_output("Yes")
    chat = {"reasoning_budget": 7, "reasoning_budget_message": "Enough. "}
    await ask(engine, options={"chat": chat}, **fields)
    reasoning = engine.requests[-1].reasoning
    assert reasoning is not None
    assert bytes(reasoning.closing).decode() == f"{message}</think>\n\n"


async def test_output_that_is_not_parsed() -> None:
    engine = engine_with_output(f"hm\n</think>\n\nSo.\n{CALL}")
    reply = await ask(engine, options={"chat": {"skip_parsing": True}}, tools=[WEATHER], tool_choice="required")
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": f"hm\n</think>\n\nSo.\n{CALL}"}
    assert choice["finish_reason"] == "stop"
    assert engine.requests[-1].grammar is None
    assert "weather" in prompt_of(engine)


@pytest.mark.parametrize("fields", [{"response_format": {"type": "json_object"}}, {"guided_choice": ["a", "b"]}])
@pytest.mark.parametrize("tools", [[], [WEATHER]])
async def test_response_formats_with_tools_and_reasoning(fields: Any, tools: Any) -> None:
    engine = engine_with_output("</think>ok")
    await ask(engine, tools=tools, **fields)
    grammar = engine.requests[-1].grammar
    assert grammar is not None
    assert "</think>" in str(grammar.spec).replace("\\", "")
    assert ("weather" in str(grammar.spec)) == bool(tools)


async def test_large_schemas_are_refused_unread(app: ASGIApp) -> None:
    properties = {f"p{number}": {"type": "string", "description": "x" * 200} for number in range(5000)}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]
    answer = await post(app, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": tools})
    assert (answer.status, answer.json["error"]["param"]) == (400, "tools")
