"""The ends of tool calls and the fields around them: stop strings, truncation, allowed tools and legacy fields."""

from __future__ import annotations

from typing import Any

import pytest

from engine.grammar import GrammarCompiler
from tests.api.fake import ByteVocab
from tests.api.test_tools import CALL, EARLIER_CALL, WEATHER, ask, engine_with_output, prompt_of, streamed


@pytest.mark.parametrize("cut", [1, 4, 8, 11])
async def test_a_call_cut_in_its_closing_tag_has_no_content(cut: int) -> None:
    fields = {"tools": [WEATHER], "max_tokens": len(f"</think>{CALL}") - cut}
    reply = await ask(engine_with_output(f"</think>{CALL}"), **fields)
    (choice,) = reply["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "length")
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Bern"}'
    chunks = await streamed(engine_with_output(f"</think>{CALL}"), **fields)
    assert not [chunk for chunk in chunks if chunk["choices"][0]["delta"].get("content")]


@pytest.mark.parametrize("stop", ["Bern", '"', "\n", "</tool", "name"])
async def test_stop_strings_do_not_apply_inside_of_calls(stop: str) -> None:
    fields: Any = {"tools": [WEATHER], "stop": stop, "enable_thinking": False}
    reply = await ask(engine_with_output(f"{CALL}\n{CALL}"), **fields)
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"city": "Bern"}'] * 2
    chunks = await streamed(engine_with_output(f"{CALL}\n{CALL}"), **fields)
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Bern"}' * 2
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_stop_strings_apply_around_calls() -> None:
    fields: Any = {"tools": [WEATHER], "stop": ["END", "."], "enable_thinking": False}
    before = (await ask(engine_with_output(f"Well. {CALL}"), **fields))["choices"][0]
    assert (before["message"], before["finish_reason"]) == ({"role": "assistant", "content": "Well"}, "stop")
    reply = await ask(engine_with_output(f"So {CALL} and EN END {CALL}"), **fields)
    (choice,) = reply["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("So  and EN", "tool_calls")
    assert len(choice["message"]["tool_calls"]) == 1
    assert reply["usage"]["completion_tokens"] == len(f"So {CALL} and EN END")


async def test_a_call_with_incomplete_arguments_is_not_announced() -> None:
    reply = await ask(engine_with_output(f"</think>{CALL[:52]}"), tools=[WEATHER])
    assert reply["choices"][0]["finish_reason"] == "stop"


async def test_a_call_in_double_braces() -> None:
    text = '{{"name": "weather", "arguments": {"city": "Bern"}}}'
    (choice,) = (await ask(engine_with_output(f"</think>{text}"), tools=[WEATHER]))["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}


@pytest.mark.parametrize(("mode", "empty"), [("auto", True), ("required", False)])
async def test_allowed_tools(mode: str, empty: bool) -> None:
    """The prompt lists all tools, so that it keeps its prefix; the grammar permits the allowed ones."""
    other = {"type": "function", "function": {"name": "other"}}
    allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "weather"}}]}
    engine = engine_with_output("</think>ok")
    await ask(engine, tools=[WEATHER, other], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert "other" in prompt_of(engine)
    grammar = engine.requests[-1].grammar
    assert grammar is not None
    for name, permitted in (("weather", True), ("other", False)):
        matcher = (await GrammarCompiler(ByteVocab()).compile(grammar.spec)).begin()
        call = f'</think>\n\n<tool_call>\n{{"name": "{name}", "arguments": '.encode()
        assert (matcher.validate_tokens(call) == len(call)) == permitted
    matcher = (await GrammarCompiler(ByteVocab()).compile(grammar.spec)).begin()
    answer = b"</think>\n\nNo."
    assert (matcher.validate_tokens(answer) == len(answer)) == empty


async def test_fields_that_forbid_nothing() -> None:
    engine = engine_with_output("</think>ok")
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [EARLIER_CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": None},
    ]
    reply = await ask(engine, messages=messages, function_call="none", functions=[])
    assert reply["choices"][0]["message"]["content"] == "ok"
    assert "[tool] [assistant]" in prompt_of(engine)
