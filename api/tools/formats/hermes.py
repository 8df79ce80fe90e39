"""Hermes and Qwen: JSON in <tool_call> tags, in code fences or bare. Also instructions for templates without tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from api.tools.formats.base import AllowedCalls, MessageParser, Tool
from api.tools.formats.json_calls import (
    FENCE_STARTS,
    bare_calls,
    call_object,
    parse_call_object,
    parse_untagged_calls,
    untagged_calls,
)
from api.tools.formats.lark_builder import LarkBuilder, UntaggedCalls
from api.tools.formats.tagged import TaggedFormat
from api.tools.formats.text_buffer import Parse

_CALL, _CALL_END = "<tool_call>", "</tool_call>"


class Hermes(TaggedFormat):
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>

    Small models write a Markdown code fence instead of the tags, or omit the tags at the start of the answer. Both
    variants are parsed, as in llama.cpp. Required calls may be written so too: a model that never writes the tags often
    ends after its first call if it must.
    """

    name = "hermes"
    template_substrings = (_CALL,)
    triggers = (_CALL, *FENCE_STARTS)
    fences = FENCE_STARTS
    markers = (_CALL, _CALL_END, "<think>", "</think>")

    def parse_call(self, parser: MessageParser, trigger: str) -> Parse[bool]:
        if trigger in FENCE_STARTS:
            end, found = "```", (yield from parse_untagged_calls(parser))
        else:
            end, found = _CALL_END, (yield from parse_call_object(parser))
        if found:
            yield from parser.buffer.accept(end)
        return found

    def parse_answer_start(self, parser: MessageParser) -> Parse[None]:
        if parser.calls.tools and (yield from parse_untagged_calls(parser)):
            yield from parser.buffer.accept(_CALL_END)

    def body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        end = lark.text(f"\n{_CALL_END}")
        return f'"\\n" {call_object(lark, tool, index)} {end}'

    def bare(self, lark: LarkBuilder, calls: AllowedCalls) -> str:
        return bare_calls(lark, calls, self.separator)

    def untagged(self, lark: LarkBuilder, calls: AllowedCalls) -> UntaggedCalls | None:
        return untagged_calls(lark, calls)


class Generic(Hermes):
    """The Hermes format for templates without tools. `tool_instructions` describes the format in the prompt."""

    name = "generic"
    template_substrings = ("",)


def tool_instructions(tools: Sequence[Mapping[str, Any]]) -> str:
    """Returns the prompt text that lists `tools` and describes the notation of calls."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You may call functions to help with the user's request. Their signatures:\n"
        f"<tools>\n{listed}\n</tools>\n\n"
        "To call one, answer with its name and arguments as JSON between these tags:\n"
        f'{_CALL}\n{{"name": "the name", "arguments": {{"a name": "a value"}}}}\n{_CALL_END}'
    )
