"""Grammars of messages with calls: permitted and forbidden texts, and the validity of parsed calls."""

from __future__ import annotations

import json
import re

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from api.tools.formats import (
    CHAT_FORMATS,
    AllowedCalls,
    ArgumentsDelta,
    ChatFormat,
    LarkBuilder,
    MessageConstraints,
    MessageParser,
    Tool,
    ToolCallStart,
    format_of,
)
from api.tools.formats.lark_builder import MAX_CALLS
from engine.grammar import GrammarCompiler, Matcher
from engine.grammar import Lark as LarkForm
from tests.api.fake import ByteVocab
from tests.api.samples import CALLS, SAMPLES

HERMES = format_of("<tool_call>")
GRAMMARS = GrammarCompiler(ByteVocab())
SINGLE_CALL = replace(CALLS, parallel=False)
NOW = '{"name": "now", "arguments": {}}'
BERN = '{"name": "weather", "arguments": {"city": "Bern"}}'
TAGGED = f"<tool_call>\n{BERN}\n</tool_call>"


async def begun(constraints: MessageConstraints, format: ChatFormat = HERMES) -> Matcher:
    lark = LarkBuilder({})
    format.grammar(lark, constraints)
    return (await GRAMMARS.compile(LarkForm(str(lark)))).begin()


def accept(matcher: Matcher, text: str) -> str:
    """Accepts the longest permitted prefix of `text`, and returns the prefix."""
    tokens = text.encode()
    count = 0 if matcher.complete else matcher.validate_tokens([*tokens])
    for token in tokens[:count]:
        matcher.accept_token(token)
    return tokens[:count].decode("utf-8", "replace")


@pytest.mark.parametrize("may_reason", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello {you}",
        '{"city": "Bern"}',
        '{"name": "Bern", "arguments": {"x": 1}}',
        '{"name": "weather", "city": 7}',
        'So: {"name": "weather", "arguments": 7}',
        BERN,
        f" {BERN} done",
        f"{{{BERN}}}\n{{{NOW}}}",
        '{ "name":"now",\n "parameters" : {"x": 1}\n}\n' + BERN,
        f"{BERN}\n</tool_call>",
        f"a {TAGGED} b",
        f"{NOW} then {TAGGED}{TAGGED}",
        f"So:\n```json\n{BERN}\n```\n```\n[{NOW},\n {BERN}]\n``` and {TAGGED}",
        '```json\n{"name": "other", "arguments": 7}\n```',
    ],
)
async def test_permitted_messages(text: str, may_reason: bool) -> None:
    for before in ("", "<think>a <tool_call> of</think>\n\n") if may_reason else ("",):
        matcher = await begun(MessageConstraints(CALLS, may_reason))
        assert accept(matcher, before + text) == before + text
        assert matcher.native.is_accepting()


@pytest.mark.parametrize(
    ("calls", "prefix", "then"),
    [
        (CALLS, '{"name": "weather", "arguments": {"', 'town": "Bern"}}'),
        (CALLS, '{"name": "weather", "arguments": ', "7"),
        (CALLS, '\u00a0{"name"\x1c: "weather", "parameters":', "7"),
        (CALLS, f'{NOW}\n{{"name": "weather", "arguments": ', "7"),
        (CALLS, '<think></think>\n{"name": "weather", "arguments": ', "7"),
        (CALLS, f'{NOW}<tool_call>\n{{"name": "weather", "arguments": ', "7"),
        (CALLS, 'So: ```json\n{\n "name": "weather", "arguments":', "7"),
        (CALLS, f'```\n[{NOW}, {{"name": "weather", "arguments":', "7"),
        (CALLS, f'{TAGGED} ```\n{{"name": "weather", "arguments":', "7"),
        (SINGLE_CALL, NOW, " "),
        (SINGLE_CALL, f"```json\n{NOW}", "\n"),
        (SINGLE_CALL, TAGGED, " "),
        (replace(CALLS, required=True), "", "Hi"),
        (replace(SINGLE_CALL, required=True), TAGGED, " "),
        (CALLS, '{{"name": "weather", "arguments": ', "7"),
    ],
)
async def test_forbidden_continuations(calls: AllowedCalls, prefix: str, then: str) -> None:
    matcher = await begun(MessageConstraints(calls, may_reason=True))
    assert accept(matcher, prefix + then) == prefix


JSON_ANSWER = '%json {"type": "object", "properties": {"x": {"type": "integer"}}, "additionalProperties": false}'


@pytest.mark.parametrize("answer", [None, JSON_ANSWER])
@pytest.mark.parametrize(
    ("sign", "head", "one", "end"),
    [
        ("<tool_call>", "", f"<tool_call>\n{NOW}\n</tool_call>", ""),
        ("<tool_call>", "", NOW, ""),
        ("", "", NOW, ""),
        ("<function=", "", "<tool_call>\n<function=now>\n</function>\n</tool_call>", ""),
        ("<arg_key>", "", "<tool_call>now\n</tool_call>", ""),
        ("[ARGS]", "", "[TOOL_CALLS]now[ARGS]{}", ""),
        ("<|tool_call>", "", "<|tool_call>call:now{}<tool_call|>", ""),
        ("<start_function_call>", "", "<start_function_call>call:now{}<end_function_call>", ""),
        (
            "<｜tool▁call▁begin｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
        (
            "｜DSML｜",
            "<｜DSML｜tool_calls>\n",
            '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n',
            "</｜DSML｜tool_calls>",
        ),
        (
            "<|tool_call_begin|>",
            "<|tool_calls_section_begin|>",
            "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
            "<|tool_calls_section_end|>",
        ),
    ],
)
async def test_a_turn_may_end_after_white_space(sign: str, head: str, one: str, end: str, answer: str | None) -> None:
    constraints = MessageConstraints(replace(CALLS, required=answer is None), answer=answer)
    for text in (f"{one}", f"{one}\n", f"{one}\n\n", f"{one}\n{one}\n", f"{one}\n\n{one}"):
        matcher = await begun(constraints, format_of(sign))
        assert accept(matcher, head + text + end) == head + text + end
        assert matcher.native.is_accepting()


@pytest.mark.parametrize(
    ("sign", "text"),
    [
        ("<tool_call>", f"```json\n{NOW}\n{BERN}\n```"),
        ("<tool_call>", '```\n{\n  "name": "now",\n  "arguments": {}\n}\n```'),
        ("<tool_call>", f"{{{NOW}}}\n"),
        ("<|python_tag|>", '{"name": "now", "parameters": {}}\n'),
        ("<|python_tag|>", '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}} '),
        ("tools <|header_start|>", "[now()]"),
        ("tools <|header_start|>", "[now(), now()\n]"),
        ("[TOOL_CALLS]", f"[TOOL_CALLS] [{NOW}]"),
        ("<|channel|>", "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"),
        (
            "<|open|>",
            '<|close|>think<|sep|><|open|>tools<|sep|><|open|>call tool="now" index="1"<|sep|><|close|>call<|sep|>\n'
            "<|close|>tools<|sep|>",
        ),
    ],
)
async def test_a_turn_may_end_after_its_last_call(sign: str, text: str) -> None:
    matcher = await begun(MessageConstraints(replace(CALLS, required=True)), format_of(sign))
    prefix = "<|open|>think<|sep|>" if sign == "<|open|>" else ""
    assert accept(matcher, prefix + text) == prefix + text
    assert matcher.native.is_accepting()


SIGNS = [*"[]{}:,7x` \n\u00a0\x1c", "```\n", "```json\n", '"name"', '"weather"', '"arguments"', '"parameters"']
WHOLE = [BERN, NOW, '{"city": "Bern"}', '{"name": "weather", "arguments": ', '{"name": "other", "arguments": ']
PIECES = re.compile(r"(<[^<>]*>|\[[A-Z/_]+\]|[{}\[\]:,\"\n=()])")


def parts_of(format: ChatFormat) -> list[str]:
    """Returns texts of which messages of the format are composed."""
    texts = [sample.text for sample in SAMPLES if sample.chat_format is format]
    pieces = {piece for text in texts for piece in PIECES.split(text) if piece}
    return sorted({*texts, *pieces, *format.markers, *format.opens, *SIGNS, *WHOLE})


@pytest.mark.parametrize("format", CHAT_FORMATS, ids=lambda format: format.name)
@settings(max_examples=25, deadline=None)
@given(st.data(), st.booleans(), st.booleans(), st.booleans(), st.booleans())
async def test_parsed_calls_are_valid(
    format: ChatFormat, data: st.DataObject, may_reason: bool, in_reasoning: bool, parallel: bool, required: bool
) -> None:
    calls, in_reasoning = replace(CALLS, parallel=parallel, required=required), in_reasoning and bool(format.opens)
    matcher = await begun(MessageConstraints(calls, may_reason or in_reasoning, in_reasoning), format)
    parts = data.draw(st.lists(st.sampled_from(parts_of(format)), max_size=25))
    text = "".join(accept(matcher, part) for part in parts)
    if not matcher.native.is_accepting():
        return
    parser = MessageParser(format, calls, in_reasoning=in_reasoning)
    found: list[list[str]] = []
    for delta in [*parser.feed(text), *parser.finish()]:
        if isinstance(delta, ToolCallStart):
            found.append([delta.name])
        elif isinstance(delta, ArgumentsDelta):
            found[-1].append(delta.text)
    for name, *arguments in found:
        assert name in calls
        jsonschema_rs.validate(dict(calls.schema(name)), json.loads("".join(arguments)))
    assert bool(found) >= required
    assert parallel or len(found) <= 1


async def test_calls_in_reasoning_and_without_their_first_tag_are_constrained() -> None:
    format = format_of("<function=")
    for before in ("hm <tool_call>\n<function=", "hm</think>\nSo <function="):
        matcher = await begun(MessageConstraints(CALLS, may_reason=True, in_reasoning=True), format)
        assert accept(matcher, f"{before}other>") == before
        assert accept(matcher, "weather>\n<parameter=city>\nBern\n</parameter>\n</function>")
        assert matcher.native.is_accepting()


@pytest.mark.parametrize(
    ("sign", "first", "then"), [("<|python_tag|>", "{", "7"), ("tools <|header_start|>", "[", "f")]
)
async def test_reasoning_opened_by_the_prompt_closes_before_a_call(sign: str, first: str, then: str) -> None:
    required = replace(CALLS, required=True)
    for calls in (CALLS, required):
        matcher = await begun(MessageConstraints(calls, may_reason=True, in_reasoning=True), format_of(sign))
        prefix = f"{first}{then} hm</think>\n\n{first}"
        assert accept(matcher, prefix + then) == prefix


def test_a_tag_that_is_a_special_token_in_part() -> None:
    written = LarkBuilder({"<|channel>": 7, "<channel|>": 8})
    format_of("<|tool_call>").grammar(written, MessageConstraints(CALLS))
    assert '| <[7]> "thought" thought_0' in str(written)
    assert "channel" not in str(written)


async def test_an_empty_line_after_reasoning_is_permitted() -> None:
    matcher = await begun(MessageConstraints(CALLS, may_reason=True, in_reasoning=True), format_of("<|open|>"))
    prefix = "hm<|close|>think<|sep|>\n\n<|open|>response<|sep|>Yes<|close|>response<|sep|>"
    assert accept(matcher, prefix) == prefix


async def test_each_opening_tag_has_its_closing_tag() -> None:
    matcher = await begun(MessageConstraints(CALLS, may_reason=True), format_of("[ARGS]"))
    assert accept(matcher, "<think>[/THINK][TOOL_CALLS]x</think>[TOOL_CALLS]y").endswith("</think>[TOOL_CALLS]")


@pytest.mark.parametrize(
    ("sign", "head", "one", "separator"),
    [
        (
            "<｜tool▁call▁begin｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
            "",
        ),
        ("<|python_tag|>", "", '{"name": "now", "parameters": {}}', "; "),
        ("tools <|header_start|>", "[", "now()", ", "),
    ],
)
async def test_required_calls_are_limited(sign: str, head: str, one: str, separator: str) -> None:
    """The limit ends the output of a model that repeats calls."""
    matcher = await begun(MessageConstraints(replace(CALLS, required=True)), format_of(sign))
    longest = head + separator.join([one] * MAX_CALLS)
    permitted = accept(matcher, longest + separator + one)
    assert permitted.startswith(longest)
    assert permitted != longest + separator + one


async def test_gemma_grammar_follows_references_and_patterns() -> None:
    node = {
        "type": "object",
        "properties": {"id": {"type": "string", "pattern": "^[a-c]+$"}, "next": {"$ref": "#/$defs/n"}},
    }
    tool = Tool("f", {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": node}})
    matcher = await begun(MessageConstraints(AllowedCalls((tool,), required=True)), format_of("<|tool_call>"))
    prefix = '<|tool_call>call:f{n:{id:<|"|>ab<|"|>,next:{id:<|"|>c'
    assert accept(matcher, prefix + "d") == prefix


async def test_a_schema_shared_by_several_notations_counts_once() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x" * 140_000]}}}
    assert (await begun(MessageConstraints(AllowedCalls((Tool("f", schema),))))).validate_tokens(b"hi") == 2
