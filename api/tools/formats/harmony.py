"""gpt-oss: Harmony, whose turns consist of messages with a channel each. A message with a recipient is a call."""

from __future__ import annotations

import re

from api.tools.formats.base import ChatFormat, MessageConstraints, MessageParser, Tool
from api.tools.formats.lark_builder import LarkBuilder
from api.tools.formats.text_buffer import Parse, TextSink

_START, _CHANNEL, _CONSTRAIN, _MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
_END = "<|end|>"
_ENDS = (_END, "<|call|>", "<|return|>")
_FUNCTIONS = "functions."
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=([^\s<]+)")


class Harmony(ChatFormat):
    """<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>

    Parser and grammar are written by hand: the answer has a header too, so there is no free text with triggers.
    """

    name = "harmony"
    template_substrings = (_CHANNEL,)
    markers = (_START, _MESSAGE, *_ENDS, _CHANNEL, _CONSTRAIN)
    opens = ()
    closes = ""

    def may_reason(self, template: str) -> bool:
        return True  # the answer must be parsed even without tools, because its header is not content

    def parse(self, parser: MessageParser) -> Parse[None]:
        buffer, started = parser.buffer, False
        while True:
            buffer.mark()
            head, end = yield from buffer.collect((_MESSAGE,))
            if end is None and not started and "<|" not in head and not head.lstrip().startswith("to="):
                buffer.rewind()  # text without a header is content
                yield from buffer.until((_START, _CHANNEL, _MESSAGE), parser.content)
            buffer.clear_marks()
            if end is None:
                return
            if not (yield from self._parse_message(parser, head.rpartition(_START)[2])):
                return
            started = (yield from buffer.accept(_START)) is not None

    def _parse_message(self, parser: MessageParser, head: str) -> Parse[bool]:
        """Parses a message after its header. Returns False at the end of the text."""
        recipient = (_RECIPIENT.findall(head) or [""])[-1]
        channel = (_CHANNEL_NAME.findall(head) or ["final"])[-1]
        if recipient.startswith(_FUNCTIONS) and parser.calls.tools:
            parser.begin_call(recipient.removeprefix(_FUNCTIONS))
            yield from parser.buffer.value(parser.arguments)
            return (yield from self._parse_body(parser, _discard))
        if recipient not in ("", "assistant", "all"):
            return (yield from self._parse_body(parser, _discard))
        if channel != "analysis":
            return (yield from self._parse_body(parser, parser.content))
        parser.reasoning_tag(f"{head}{_MESSAGE}")
        more = yield from self._parse_body(parser, parser.reasoning)
        parser.reasoning_tag(_END)
        parser.end_reasoning()
        return more

    def _parse_body(self, parser: MessageParser, sink: TextSink) -> Parse[bool]:
        """Passes a message to `sink` up to its end marker. Returns False if the text ends without an end marker.

        An end marker that neither the next message nor the end of the text follows is part of the message.
        """
        buffer = parser.buffer
        while (end := (yield from buffer.until(_ENDS, sink))) is not None:
            while not buffer.rest and not buffer.ended:
                yield
            if not buffer.rest or (yield from buffer.peek(_START)) is not None:
                return True
            sink(end)
        return False

    def grammar(self, lark: LarkBuilder, constraints: MessageConstraints) -> None:
        body, next_header = lark.text_until("body", _END), lark.text(f"{_START}assistant")
        analysis = lark.rule("analysis", f"{lark.text(f'{_CHANNEL}analysis{_MESSAGE}')} {body} {next_header}")
        preamble = lark.rule("preamble", f"{lark.text(f'{_CHANNEL}commentary{_MESSAGE}')} {body} {next_header}")
        final = lark.rule("final", f"{lark.text(f'{_CHANNEL}final{_MESSAGE}')} {constraints.answer or 'TEXT'}")
        calls = [self._call(lark, tool) for tool in constraints.calls.tools]
        if constraints.calls.required:
            lark.rule("start", f"{analysis}* {lark.any_of(calls)}")
        else:
            lark.rule("start", f"({analysis} | {preamble})* {lark.any_of([final, *calls])}")

    def _call(self, lark: LarkBuilder, tool: Tool) -> str:
        """Returns the expression of a call. The recipient stands after the channel or after the role."""
        recipient = f"to={_FUNCTIONS}{tool.name}"
        in_channel = f"{_CHANNEL}commentary {recipient} {_CONSTRAIN}json{_MESSAGE}"
        in_role = f" {recipient}{_CHANNEL}commentary {_CONSTRAIN}json{_MESSAGE}"
        return f"({lark.text(in_channel)} | {lark.text(in_role)}) {lark.json(tool.parameters)}"


def _discard(text: str) -> None:
    """Drops text: the sink for messages that are neither content nor reasoning."""
