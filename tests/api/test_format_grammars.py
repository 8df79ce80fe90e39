"""Grammars of messages with calls: what they permit, and that what is read as a call in it is valid."""

from __future__ import annotations

import json

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from api.formats import Arguments, Begun, Calls, Lark, Parser, Rules, format_of
from engine.grammar import Grammars, Matcher
from engine.grammar import Lark as LarkForm
from tests.api.fake import ByteVocab
from tests.api.samples import CALLS

HERMES = format_of("<tool_call>")
GRAMMARS = Grammars(ByteVocab())
ONE = replace(CALLS, parallel=False)
NOW = '{"name": "now", "arguments": {}}'
BERN = '{"name": "weather", "arguments": {"city": "Bern"}}'
TAGGED = f"<tool_call>\n{BERN}\n</tool_call>"


async def begun(rules: Rules) -> Matcher:
    lark = Lark({})
    HERMES.grammar(lark, rules)
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
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
WHOLE = [BERN, NOW, TAGGED, '{"city": "Bern"}', '{"name": "weather", "arguments": ', '{"name": "other", "arguments": ']


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*SIGNS, *TAGS, *WHOLE]), max_size=30), st.booleans(), st.booleans())
async def test_calls_that_are_read_are_valid(parts: list[str], thinks: bool, parallel: bool) -> None:
    calls = replace(CALLS, parallel=parallel)
    matcher = await begun(Rules(calls, thinks))
    text = "".join(take(matcher, part) for part in parts)
    if not matcher.native.is_accepting():
        return
    parser = Parser(HERMES, calls)
    found: list[list[str]] = []
    for delta in [*parser.feed(text), *parser.finish()]:
        if isinstance(delta, Begun):
            found.append([delta.name])
        elif isinstance(delta, Arguments):
            found[-1].append(delta.text)
    for name, *arguments in found:
        assert name in calls
        jsonschema_rs.validate(dict(calls.schema(name)), json.loads("".join(arguments)))
    assert parallel or len(found) <= 1
