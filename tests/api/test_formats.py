"""Each chat format: the parsed message does not depend on the cuts of the text."""

from __future__ import annotations

import asyncio
import doctest
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.openai.messages import message_from_deltas
from api.schema.replies import ChatMessage
from api.tools import formats
from api.tools.formats import (
    CHAT_FORMATS,
    AllowedCalls,
    ArgumentsDelta,
    LarkBuilder,
    MessageConstraints,
    MessageDelta,
    MessageParser,
    StopRanges,
    Tool,
    ToolCallStart,
    format_of,
    lark_builder,
    values,
)
from engine import Finished, FinishReason, Generation, Request, RequestRefused, Timings, Tokens, Usage
from engine import Lark as LarkForm
from engine.text import Detokenizer
from tests.api.samples import CALLS, SAMPLES, FormatSample
from tests.engine.vocabularies import grammar

Parsed = tuple[str, str, tuple[tuple[str, str], ...]]
END = Finished(FinishReason.STOP, Usage(1, 0, 1), Timings(0, 0, 0), 1)
sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample.format}-{sample.text[:12]!r}")


def fields_of(message: ChatMessage) -> Parsed:
    calls = tuple((str(call.function.name), call.function.arguments) for call in message.tool_calls or ())
    return message.content or "", message.reasoning_content or "", calls


def deltas_of(
    sample: FormatSample, pieces: Sequence[str], calls: AllowedCalls = CALLS, *, split: bool = True
) -> list[MessageDelta]:
    parser = MessageParser(sample.chat_format, calls, in_reasoning=sample.in_reasoning, split_reasoning=split)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return [*deltas, *parser.finish()]


def parse(sample: FormatSample, pieces: Sequence[str], calls: AllowedCalls = CALLS, *, split: bool = True) -> Parsed:
    return fields_of(message_from_deltas(deltas_of(sample, pieces, calls, split=split)))


def expected(sample: FormatSample) -> Parsed:
    return sample.content, sample.reasoning, sample.calls


def split_in_twelve(text: str) -> list[str]:
    """Returns the text in twelve parts, or in single characters if the text is shorter."""
    count = min(12, len(text))
    ends = [len(text) * position // count for position in range(count + 1)]
    return [text[start:end] for start, end in pairwise(ends)]


def groupings(tokens: Sequence[str]) -> Iterator[list[str]]:
    """Yields every way of grouping tokens into steps."""
    for cuts in range(2 ** (len(tokens) - 1)):
        steps = [tokens[0]]
        for position, token in enumerate(tokens[1:]):
            if cuts >> position & 1:
                steps.append(token)
            else:
                steps[-1] += token
        yield steps


@sample
def test_a_whole_message(sample: FormatSample) -> None:
    assert parse(sample, [sample.text]) == expected(sample)


@sample
def test_every_way_of_grouping_twelve_tokens(sample: FormatSample) -> None:
    assert all(parse(sample, steps) == expected(sample) for steps in groupings(split_in_twelve(sample.text)))


@given(st.sampled_from(SAMPLES), st.lists(st.integers(1, 9), max_size=120))
def test_any_cuts(sample: FormatSample, sizes: list[int]) -> None:
    pieces, rest = [], sample.text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    assert parse(sample, [*pieces, rest]) == expected(sample)


@given(st.sampled_from(SAMPLES), st.data())
def test_truncated_messages(sample: FormatSample, data: st.DataObject) -> None:
    """The parse of a truncated message does not depend on the cuts, and its calls are prefixes of the whole message's
    calls."""
    text = sample.text[: data.draw(st.integers(0, len(sample.text)))]
    whole = parse(sample, [text])
    assert parse(sample, list(text)) == whole
    for (name, arguments), (due_name, due_arguments) in zip(whole[2], sample.calls, strict=False):
        assert name == due_name
        assert due_arguments.startswith(arguments)


# Without a trigger, the beginning of a call is a text like any other.
TRIGGERED = [sample for sample in SAMPLES if not re.search(r"^\s*[{\[]|```|</think>\s*{", sample.text)]


@pytest.mark.parametrize("sample", TRIGGERED, ids=lambda sample: f"{sample.format}-{sample.text[:12]!r}")
def test_the_beginning_of_a_marker_is_no_content(sample: FormatSample) -> None:
    """However an output is truncated, its content and reasoning are beginnings of those of the whole output."""
    for end in range(len(sample.text)):
        parser = MessageParser(sample.chat_format, CALLS, in_reasoning=sample.in_reasoning)
        deltas = [*parser.feed(sample.text[:end]), *parser.finish(truncated=True)]
        content, reasoning, _ = fields_of(message_from_deltas(deltas))
        assert sample.content.startswith(content.rstrip())
        assert sample.reasoning.startswith(reasoning)


def test_a_whole_answer_may_end_with_the_beginning_of_a_marker() -> None:
    assert parse(FormatSample("hermes", "a <", "", "", ()), ["a <"]) == ("a <", "", ())


def test_a_call_cut_in_its_closing_tag_has_no_content() -> None:
    whole = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for end in range(whole.index("}}") + 2, len(whole)):
        assert parse(FormatSample("hermes", "", "", "", ()), list(whole[:end])) == ("", "", (("now", "{}"),))


@pytest.mark.parametrize(("text", "complete"), [("{}", True), ('{"city": "', False), ("", False)])
def test_calls_are_complete_if_their_arguments_are_json(text: str, complete: bool) -> None:
    parser = MessageParser(format_of("[ARGS]"), CALLS)
    parser.feed(f"[TOOL_CALLS]now[ARGS]{{}}[TOOL_CALLS]weather[ARGS]{text}")
    parser.finish()
    assert (parser.num_calls, parser.has_complete_calls) == (2, complete)


@given(st.sampled_from(SAMPLES), st.data(), st.sampled_from(["東", "Zü", '"', "}", "</", "\n", "weather", "=", "<"]))
def test_stop_strings_apply_outside_of_calls(sample: FormatSample, data: st.DataObject, stop: str) -> None:
    """No call is cut, in any grouping of tokens; content and reasoning end before the stop string."""

    def streamed(sizes: Sequence[int]) -> tuple[Parsed, str | None]:
        scope = StopRanges(sample.chat_format, CALLS, in_reasoning=sample.in_reasoning)
        detokenizer, rest, text = Detokenizer((stop,), scope=scope), sample.text.encode(), ""
        for size in [*sizes, len(rest)]:
            text += detokenizer.feed(rest[:size]).text
            rest = rest[size:]
        return parse(sample, [text + detokenizer.finish().text]), detokenizer.stopped_by

    found, stopped_by = streamed(data.draw(st.lists(st.integers(1, 12), max_size=60)))
    assert (found, stopped_by) == streamed([])
    content, _, calls = found
    assert sample.calls[: len(calls)] == calls
    assert sample.content.startswith(content.rstrip())
    if stopped_by is None:
        assert found == expected(sample)
    if "<think" not in sample.text:
        assert stop not in content


@given(
    st.sampled_from(SAMPLES), st.lists(st.integers(1, 12), max_size=60), st.sampled_from(["", "東", "days", "</", "So"])
)
async def test_byte_tokens_with_stop_strings(sample: FormatSample, sizes: list[int], stop: str) -> None:
    """Tokens are single bytes, so that steps end inside of characters, and control tokens are markers."""

    async def streamed(steps: Sequence[Sequence[int]]) -> Parsed:
        control = {marker: 256 + index for index, marker in enumerate(sample.chat_format.markers)}
        control_texts = tuple((token, marker) for marker, token in control.items())
        request = Request(prompt=(1,), stop=(stop,) if stop else (), control_texts=control_texts)
        generation = Generation(request, lambda token: bytes([token]), lambda _: None, lambda _: None)
        parser = MessageParser(sample.chat_format, CALLS, in_reasoning=sample.in_reasoning)
        for step in steps:
            generation.deliver_tokens(step)
        generation.deliver_end(END)
        deltas: list[MessageDelta] = []
        async for update in generation:
            deltas += parser.feed(update.text) if isinstance(update, Tokens) else parser.finish()
        return fields_of(message_from_deltas(deltas))

    tokens = tokens_of(sample)
    steps, at = [], 0
    for size in sizes:
        steps.append(tokens[at : at + size])
        at += size
    before = sample.text.partition(stop)[0] if stop else sample.text
    assert await streamed([*steps, tokens[at:]]) == parse(sample, [before])
    await asyncio.sleep(0)


def tokens_of(sample: FormatSample) -> list[int]:
    """Returns the bytes of the text, and ids from 256 on for its markers."""
    tokens: list[int] = []
    text = sample.text
    while text:
        found = next((i for i, marker in enumerate(sample.chat_format.markers) if text.startswith(marker)), None)
        if found is None:
            tokens += text[0].encode()
            text = text[1:]
        else:
            tokens.append(256 + found)
            text = text.removeprefix(sample.chat_format.markers[found])
    return tokens


@sample
def test_each_call_starts_once_with_the_next_index(sample: FormatSample) -> None:
    deltas = deltas_of(sample, list(sample.text))
    begun = [each for each in deltas if isinstance(each, ToolCallStart)]
    assert [each.index for each in begun] == list(range(len(sample.calls)))
    assert len({each.id for each in begun}) == len(begun)
    for at, each in enumerate(deltas):
        if isinstance(each, ArgumentsDelta):
            assert any(isinstance(other, ToolCallStart) and other.index == each.index for other in deltas[:at])


def test_arguments_are_streamed() -> None:
    parser = MessageParser(format_of("<tool_call>"), CALLS)
    parser.feed('<tool_call>{"name": "weather", "arguments": {"ci')
    assert parser.feed('ty": "Be') == [ArgumentsDelta(0, 'ty": "Be')]


def test_calls_without_tools_are_content() -> None:
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert parse(FormatSample("hermes", text, "", "", ()), [text], AllowedCalls()) == (text, "", ())


def test_reasoning_without_split_is_content() -> None:
    (first, *_) = SAMPLES
    content, reasoning, calls = parse(first, list(first.text), split=False)
    assert (content, reasoning, calls) == ("<think>\nhm 🤔\n</think>\n\nSo:", "", first.calls)


def test_a_bare_call_of_an_unknown_tool_is_content() -> None:
    text = '{"name": "other", "parameters": {}}'
    assert parse(FormatSample("llama", text, "", "", ()), [text]) == (text, "", ())


@pytest.mark.parametrize(
    ("written", "schema", "value"),
    [
        ("7", {"type": "integer"}, "7"),
        ("7", {"type": "string"}, '"7"'),
        ("True", {"type": "boolean"}, "true"),
        ("null", {"type": ["string", "null"]}, "null"),
        ("text", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, '"text"'),
        ('["a"]', {"$ref": "#/$defs/list"}, '["a"]'),
        ("07", {"enum": ["07"]}, '"07"'),
    ],
)
def test_values_get_the_types_of_the_schema(written: str, schema: object, value: str) -> None:
    root = {"type": "object", "properties": {"p": schema}, "$defs": {"list": {"type": "array"}}}
    text = f"<function=f>\n<parameter=p>\n{written}\n</parameter>\n</function>"
    calls = AllowedCalls((Tool("f", root),))
    assert parse(FormatSample("qwen-xml", text, "", "", ()), [text], calls)[2] == (("f", f'{{"p": {value}}}'),)


@pytest.mark.parametrize(("name", "bracket"), [("llama", "{"), ("pythonic", "[")])
def test_a_bare_call_after_white_space_is_constrained(name: str, bracket: str) -> None:
    written = LarkBuilder({})
    FormatSample(name, "", "", "", ()).chat_format.grammar(written, MessageConstraints(CALLS))
    matcher = grammar(LarkForm(str(written))).begin()
    assert matcher.validate_tokens(b"hi " + bracket.encode()) == 4
    assert matcher.validate_tokens(bracket.encode()) == 1
    assert matcher.validate_tokens(b" \n" + bracket.encode()) == 2


def test_names_with_colons() -> None:
    call = "<|tool_call_begin|>functions.a:b:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    text = f"<|tool_calls_section_begin|>{call}<|tool_calls_section_end|>"
    assert parse(FormatSample("kimi", text, "", "", ()), [text])[2] == (("a:b", "{}"),)


def test_lone_surrogates_are_escaped() -> None:
    text = r"[weather(city='\ud83d')]"
    assert parse(FormatSample("pythonic", text, "", "", ()), [text])[2] == (("weather", r'{"city": "\ud83d"}'),)


def test_names_that_are_not_python() -> None:
    text = "[weather(from='a, b)', x-y=[1, {'c': None}], days = -2, late=false)]"
    arguments = '{"from": "a, b)", "x-y": [1, {"c": null}], "days": -2, "late": false}'
    assert parse(FormatSample("pythonic", text, "", "", ()), list(text))[2] == (("weather", arguments),)


@pytest.mark.parametrize(("name", "key"), [("qwen-xml", "a>b"), ("dsml", 'a"b'), ("pythonic", "a=b"), ("gemma", "a:b")])
def test_unsupported_property_names_are_refused(name: str, key: str) -> None:
    calls = AllowedCalls((Tool("f", {"type": "object", "properties": {key: {"type": "string"}}}),))
    with pytest.raises(RequestRefused, match="a property named"):
        FormatSample(name, "", "", "", ()).chat_format.grammar(LarkBuilder({}), MessageConstraints(calls))


def test_repeated_definitions_are_limited() -> None:
    properties = {f"p{index}": {"$ref": "#/$defs/a"} for index in range(100)}
    schema = {"type": "object", "properties": properties, "$defs": {"a": {"enum": ["x" * 10_000, 1]}}}
    calls = AllowedCalls((Tool("f", schema),))
    with pytest.raises(RequestRefused, match="more than 262144 characters"):
        FormatSample("glm", "", "", "", ()).chat_format.grammar(LarkBuilder({}), MessageConstraints(calls))


@pytest.mark.parametrize("module", [formats, lark_builder, values], ids=lambda module: module.__name__)
def test_doctests(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


def test_every_format_has_a_sample() -> None:
    assert {format.name for format in CHAT_FORMATS} == {sample.format for sample in SAMPLES}


def test_a_malformed_call_after_a_complete_call() -> None:
    complete = '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n'
    text = f'<｜DSML｜tool_calls>\n{complete}<｜DSML｜invoke name="now">no tag'
    assert parse(FormatSample("dsml", text, "", "", ()), [text]) == ("no tag", "", (("now", "{}"),))
