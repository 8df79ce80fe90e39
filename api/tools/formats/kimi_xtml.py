"""Kimi K3: XTML, elements of special tokens around everything, arguments each with its type."""

from __future__ import annotations

import html
import re
from typing import Any

from api.tools.formats.base import Format, Parser, Rules, Tool
from api.tools.formats.lark import BREAK, Lark
from api.tools.formats.parameters import Members, parameter_rules
from api.tools.formats.source import Reading
from api.tools.formats.values import raw_json, types

_OPEN, _CLOSE, _SEP = "<|open|>", "<|close|>", "<|sep|>"
_RESPONSE = f"{_OPEN}response{_SEP}"
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


class KimiXtml(Format):
    """<|open|>call tool="f"<|sep|><|open|>argument key="p" type="string"<|sep|>value<|close|>argument<|sep|>"""

    name = "kimi-xtml"
    signs = ("<|open|>",)
    markers = (_OPEN, _CLOSE, _SEP)
    opens = (f"{_OPEN}think{_SEP}",)
    closes = f"{_CLOSE}think{_SEP}"

    def thinks(self, template: str) -> bool:
        return True  # and the answer has to be told from its elements anyway

    def read(self, parser: Parser) -> Reading[None]:
        source = parser.source
        if parser.opened:
            yield from self._think(parser, "")
        while (sign := (yield from source.until((_OPEN, _CLOSE), parser.content))) is not None:
            head, end = yield from source.collect((_SEP,))
            if end is None:
                return
            if sign == _OPEN and head == "think":
                yield from self._think(parser, self.opens[0])
            elif sign == _OPEN and head == "tools" and parser.calls.tools:
                yield from self._tools(parser)

    def _think(self, parser: Parser, tag: str) -> Reading[None]:
        parser.tag(tag)
        source = parser.source
        end = yield from source.until((self.closes, _RESPONSE), parser.reasoning)
        parser.tag(end or "")
        parser.thought()

    def _tools(self, parser: Parser) -> Reading[None]:
        source = parser.source
        while (yield from source.takes(f"{_OPEN}call")):
            head, end = yield from source.collect((_SEP,))
            if end is None:
                return
            members = Members(parser, _attributes(head).get("tool", ""))
            while (yield from source.takes(f"{_OPEN}argument")):
                if not (yield from self._argument(parser, members)):
                    return
            if not (yield from source.takes(f"{_CLOSE}call{_SEP}")):
                return
            members.close()

    def _argument(self, parser: Parser, members: Members) -> Reading[bool]:
        source, parts = parser.source, list[str]()
        head, end = yield from source.collect((_SEP,))
        if end is None:
            return False
        while (end := (yield from source.until((f"{_CLOSE}argument{_SEP}",), parts.append))) is not None:
            if (yield from source.sees(f"{_OPEN}argument", f"{_CLOSE}call")) is not None:
                break
            parts.append(end)
        if end is None:
            return False
        attributes, text = _attributes(head), "".join(parts)
        key = attributes.get("key", "")
        if attributes.get("type") == "string":
            members.string(key, text)
        else:
            members.json(key, raw_json(text))
        return True

    def grammar(self, lark: Lark, rules: Rules) -> None:
        thought = f"{lark.before('thought', self.closes)} {BREAK}"
        if not rules.opened:
            thought = f"({lark.text(self.opens[0])} {thought})?"
        start, end = lark.text(_RESPONSE), lark.text(f"{_CLOSE}response{_SEP}")
        said = f"{start}? {lark.before('said', f'{_CLOSE}response{_SEP}')}"
        if rules.answer is not None:
            said = f"{start}? {rules.answer} {end}"
        done = f"({lark.text(f'{_CLOSE}message{_SEP}')})?"
        if not rules.calls.tools:
            lark.rule("start", f"{thought} {said} {done}")
            return
        tools = [
            lark.rule(f"tool_{index}", self._body(lark, each, index)) for index, each in enumerate(rules.calls.tools)
        ]
        calls = lark.several(tools, "", rules.calls.parallel)
        section = f"{lark.text(f'{_OPEN}tools{_SEP}')} {calls} {lark.text(f'{_CLOSE}tools{_SEP}')}"
        if rules.calls.required:
            lark.rule("start", f"{thought} ({start}? {end})? {section} {done}")
        else:
            lark.rule("start", f"{thought} {said} ({section})? {done}")

    def _body(self, lark: Lark, tool: Tool, index: int) -> str:
        def opening(key: str, schema: Any) -> str:
            kinds = sorted(types(schema, tool.parameters)) or ["object"]
            kind = "number" if kinds[0] == "integer" else kinds[0]
            return f'{_OPEN}argument key="{html.escape(key)}" type="{kind}"{_SEP}'

        rules = parameter_rules(lark, tool, index, opening, f"{_CLOSE}argument{_SEP}")
        head = f"{lark.text(f'{_OPEN}call tool={chr(34)}{tool.name}{chr(34)} index={chr(34)}')} /[0-9]{{1,3}}/"
        return f"{head} {lark.text(chr(34) + _SEP)} {rules} {lark.text(f'{_CLOSE}call{_SEP}')}"


def _attributes(head: str) -> dict[str, str]:
    return {name: html.unescape(value) for name, value in _ATTRIBUTE.findall(head)}
