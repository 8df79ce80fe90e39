"""GLM 4.5 and later: the name, then keys and values in tags. Values are bare text."""

from __future__ import annotations

from api.tools.formats.arguments import ArgumentWriter, parameter_rules
from api.tools.formats.base import MessageParser, Tool
from api.tools.formats.lark_builder import LarkBuilder
from api.tools.formats.tagged import TaggedFormat
from api.tools.formats.text_buffer import Parse

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_KEY, _KEY_END = "<arg_key>", "</arg_key>"
_VALUE, _VALUE_END = "<arg_value>", "</arg_value>"
_LINE = "\n"


class Glm(TaggedFormat):
    """<tool_call>f<arg_key>p</arg_key><arg_value>value</arg_value></tool_call>, with line breaks in GLM 4.5."""

    name = "glm"
    template_substrings = (_KEY,)
    triggers = (_CALL,)
    markers = (_CALL, _CALL_END, _KEY, _KEY_END, _VALUE, _VALUE_END, "<think>", "</think>")

    def parse_call(self, parser: MessageParser, trigger: str) -> Parse[bool]:
        buffer = parser.buffer
        name, marker = yield from buffer.collect((_KEY, _CALL_END))
        if marker is None or not name.strip():
            return False
        writer = ArgumentWriter(parser, name.strip())
        while marker == _KEY:
            key, end = yield from buffer.collect((_KEY_END,))
            if end is None or not (yield from buffer.accept(_VALUE)):
                return writer.begun
            value = yield from self._parse_value(parser)
            if value is None:
                return True
            writer.text(key.strip(), value)
            marker = yield from buffer.accept(_KEY, _CALL_END)
        if marker is None:
            return writer.begun
        writer.close()
        return True

    def _parse_value(self, parser: MessageParser) -> Parse[str | None]:
        """Returns a value. Returns None if the text ends first.

        Unlike in `collect_value`, the value's end tag may be missing: </tool_call> also ends the value if the text ends
        after it or another call follows.
        """
        buffer, parts = parser.buffer, list[str]()
        while (end := (yield from buffer.until((_VALUE_END, _CALL_END), parts.append))) is not None:
            buffer.mark(len(end))
            if end == _VALUE_END and (yield from buffer.peek(_KEY, _CALL_END)) is not None:
                buffer.drop_mark()
                return "".join(parts)
            if end == _CALL_END and (yield from self._at_end_of_call(parser)):
                buffer.rewind()
                return "".join(parts)
            buffer.rewind()
            parts.append(buffer.advance(len(end)))
        return None

    def _at_end_of_call(self, parser: MessageParser) -> Parse[bool]:
        """True if the text ends here or another call follows."""
        while not parser.buffer.rest.strip():
            if parser.buffer.ended:
                return True
            yield
        return (yield from parser.buffer.peek(_CALL)) is not None

    def body(self, lark: LarkBuilder, tool: Tool, index: int) -> str:
        rules = parameter_rules(lark, tool, index, lambda key, _: f"\n{_KEY}{key}{_KEY_END}\n{_VALUE}", _VALUE_END)
        return f"{lark.text(tool.name)} {rules} {lark.text(f'{_LINE}{_CALL_END}')}"
