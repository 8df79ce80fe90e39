"""Kimi K2: a section of calls, each an id that holds the name, and JSON."""

from __future__ import annotations

import re

from api.tools.formats.base import Parser, Rules, Tagged, Tool
from api.tools.formats.lark import Lark
from api.tools.formats.source import Reading

_BEGIN, _END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_NUMBER = re.compile(r":\s*\d*\Z")
_CALL, _ARGUMENTS, _CALLED = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


class Kimi(Tagged):
    """<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{...}<|tool_call_end|>"""

    name = "kimi"
    signs = (_CALL,)
    triggers = (_BEGIN,)
    markers = (_BEGIN, _END, _CALL, _ARGUMENTS, _CALLED, "<think>", "</think>")

    def call(self, parser: Parser, trigger: str) -> Reading[bool]:
        source = parser.source
        while ((yield from source.collect((_CALL, _END)))[1]) == _CALL:
            id, end = yield from source.collect((_ARGUMENTS,))
            if end is None:
                return True
            parser.begin(_NUMBER.sub("", id.strip().removeprefix("functions.")), id.strip())
            if not (yield from source.value(parser.arguments)):
                return True
            yield from source.takes(_CALLED)
        return True

    def identify(self, index: int, name: str) -> str:
        return f"functions.{name}:{index}"

    def grammar(self, lark: Lark, rules: Rules) -> None:
        self.section(lark, rules, _END)

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        head = f"{lark.text(f'{_CALL}functions.{tool.name}:')} /[0-9]{{1,3}}/ {lark.text(_ARGUMENTS)}"
        return f"{head} {lark.json(tool.parameters)} {lark.text(_CALLED)}"
