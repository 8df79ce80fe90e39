"""Turns the deltas of a parsed message into output items and their events, in OpenAI's order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import jiter
import msgspec
from msgspec import UNSET, UnsetType

from api.openai.responses.encoded_reasoning import encode_reasoning
from api.openai.responses.reply import (
    CustomToolCallItem,
    FunctionCallItem,
    ItemStatus,
    MessageItem,
    OutputEvent,
    OutputItem,
    OutputPart,
    OutputTextPart,
    ReasoningItem,
    ReasoningTextPart,
    SummaryTextPart,
)
from api.openai.responses.tools import INPUT_FIELD, CallableTool
from api.schema.replies import TokenLogprob
from api.tools.formats import ArgumentsDelta, ContentDelta, MessageDelta, MessageParser, ReasoningDelta, ToolCallStart


class OpenItem(ABC):
    """An output item whose text is still growing."""

    def __init__(self, output_index: int, id_prefix: str) -> None:
        self.id = f"{id_prefix}_{uuid4().hex}"
        self._output_index = output_index
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    @abstractmethod
    def item(self, status: ItemStatus) -> OutputItem:
        """Returns the item with the text so far; without any part if `status` is `in_progress`."""

    @abstractmethod
    def append(self, text: str, logprobs: Sequence[TokenLogprob]) -> OutputEvent | None:
        """Appends text and returns the event of its type. None if no text for the client is complete yet."""

    def opened(self) -> list[OutputEvent]:
        """Returns the events of a new item."""
        return [self._item_event("added", "in_progress")]

    def closed(self, status: ItemStatus) -> list[OutputEvent]:
        """Returns the events of a complete item."""
        return [self._item_event("done", status)]

    def _item_event(self, kind: str, status: ItemStatus) -> OutputEvent:
        return OutputEvent(type=f"response.output_item.{kind}", output_index=self._output_index, item=self.item(status))

    def _event(self, kind: str, **fields: Any) -> OutputEvent:
        return OutputEvent(type=f"response.{kind}", output_index=self._output_index, item_id=self.id, **fields)


class OpenPartItem(OpenItem):
    """An item whose text is one part of its content or summary."""

    part_events = "content_part"
    """The prefix of the events of the part."""
    text_events: str
    """The prefix of the events of the text."""
    index_field = "content_index"

    @abstractmethod
    def part(self) -> OutputPart:
        """Returns the part with the text so far."""

    def opened(self) -> list[OutputEvent]:
        return [*super().opened(), self._part_event(f"{self.part_events}.added", part=self.part())]

    def append(self, text: str, logprobs: Sequence[TokenLogprob]) -> OutputEvent:
        self._texts.append(text)
        return self._part_event(f"{self.text_events}.delta", delta=text)

    def closed(self, status: ItemStatus) -> list[OutputEvent]:
        return [
            self._part_event(f"{self.text_events}.done", text=self.text),
            self._part_event(f"{self.part_events}.done", part=self.part()),
            *super().closed(status),
        ]

    def _part_event(self, kind: str, **fields: Any) -> OutputEvent:
        return self._event(kind, **{self.index_field: 0}, **fields)


class OpenMessage(OpenPartItem):
    """An assistant's message whose text is still growing."""

    text_events = "output_text"

    def __init__(self, output_index: int) -> None:
        super().__init__(output_index, "msg")
        self._logprobs: list[TokenLogprob] = []

    def part(self) -> OutputTextPart:
        return OutputTextPart(self.text, tuple(self._logprobs))

    def item(self, status: ItemStatus) -> MessageItem:
        return MessageItem(self.id, status, () if status == "in_progress" else (self.part(),))

    def append(self, text: str, logprobs: Sequence[TokenLogprob]) -> OutputEvent:
        event = super().append(text, logprobs)
        self._logprobs.extend(logprobs)
        event.logprobs = logprobs
        return event

    def closed(self, status: ItemStatus) -> list[OutputEvent]:
        events = super().closed(status)
        events[0].logprobs = tuple(self._logprobs)
        return events


class OpenReasoning(OpenPartItem):
    """A reasoning item whose content is still growing."""

    text_events = "reasoning_text"

    def __init__(self, output_index: int, *, encodes: bool) -> None:
        """With `encodes` the item has `encrypted_content`."""
        super().__init__(output_index, "rs")
        self._encodes = encodes

    def part(self) -> OutputPart:
        return ReasoningTextPart(self.text)

    def item(self, status: ItemStatus) -> ReasoningItem:
        content = () if status == "in_progress" else (ReasoningTextPart(self.text),)
        return ReasoningItem(self.id, status, (), content, self._encrypted_content())

    def _encrypted_content(self) -> str | UnsetType:
        return encode_reasoning(self.text) if self._encodes else UNSET


class OpenSummary(OpenReasoning):
    """A reasoning item whose summary is still growing."""

    part_events = "reasoning_summary_part"
    text_events = "reasoning_summary_text"
    index_field = "summary_index"

    def part(self) -> OutputPart:
        return SummaryTextPart(self.text)

    def item(self, status: ItemStatus) -> ReasoningItem:
        summary = () if status == "in_progress" else (SummaryTextPart(self.text),)
        return ReasoningItem(self.id, status, summary, encrypted_content=self._encrypted_content())


class OpenFunctionCall(OpenItem):
    """A function call whose arguments are still growing."""

    def __init__(self, output_index: int, call: ToolCallStart, tool: CallableTool | None) -> None:
        """`tool` is None for a call of a tool that the request does not have."""
        super().__init__(output_index, "fc" if tool is None or tool.type == "function" else "ctc")
        self._call = call
        self._name = tool.name if tool else call.name
        self._namespace = (tool and tool.namespace) or UNSET

    def item(self, status: ItemStatus) -> FunctionCallItem | CustomToolCallItem:
        if status == "completed" and not _is_json(self.text):
            status = "incomplete"
        return FunctionCallItem(self.id, self._call.id, self._name, self.text, status, self._namespace)

    def append(self, text: str, logprobs: Sequence[TokenLogprob]) -> OutputEvent | None:
        self._texts.append(text)
        return self._event("function_call_arguments.delta", delta=text)

    def closed(self, status: ItemStatus) -> list[OutputEvent]:
        return [self._done(), *super().closed(status)]

    def _done(self) -> OutputEvent:
        return self._event("function_call_arguments.done", name=self._name, arguments=self.text)


class OpenCustomCall(OpenFunctionCall):
    """A call of a custom tool whose input, the only text in the arguments, is still growing."""

    _sent = ""

    def item(self, status: ItemStatus) -> CustomToolCallItem:
        if status == "completed" and not _is_json(self.text):
            status = "incomplete"
        return CustomToolCallItem(self.id, self._call.id, self._name, self._input(), status, self._namespace)

    def append(self, text: str, logprobs: Sequence[TokenLogprob]) -> OutputEvent | None:
        self._texts.append(text)
        delta = self._input().removeprefix(self._sent)
        self._sent += delta
        return self._event("custom_tool_call_input.delta", delta=delta) if delta else None

    def _done(self) -> OutputEvent:
        return self._event("custom_tool_call_input.done", input=self._input())

    def _input(self) -> str:
        """Returns the input as far as its JSON is complete."""
        try:
            arguments = jiter.from_json(self.text.encode() or b"{}", partial_mode="trailing-strings")
        except ValueError:
            return self._sent
        value = arguments.get(INPUT_FIELD) if isinstance(arguments, dict) else None
        return value if isinstance(value, str) else ""


class OutputBuilder:
    """Builds the output items of one response and their events from the generated text.

    `items` has the closed items. The last item is open until the kind of text changes or the text ends.
    """

    def __init__(
        self,
        parser: MessageParser | None,
        tools: Mapping[str, CallableTool] | None = None,
        *,
        summary: bool,
        encodes_reasoning: bool = False,
    ) -> None:
        """Without a `parser` the text is the content. `tools` are those of the request by their names in the chat.

        With `summary` reasoning is the summary of its item, with `encodes_reasoning` also its `encrypted_content`.
        """
        self._tools = tools or {}
        self._encodes_reasoning = encodes_reasoning
        self.items: list[OutputItem] = []
        self.reasoning = ""
        """The reasoning of the closed items."""
        self._parser = parser
        self._open: OpenItem | None = None
        self._reasoning_type: type[OpenReasoning] = OpenSummary if summary else OpenReasoning
        self._logprobs: list[TokenLogprob] = []  # of text that the parser holds back

    def feed(self, text: str, logprobs: Sequence[TokenLogprob]) -> list[OutputEvent]:
        """Adds generated text with the log probabilities of its tokens, and returns the events that it determines.

        Log probabilities of tokens outside of the content are dropped, as their parts have no field for them.
        """
        self._logprobs.extend(logprobs)
        return self._apply(self._parser.feed(text) if self._parser else [ContentDelta(text)] if text else [])

    def finish(self, status: ItemStatus) -> list[OutputEvent]:
        """Ends the text, closes the last item with `status`, and returns the events.

        A completed output without a message or a call gets an empty message.
        """
        events = self._apply(self._parser.finish(truncated=status == "incomplete") if self._parser else [])
        if not self._has_answer() and (status == "completed" or (not self.items and self._open is None)):
            events += self._begin(OpenMessage(self._next_index))
        return events + self._close(status)

    def _has_answer(self) -> bool:
        is_reasoning = self._open is None or isinstance(self._open, OpenReasoning)
        return not is_reasoning or any(not isinstance(item, ReasoningItem) for item in self.items)

    @property
    def _next_index(self) -> int:
        return len(self.items) + (self._open is not None)

    def _apply(self, deltas: Iterable[MessageDelta]) -> list[OutputEvent]:
        events: list[OutputEvent] = []
        logprobs: list[TokenLogprob] = []
        if deltas := list(deltas):
            logprobs, self._logprobs = self._logprobs, []
        for delta in deltas:
            match delta:
                case ContentDelta():
                    if not isinstance(self._open, OpenMessage):
                        events += self._begin(OpenMessage(self._next_index))
                    events += self._append(delta.text, logprobs)
                    logprobs = []
                case ReasoningDelta():
                    if not isinstance(self._open, OpenReasoning):
                        events += self._begin(self._reasoning_type(self._next_index, encodes=self._encodes_reasoning))
                    events += self._append(delta.text)
                case ToolCallStart():
                    events += self._begin(self._open_call(delta))
                case ArgumentsDelta():
                    events += self._append(delta.text)
        return events

    def _open_call(self, start: ToolCallStart) -> OpenFunctionCall:
        tool = self._tools.get(start.name)
        kind = OpenCustomCall if tool is not None and tool.type == "custom" else OpenFunctionCall
        return kind(self._next_index, start, tool)

    def _append(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> list[OutputEvent]:
        assert self._open is not None
        event = self._open.append(text, logprobs)
        return [] if event is None else [event]

    def _begin(self, item: OpenItem) -> list[OutputEvent]:
        events = self._close("completed")
        self._open = item
        return events + item.opened()

    def _close(self, status: ItemStatus) -> list[OutputEvent]:
        item, self._open = self._open, None
        if item is None:
            return []
        if isinstance(item, OpenReasoning):
            self.reasoning += item.text
        self.items.append(item.item(status))
        return item.closed(status)


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
