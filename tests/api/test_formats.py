"""Every format: what a message is, and that it is the same however its tokens were grouped."""

from __future__ import annotations

import asyncio
import doctest
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.openai.messages import message_of
from api.schema.replies import ChatMessage
from api.tools import formats
from api.tools.formats import (
    FORMATS,
    Arguments,
    Begun,
    Calls,
    Delta,
    Lark,
    Parser,
    Rules,
    Tool,
    format_of,
    lark,
    source,
    values,
)
from engine import Finished, FinishReason, Generation, Request, RequestRefused, Timings, Tokens, Usage
from engine import Lark as LarkForm
from tests.api.samples import CALLS, SAMPLES, Sample
from tests.engine.test_layers import upward
from tests.engine.vocabularies import grammar

Told = tuple[str, str, tuple[tuple[str, str], ...]]
END = Finished(FinishReason.STOP, Usage(1, 0, 1), Timings(0, 0, 0), 1)
sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample.format}-{sample.text[:12]!r}")


def told(message: ChatMessage) -> Told:
    calls = tuple((str(call.function.name), call.function.arguments) for call in message.tool_calls or ())
    return message.content or "", message.reasoning_content or "", calls


def deltas_of(sample: Sample, pieces: Sequence[str], calls: Calls = CALLS, *, split: bool = True) -> list[Delta]:
    parser = Parser(sample.reader, calls, opened=sample.opened, split=split)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return [*deltas, *parser.finish()]


def read(sample: Sample, pieces: Sequence[str], calls: Calls = CALLS, *, split: bool = True) -> Told:
    return told(message_of(deltas_of(sample, pieces, calls, split=split)))


def due(sample: Sample) -> Told:
    return sample.content, sample.reasoning, sample.calls


def twelve(text: str) -> list[str]:
    """The text as twelve tokens, or as many as it has characters."""
    count = min(12, len(text))
    ends = [len(text) * place // count for place in range(count + 1)]
    return [text[start:end] for start, end in pairwise(ends)]


def groupings(tokens: Sequence[str]) -> Iterator[list[str]]:
    """Every way of grouping tokens into steps."""
    for cuts in range(2 ** (len(tokens) - 1)):
        steps = [tokens[0]]
        for place, token in enumerate(tokens[1:]):
            if cuts >> place & 1:
                steps.append(token)
            else:
                steps[-1] += token
        yield steps


@sample
def test_a_whole_message(sample: Sample) -> None:
    assert read(sample, [sample.text]) == due(sample)


@sample
def test_every_way_of_grouping_twelve_tokens(sample: Sample) -> None:
    assert all(read(sample, steps) == due(sample) for steps in groupings(twelve(sample.text)))


@given(st.sampled_from(SAMPLES), st.lists(st.integers(1, 9), max_size=120))
def test_any_pieces(sample: Sample, sizes: list[int]) -> None:
    pieces, rest = [], sample.text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    assert read(sample, [*pieces, rest]) == due(sample)


@given(st.sampled_from(SAMPLES), st.data())
def test_a_message_that_is_cut_off_anywhere(sample: Sample, data: st.DataObject) -> None:
    """Also there the pieces do not matter, and what was told of calls is a beginning of what they would have been."""
    text = sample.text[: data.draw(st.integers(0, len(sample.text)))]
    whole = read(sample, [text])
    assert read(sample, list(text)) == whole
    for (name, arguments), (due_name, due_arguments) in zip(whole[2], sample.calls, strict=False):
        assert name == due_name
        assert due_arguments.startswith(arguments)


@given(
    st.sampled_from(SAMPLES), st.lists(st.integers(1, 12), max_size=60), st.sampled_from(["", "東", "days", "</", "So"])
)
async def test_from_bytes_of_tokens_with_stop_strings(sample: Sample, sizes: list[int], stop: str) -> None:
    """Tokens are single bytes here, so that steps end inside of characters, and control tokens stand for markers."""

    async def streamed(steps: Sequence[Sequence[int]]) -> Told:
        control = {marker: 256 + index for index, marker in enumerate(sample.reader.markers)}
        spelled = tuple((token, marker) for marker, token in control.items())
        request = Request(prompt=(1,), stop=(stop,) if stop else (), spelled=spelled)
        generation = Generation(request, lambda token: bytes([token]), lambda _: None, lambda _: None)
        parser = Parser(sample.reader, CALLS, opened=sample.opened)
        for step in steps:
            generation.deliver_tokens(step)
        generation.deliver_end(END)
        deltas: list[Delta] = []
        async for update in generation:
            deltas += parser.feed(update.text) if isinstance(update, Tokens) else parser.finish()
        return told(message_of(deltas))

    tokens = tokens_of(sample)
    steps, at = [], 0
    for size in sizes:
        steps.append(tokens[at : at + size])
        at += size
    before = sample.text.partition(stop)[0] if stop else sample.text
    assert await streamed([*steps, tokens[at:]]) == read(sample, [before])
    await asyncio.sleep(0)


def tokens_of(sample: Sample) -> list[int]:
    """The bytes of the text, and 256 on for its markers."""
    tokens: list[int] = []
    text = sample.text
    while text:
        found = next((i for i, marker in enumerate(sample.reader.markers) if text.startswith(marker)), None)
        if found is None:
            tokens += text[0].encode()
            text = text[1:]
        else:
            tokens.append(256 + found)
            text = text.removeprefix(sample.reader.markers[found])
    return tokens


@sample
def test_a_call_begins_once_and_its_index_counts(sample: Sample) -> None:
    deltas = deltas_of(sample, list(sample.text))
    begun = [each for each in deltas if isinstance(each, Begun)]
    assert [each.index for each in begun] == list(range(len(sample.calls)))
    assert len({each.id for each in begun}) == len(begun)
    for at, each in enumerate(deltas):
        if isinstance(each, Arguments):
            assert any(isinstance(other, Begun) and other.index == each.index for other in deltas[:at])


def test_arguments_come_as_they_are_written() -> None:
    parser = Parser(format_of("<tool_call>"), CALLS)
    parser.feed('<tool_call>{"name": "weather", "arguments": {"ci')
    assert parser.feed('ty": "Be') == [Arguments(0, 'ty": "Be')]


def test_without_tools_calls_are_text() -> None:
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert read(Sample("hermes", text, "", "", ()), [text], Calls()) == (text, "", ())


def test_reasoning_that_is_not_told_apart_stays_where_it_is() -> None:
    (first, *_) = SAMPLES
    content, reasoning, calls = read(first, list(first.text), split=False)
    assert (content, reasoning, calls) == ("<think>\nhm 🤔\n</think>\n\nSo:", "", first.calls)


def test_a_call_of_something_else_is_text_to_llama() -> None:
    text = '{"name": "other", "parameters": {}}'
    assert read(Sample("llama", text, "", "", ()), [text]) == (text, "", ())


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
def test_values_become_what_the_schema_says(written: str, schema: object, value: str) -> None:
    root = {"type": "object", "properties": {"p": schema}, "$defs": {"list": {"type": "array"}}}
    text = f"<function=f>\n<parameter=p>\n{written}\n</parameter>\n</function>"
    calls = Calls((Tool("f", root),))
    assert read(Sample("qwen-xml", text, "", "", ()), [text], calls)[2] == (("f", f'{{"p": {value}}}'),)


@pytest.mark.parametrize(("name", "bracket"), [("llama", "{"), ("pythonic", "[")])
def test_a_call_after_white_space_is_held_to_its_schema_too(name: str, bracket: str) -> None:
    written = Lark({})
    Sample(name, "", "", "", ()).reader.grammar(written, Rules(CALLS))
    matcher = grammar(LarkForm(str(written))).begin()
    assert matcher.permits(b"hi " + bracket.encode()) == 4
    assert matcher.permits(bracket.encode()) == 1
    assert matcher.permits(b" \n" + bracket.encode()) == 2


def test_names_with_colons() -> None:
    call = "<|tool_call_begin|>functions.a:b:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    text = f"<|tool_calls_section_begin|>{call}<|tool_calls_section_end|>"
    assert read(Sample("kimi", text, "", "", ()), [text])[2] == (("a:b", "{}"),)


def test_half_a_character_is_written_as_an_escape() -> None:
    text = r"[weather(city='\ud83d')]"
    assert read(Sample("pythonic", text, "", "", ()), [text])[2] == (("weather", r'{"city": "\ud83d"}'),)


def test_names_that_python_does_not_know() -> None:
    text = "[weather(from='a, b)', x-y=[1, {'c': None}], days = -2, late=false)]"
    arguments = '{"from": "a, b)", "x-y": [1, {"c": null}], "days": -2, "late": false}'
    assert read(Sample("pythonic", text, "", "", ()), list(text))[2] == (("weather", arguments),)


@pytest.mark.parametrize(("name", "key"), [("qwen-xml", "a>b"), ("dsml", 'a"b'), ("pythonic", "a=b"), ("gemma", "a:b")])
def test_properties_whose_names_cannot_be_written_are_refused(name: str, key: str) -> None:
    calls = Calls((Tool("f", {"type": "object", "properties": {key: {"type": "string"}}}),))
    with pytest.raises(RequestRefused, match="a property named"):
        Sample(name, "", "", "", ()).reader.grammar(Lark({}), Rules(calls))


def test_definitions_that_are_repeated_have_an_end() -> None:
    properties = {f"p{index}": {"$ref": "#/$defs/a"} for index in range(100)}
    schema = {"type": "object", "properties": properties, "$defs": {"a": {"enum": ["x" * 10_000, 1]}}}
    calls = Calls((Tool("f", schema),))
    with pytest.raises(RequestRefused, match="more than 262144 characters"):
        Sample("glm", "", "", "", ()).reader.grammar(Lark({}), Rules(calls))


@pytest.mark.parametrize("module", [formats, lark, source, values], ids=lambda module: module.__name__)
def test_the_examples(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


def test_every_format_has_a_sample() -> None:
    assert {format.name for format in FORMATS} == {sample.format for sample in SAMPLES}


def test_imports_point_down() -> None:
    layers = """
    deltas source lark
    base
    objects values
    parameters notation
    deepseek dsml gemma glm harmony hermes kimi kimi_xtml llama mistral qwen_xml
    """
    assert upward("api.tools.formats", layers) == []
