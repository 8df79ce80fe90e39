"""DeepSeek V3.2 and V4: DSML tags, with values as bare text or as JSON, by the `string` attribute."""

from __future__ import annotations

import re
from typing import Any

from api.tools.formats.arguments import ArgumentWriter, collect_value, parameter_rules
from api.tools.formats.base import MessageConstraints, MessageParser, Tool
from api.tools.formats.lark_builder import LarkBuilder
from api.tools.formats.tagged import TaggedFormat
from api.tools.formats.text_buffer import Parse
from api.tools.formats.values import json_or_string, json_types

_DSML, _LINE = "｜DSML｜", "\n"
# The section's tag differs between versions. The last version has a space after ｜DSML｜ in every tag.
_SECTIONS = ("function_calls", "tool_calls", " calls")
_NAME = re.compile(r'name="([^"]*)"')


class Dsml(TaggedFormat):
    """<｜DSML｜invoke name="f"><｜DSML｜parameter name="p" string="true">value</｜DSML｜parameter></｜DSML｜invoke>

    The grammar is written by hand, because the section's tag depends on the model. It permits the first two sections.
    """

    name = "dsml"
    template_substrings = (_DSML,)
    triggers = tuple(f"<{_DSML}{section}>" for section in _SECTIONS)
    markers = (_DSML, "<think>", "</think>")
    separator = ""

    @property
    def trigger(self) -> str:
        return f"<{_DSML}"

    def parse_call(self, parser: MessageParser, trigger: str) -> Parse[bool]:
        buffer, before = parser.buffer, parser.num_calls
        space = " " if trigger == self.triggers[2] else ""
        invoke, parameter = f"<{_DSML}{space}invoke", f"<{_DSML}{space}parameter"
        invoke_end, value_end = f"</{_DSML}{space}invoke>", f"</{_DSML}{space}parameter>"
        end = trigger.replace("<", "</")
        while (marker := (yield from buffer.accept(invoke, end))) == invoke:
            head, closed = yield from buffer.collect((">",))
            name = _NAME.search(head)
            if closed is None or name is None:
                break
            writer = ArgumentWriter(parser, name.group(1))
            while not head.endswith("/") and (marker := (yield from buffer.accept(parameter, invoke_end))) == parameter:
                if not (yield from self._parse_parameter(parser, writer, value_end, (parameter, invoke_end))):
                    return True
            if marker is None:
                break
            writer.close()
        return marker == end or parser.num_calls > before

    def _parse_parameter(
        self, parser: MessageParser, writer: ArgumentWriter, end: str, followers: tuple[str, ...]
    ) -> Parse[bool]:
        head, closed = yield from parser.buffer.collect((">",))
        key = _NAME.search(head)
        if closed is None or key is None:
            return False
        text = yield from collect_value(parser.buffer, end, {end: followers})
        if text is None:
            return False
        if 'string="true"' in head:
            writer.string(key.group(1), text)
        elif 'string="false"' in head:
            writer.json(key.group(1), json_or_string(text))
        else:
            writer.text(key.group(1), text)
        return True

    def grammar(self, lark: LarkBuilder, constraints: MessageConstraints) -> None:
        bodies = []
        if tools := self.bodies(lark, constraints.calls):
            call_list = lark.call_list(tools, "", constraints.calls.parallel)
            for section in _SECTIONS[:2]:
                head, foot = lark.text(f"{section}>{_LINE}"), lark.text(f"</{_DSML}{section}>")
                bodies.append(f"{head} {call_list} {foot}")
        self.message(lark, constraints, bodies, parallel=False)

    def body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        def opening(key: str, schema: Any) -> str:
            text = json_types(schema, tool.parameters) == {"string"}
            return f'<{_DSML}parameter name="{key}" string="{"true" if text else "false"}">'

        rules = parameter_rules(lark, tool, index, opening, f"</{_DSML}parameter>{_LINE}", '">')
        head, foot = lark.text(f'<{_DSML}invoke name="{tool.name}">{_LINE}'), lark.text(f"</{_DSML}invoke>{_LINE}")
        return f"{head} {rules} {foot}"
