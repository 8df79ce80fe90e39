"""Grammars of messages with calls: what they permit, and that what is read as a call in it is valid."""

from __future__ import annotations

import json
import re

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from api.tools.formats import FORMATS, Arguments, Begun, Calls, Format, Lark, Parser, Rules, Tool, format_of
from api.tools.formats.lark import MOST
from engine.grammar import Grammars, Matcher
from engine.grammar import Lark as LarkForm
from tests.api.fake import ByteVocab
from tests.api.samples import CALLS, SAMPLES

HERMES = format_of("<tool_call>")
GRAMMARS = Grammars(ByteVocab())
ONE = replace(CALLS, parallel=False)
NOW = '{"name": "now", "arguments": {}}'
BERN = '{"name": "weather", "arguments": {"city": "Bern"}}'
TAGGED = f"<tool_call>\n{BERN}\n</tool_call>"


async def begun(rules: Rules, format: Format = HERMES) -> Matcher:
    lark = Lark({})
    format.grammar(lark, rules)
    return (await GRAMMARS.compile(LarkForm(str(lark)))).begin()


def take(matcher: Matcher, text: str) -> str:
    """As much of `text` as may follow."""
    tokens = text.encode()
    count = 0 if matcher.complete else matcher.permits([*tokens])
    for token in tokens[:count]:
        matcher.take(token)
    return tokens[:count].decode("utf-8", "replace")


@pytest.mark.parametrize("thinks", [False, True])
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
        '{ "name":"now",\n "parameters" : {"x": 1}\n}\n' + BERN,
        f"{BERN}\n</tool_call>",
        f"a {TAGGED} b",
        f"{NOW} then {TAGGED}{TAGGED}",
        f"So:\n```json\n{BERN}\n```\n```\n[{NOW},\n {BERN}]\n``` and {TAGGED}",
        '```json\n{"name": "other", "arguments": 7}\n```',
    ],
)
async def test_what_may_be_said(text: str, thinks: bool) -> None:
    for before in ("", "<think>a <tool_call> of</think>\n\n") if thinks else ("",):
        matcher = await begun(Rules(CALLS, thinks))
        assert take(matcher, before + text) == before + text
        assert matcher.native.is_accepting()


@pytest.mark.parametrize(
    ("calls", "said", "then"),
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
        (ONE, NOW, " "),
        (ONE, f"```json\n{NOW}", "\n"),
        (ONE, TAGGED, " "),
        (replace(CALLS, required=True), "", BERN),
    ],
)
async def test_what_may_not_follow(calls: Calls, said: str, then: str) -> None:
    matcher = await begun(Rules(calls, thinks=True))
    assert take(matcher, said + then) == said


SIGNS = [*"[]{}:,7x` \n\u00a0\x1c", "```\n", "```json\n", '"name"', '"weather"', '"arguments"', '"parameters"']
WHOLE = [BERN, NOW, '{"city": "Bern"}', '{"name": "weather", "arguments": ', '{"name": "other", "arguments": ']
PIECES = re.compile(r"(<[^<>]*>|\[[A-Z/_]+\]|[{}\[\]:,\"\n=()])")


def parts_of(format: Format) -> list[str]:
    """What messages of the format may be put together from."""
    texts = [sample.text for sample in SAMPLES if sample.reader is format]
    pieces = {piece for text in texts for piece in PIECES.split(text) if piece}
    return sorted({*texts, *pieces, *format.markers, *format.opens, *SIGNS, *WHOLE})


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@settings(max_examples=25, deadline=None)
@given(st.data(), st.booleans(), st.booleans(), st.booleans(), st.booleans())
async def test_calls_that_are_read_are_valid(
    format: Format, data: st.DataObject, thinks: bool, opened: bool, parallel: bool, required: bool
) -> None:
    calls, opened = replace(CALLS, parallel=parallel, required=required), opened and bool(format.opens)
    matcher = await begun(Rules(calls, thinks or opened, opened), format)
    parts = data.draw(st.lists(st.sampled_from(parts_of(format)), max_size=25))
    text = "".join(take(matcher, part) for part in parts)
    if not matcher.native.is_accepting():
        return
    parser = Parser(format, calls, opened=opened)
    found: list[list[str]] = []
    for delta in [*parser.feed(text), *parser.finish()]:
        if isinstance(delta, Begun):
            found.append([delta.name])
        elif isinstance(delta, Arguments):
            found[-1].append(delta.text)
    for name, *arguments in found:
        assert name in calls
        jsonschema_rs.validate(dict(calls.schema(name)), json.loads("".join(arguments)))
    assert bool(found) >= required
    assert parallel or len(found) <= 1


async def test_calls_inside_of_reasoning_and_without_their_first_tag_are_held_to_their_schemas() -> None:
    format = format_of("<function=")
    for before in ("hm <tool_call>\n<function=", "hm</think>\nSo <function="):
        matcher = await begun(Rules(CALLS, thinks=True, opened=True), format)
        assert take(matcher, f"{before}other>") == before
        assert take(matcher, "weather>\n<parameter=city>\nBern\n</parameter>\n</function>")
        assert matcher.native.is_accepting()


@pytest.mark.parametrize(("sign", "first", "then"), [("<|python_tag|>", "{", "7"), ("<|header_start|>", "[", "f")])
async def test_a_thought_that_the_prompt_began_ends_before_a_call(sign: str, first: str, then: str) -> None:
    required = replace(CALLS, required=True)
    for calls in (CALLS, required):
        matcher = await begun(Rules(calls, thinks=True, opened=True), format_of(sign))
        said = f"{first}{then} hm</think>\n\n{first}"
        assert take(matcher, said + then) == said


def test_a_tag_of_which_only_a_part_is_a_special_token() -> None:
    written = Lark({"<|channel>": 7, "<channel|>": 8})
    format_of("<|tool_call>").grammar(written, Rules(CALLS))
    assert '| <[7]> "thought" thought_0' in str(written)
    assert "channel" not in str(written)


async def test_an_empty_line_may_follow_a_thought_that_was_ended() -> None:
    matcher = await begun(Rules(CALLS, thinks=True, opened=True), format_of("<|open|>"))
    said = "hm<|close|>think<|sep|>\n\n<|open|>response<|sep|>Yes<|close|>response<|sep|>"
    assert take(matcher, said) == said


async def test_what_ends_a_thought_is_what_belongs_to_its_beginning() -> None:
    matcher = await begun(Rules(CALLS, thinks=True), format_of("[ARGS]"))
    assert take(matcher, "<think>[/THINK][TOOL_CALLS]x</think>[TOOL_CALLS]y").endswith("</think>[TOOL_CALLS]")


@pytest.mark.parametrize(
    ("sign", "head", "one", "joint"),
    [
        (
            "<｜tool▁call▁begin｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
            "",
        ),
        ("<|python_tag|>", "", '{"name": "now", "parameters": {}}', "; "),
        ("<|header_start|>", "[", "now()", ", "),
    ],
)
async def test_calls_that_must_be_made_have_an_end(sign: str, head: str, one: str, joint: str) -> None:
    """Where a model that repeats itself would find none."""
    matcher = await begun(Rules(replace(CALLS, required=True)), format_of(sign))
    most = head + joint.join([one] * MOST)
    told = take(matcher, most + joint + one)
    assert told.startswith(most)
    assert told != most + joint + one


async def test_gemmas_notation_follows_references_and_patterns() -> None:
    node = {
        "type": "object",
        "properties": {"id": {"type": "string", "pattern": "^[a-c]+$"}, "next": {"$ref": "#/$defs/n"}},
    }
    tool = Tool("f", {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": node}})
    matcher = await begun(Rules(Calls((tool,), required=True)), format_of("<|tool_call>"))
    said = '<|tool_call>call:f{n:{id:<|"|>ab<|"|>,next:{id:<|"|>c'
    assert take(matcher, said + "d") == said


async def test_a_schema_that_several_ways_to_call_share_is_counted_once() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x" * 140_000]}}}
    assert (await begun(Rules(Calls((Tool("f", schema),))))).permits(b"hi") == 2
