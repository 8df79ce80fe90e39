"""Hermes and Qwen: JSON in <tool_call> tags, or bare. Also what templates without tools are taught."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from api.formats.base import Calls, Parser, Tagged, Tool
from api.formats.lark import Bare, Lark
from api.formats.objects import bare_calls, object_body, read_bare, read_object
from api.formats.source import Reading


class Hermes(Tagged):
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>; small models leave the tags out where they begin."""

    name = "hermes"
    signs = ("<tool_call>",)
    triggers = ("<tool_call>",)
    markers = ("<tool_call>", "</tool_call>", "<think>", "</think>")

    def call(self, parser: Parser, trigger: str) -> Reading[bool]:
        if not (yield from read_object(parser)):
            return False
        yield from parser.source.takes("</tool_call>")
        return True

    def first(self, parser: Parser) -> Reading[None]:
        source = parser.source
        while parser.calls.tools and (yield from source.sees("{")):
            source.mark()
            if not (yield from read_bare(parser)):
                source.rewind()
                break
        if parser.begun:
            yield from source.takes("</tool_call>")

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        end = lark.text("\n</tool_call>")
        return f'"\\n" {object_body(lark, tool, index)} {end}'

    def untagged(self, lark: Lark, calls: Calls) -> Bare | None:
        return bare_calls(lark, calls, self.opens, self.closes) if calls.tools else None


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
