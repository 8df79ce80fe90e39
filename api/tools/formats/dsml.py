"""DeepSeek V3.2 and V4: DSML, tags whose values are text, or JSON where they say so."""

from __future__ import annotations

import re
from typing import Any

from api.tools.formats.base import Parser, Rules, Tagged, Tool
from api.tools.formats.lark import Lark
from api.tools.formats.parameters import Members, parameter_rules
from api.tools.formats.source import Reading
from api.tools.formats.values import raw_json, types

_HEADS = ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>", "<｜DSML｜ calls>")
_DSML, _LINE = "｜DSML｜", "\n"
_NAME = re.compile(r'name="([^"]*)"')


class Dsml(Tagged):
    """<｜DSML｜invoke name="f"><｜DSML｜parameter name="p" string="true">value</｜DSML｜parameter></｜DSML｜invoke>"""

    name = "dsml"
    signs = ("｜DSML｜",)
    triggers = _HEADS
    markers = ("｜DSML｜", "<think>", "</think>")
    joint = ""

    @property
    def trigger(self) -> str:
        return f"<{_DSML}"

    def call(self, parser: Parser, trigger: str) -> Reading[bool]:
        source, begun = parser.source, parser.begun
        space = " " if trigger == _HEADS[2] else ""
        invoke, parameter = f"<｜DSML｜{space}invoke", f"<｜DSML｜{space}parameter"
        done, valued = f"</｜DSML｜{space}invoke>", f"</｜DSML｜{space}parameter>"
        end = trigger.replace("<", "</")
        while (sign := (yield from source.takes(invoke, end))) == invoke:
            head, closed = yield from source.collect((">",))
            name = _NAME.search(head)
            if closed is None or name is None:
                break
            members = Members(parser, name.group(1))
            while not head.endswith("/") and (sign := (yield from source.takes(parameter, done))) == parameter:
                if not (yield from self._parameter(parser, members, valued, (parameter, done))):
                    return True
            if sign is None:
                return members.begun
            members.close()
        return sign == end or parser.begun > begun

    def _parameter(self, parser: Parser, members: Members, end: str, after: tuple[str, ...]) -> Reading[bool]:
        source = parser.source
        head, closed = yield from source.collect((">",))
        key, parts = _NAME.search(head), list[str]()
        if closed is None or key is None:
            return False
        while True:
            if (yield from source.until((end,), parts.append)) is None:
                return False
            if (yield from source.sees(*after)) is not None:
                break
            parts.append(end)
        text = "".join(parts)
        if 'string="true"' in head:
            members.string(key.group(1), text)
        elif 'string="false"' in head:
            members.json(key.group(1), raw_json(text))
        else:
            members.text(key.group(1), text)
        return True

    def grammar(self, lark: Lark, rules: Rules) -> None:
        bodies = []
        if tools := self.bodies(lark, rules.calls):
            several = lark.several(tools, "", rules.calls.parallel)
            kinds = ("function_calls", "tool_calls")  # which of them the model knows is not told here
            bodies = [f"{lark.text(f'{kind}>{_LINE}')} {several} {lark.text(f'</{_DSML}{kind}>')}" for kind in kinds]
        self.message(lark, rules, bodies, parallel=False)

    def body(self, lark: Lark, tool: Tool, index: int) -> str:
        def opening(key: str, schema: Any) -> str:
            text = types(schema, tool.parameters) == {"string"}
            return f'<{_DSML}parameter name="{key}" string="{"true" if text else "false"}">'

        rules = parameter_rules(lark, tool, index, opening, f"</{_DSML}parameter>\n", '">')
        head, foot = lark.text(f'<{_DSML}invoke name="{tool.name}">\n'), lark.text(f"</{_DSML}invoke>\n")
        return f"{head} {rules} {foot}"
