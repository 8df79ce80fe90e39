"""Kimi K3: XTML, whose elements of special tokens enclose reasoning, answer, calls and each typed argument."""

from __future__ import annotations

import html
import re
from typing import Any

from api.tools.formats.arguments import ArgumentWriter, collect_value, parameter_rules
from api.tools.formats.base import ChatFormat, MessageConstraints, MessageParser, Tool
from api.tools.formats.lark_builder import AFTER_REASONING, LarkBuilder
from api.tools.formats.text_buffer import Parse
from api.tools.formats.values import json_or_string, json_types

_OPEN, _CLOSE, _SEP = "<|open|>", "<|close|>", "<|sep|>"
_RESPONSE, _RESPONSE_END = f"{_OPEN}response{_SEP}", f"{_CLOSE}response{_SEP}"
_TOOLS, _TOOLS_END = f"{_OPEN}tools{_SEP}", f"{_CLOSE}tools{_SEP}"
_CALL, _CALL_END = f"{_OPEN}call", f"{_CLOSE}call"
_ARGUMENT, _ARGUMENT_END = f"{_OPEN}argument", f"{_CLOSE}argument{_SEP}"
_MESSAGE_END = f"{_CLOSE}message{_SEP}"
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


class KimiXtml(ChatFormat):
    """<|open|>call tool="f"<|sep|><|open|>argument key="p" type="string"<|sep|>value<|close|>argument<|sep|>

    Parser and grammar are written by hand: an element encloses the answer too, so there is no free text with triggers.
    """

    name = "kimi-xtml"
    template_substrings = (_OPEN,)
    markers = (_OPEN, _CLOSE, _SEP)
    opens = (f"{_OPEN}think{_SEP}",)
    closes = f"{_CLOSE}think{_SEP}"

    def may_reason(self, template: str) -> bool:
        return True  # the answer must be parsed even without tools, because its tags are not content

    def parse(self, parser: MessageParser) -> Parse[None]:
        buffer = parser.buffer
        if parser.in_reasoning:
            yield from self._parse_reasoning(parser, "")
        while (marker := (yield from buffer.until((_OPEN, _CLOSE), parser.content))) is not None:
            head, end = yield from buffer.collect((_SEP,))
            if end is None:
                return
            if marker == _OPEN and head == "think":
                yield from self._parse_reasoning(parser, self.opens[0])
            elif marker == _OPEN and head == "tools" and parser.calls.tools:
                yield from self._parse_calls(parser)

    def _parse_reasoning(self, parser: MessageParser, tag: str) -> Parse[None]:
        parser.reasoning_tag(tag)
        end = yield from parser.buffer.until((self.closes, _RESPONSE), parser.reasoning)
        parser.reasoning_tag(end or "")
        parser.end_reasoning()

    def _parse_calls(self, parser: MessageParser) -> Parse[None]:
        buffer = parser.buffer
        while (yield from buffer.accept(_CALL)):
            head, end = yield from buffer.collect((_SEP,))
            if end is None:
                return
            writer = ArgumentWriter(parser, _attributes(head).get("tool", ""))
            while (yield from buffer.accept(_ARGUMENT)):
                if not (yield from self._parse_argument(parser, writer)):
                    return
            if not (yield from buffer.accept(f"{_CALL_END}{_SEP}")):
                return
            writer.close()

    def _parse_argument(self, parser: MessageParser, writer: ArgumentWriter) -> Parse[bool]:
        head, end = yield from parser.buffer.collect((_SEP,))
        if end is None:
            return False
        text = yield from collect_value(parser.buffer, _ARGUMENT_END, {_ARGUMENT_END: (_ARGUMENT, _CALL_END)})
        if text is None:
            return False
        attributes = _attributes(head)
        key = attributes.get("key", "")
        if attributes.get("type") == "string":
            writer.string(key, text)
        else:
            writer.json(key, json_or_string(text))
        return True

    def grammar(self, lark: LarkBuilder, constraints: MessageConstraints) -> None:
        reasoning = f"{lark.text_until('thought', self.closes)} {AFTER_REASONING}"
        if not constraints.in_reasoning:
            reasoning = f"({lark.text(self.opens[0])} {reasoning})?"
        start, end = lark.text(_RESPONSE), lark.text(_RESPONSE_END)
        response = f"{start}? {lark.text_until('response', _RESPONSE_END)}"
        if constraints.answer is not None:
            response = f"{start}? {constraints.answer} {end}"
        done = f"({lark.text(_MESSAGE_END)})?"
        if not constraints.calls.tools:
            lark.rule("start", f"{reasoning} {response} {done}")
            return
        tools = [
            lark.rule(f"tool_{index}", self._body(lark, each, index))
            for index, each in enumerate(constraints.calls.tools)
        ]
        calls = lark.call_list(tools, "", constraints.calls.parallel)
        section = f"{lark.text(_TOOLS)} {calls} {lark.text(_TOOLS_END)}"
        if constraints.calls.required:
            lark.rule("start", f"{reasoning} ({start}? {end})? {section} {done}")
        else:
            lark.rule("start", f"{reasoning} {response} ({section})? {done}")

    def _body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        def opening(key: str, schema: Any) -> str:
            kinds = sorted(json_types(schema, tool.parameters)) or ["object"]
            kind = "number" if kinds[0] == "integer" else kinds[0]
            return f'{_ARGUMENT} key="{html.escape(key)}" type="{kind}"{_SEP}'

        rules = parameter_rules(lark, tool, index, opening, _ARGUMENT_END)
        head = lark.text(f'{_CALL} tool="{tool.name}" index="')
        return f"{head} /[0-9]{{1,3}}/ {lark.text(f'{chr(34)}{_SEP}')} {rules} {lark.text(f'{_CALL_END}{_SEP}')}"


def _attributes(head: str) -> dict[str, str]:
    return {name: html.unescape(value) for name, value in _ATTRIBUTE.findall(head)}
