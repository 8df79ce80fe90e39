"""Hermes and Qwen: JSON in <tool_call> tags, in fences or bare. Also what templates without tools are taught."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from api.tools.formats.base import Calls, Parser, Tagged, Tool
from api.tools.formats.lark import Lark, Untagged
from api.tools.formats.objects import FENCE, FENCES, object_body, read_object, read_untagged, untagged_calls
from api.tools.formats.source import Reading


class Hermes(Tagged):
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>. Small models write a fence of Markdown instead of the
    tags, or nothing at all where they begin, as llama.cpp reads them too."""

    name = "hermes"
    signs = ("<tool_call>",)
    triggers = ("<tool_call>", *FENCES)
    fences = FENCES
    markers = ("<tool_call>", "</tool_call>", "<think>", "</think>")

    def call(self, parser: Parser, trigger: str) -> Reading[bool]:
        if trigger in FENCES:
            end, found = FENCE, (yield from read_untagged(parser))
        else:
            end, found = "</tool_call>", (yield from read_object(parser))
        if found:
            yield from parser.source.takes(end)
        return found

    def first(self, parser: Parser) -> Reading[None]:
        if parser.calls.tools and (yield from read_untagged(parser)):
            yield from parser.source.takes("</tool_call>")

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        end = lark.text("\n</tool_call>")
        return f'"\\n" {object_body(lark, tool, index)} {end}'

    def untagged(self, lark: Lark, calls: Calls) -> Untagged | None:
        return untagged_calls(lark, calls)


class Generic(Hermes):
    """The same for models whose template knows no tools: a system text describes them."""

    name = "generic"
    signs = ("",)


def described(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a model is told about tools and how to call them, if its template does not."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You may call functions to help with the user's request. Their signatures:\n"
        f"<tools>\n{listed}\n</tools>\n\n"
        "To call one, answer with its name and arguments as JSON between these tags:\n"
        '<tool_call>\n{"name": "the name", "arguments": {"a name": "a value"}}\n</tool_call>'
    )
