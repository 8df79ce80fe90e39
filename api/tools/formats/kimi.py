"""Kimi K2: a section of calls. A call is an id that contains the tool's name, and JSON arguments."""

from __future__ import annotations

import re

from api.tools.formats.base import MessageParser, Tool
from api.tools.formats.lark_builder import LarkBuilder
from api.tools.formats.tagged import TaggedFormat
from api.tools.formats.text_buffer import Parse

_BEGIN, _END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _ARGUMENTS, _CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_PREFIX = "functions."
_CALL_NUMBER = re.compile(r":\s*\d*\Z")


class Kimi(TaggedFormat):
    """<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{...}<|tool_call_end|>"""

    name = "kimi"
    template_substrings = (_CALL,)
    triggers = (_BEGIN,)
    section_end = _END
    markers = (_BEGIN, _END, _CALL, _ARGUMENTS, _CALL_END, "<think>", "</think>")

    def parse_call(self, parser: MessageParser, trigger: str) -> Parse[bool]:
        buffer = parser.buffer
        while ((yield from buffer.collect((_CALL, _END)))[1]) == _CALL:
            id, end = yield from buffer.collect((_ARGUMENTS,))
            if end is None:
                return True
            parser.begin_call(_CALL_NUMBER.sub("", id.strip().removeprefix(_PREFIX)), id.strip())
            if not (yield from buffer.value(parser.arguments)):
                return True
            yield from buffer.accept(_CALL_END)
        return True

    def call_id(self, index: int, name: str) -> str:
        return f"{_PREFIX}{name}:{index}"

    def body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        head = f"{lark.text(f'{_CALL}{_PREFIX}{tool.name}:')} /[0-9]{{1,3}}/ {lark.text(_ARGUMENTS)}"
        return f"{head} {lark.json(tool.parameters)} {lark.text(_CALL_END)}"
