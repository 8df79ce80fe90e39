"""The chat format interface, and the parser that turns the text of one message into deltas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar
from uuid import uuid4

import jiter
from msgspec import Struct

from api.tools.formats.deltas import ArgumentsDelta, ContentDelta, MessageDelta, ReasoningDelta, ToolCallStart
from api.tools.formats.lark_builder import LarkBuilder
from api.tools.formats.text_buffer import Parse, TextBuffer


class Tool(Struct, frozen=True):
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any]
    """The JSON schema of the arguments, of type object."""
    strict: bool = False
    """True if a keyword of the schema that cannot be enforced is an error."""
    path: str = ""
    """The path of `parameters` in the request."""


class AllowedCalls(Struct, frozen=True):
    """The tool calls that a message may contain."""

    tools: tuple[Tool, ...] = ()
    """The callable tools; empty if the message may contain no call."""
    required: bool = False
    """True if the message must contain at least one call."""
    parallel: bool = True
    """True if the message may contain several calls."""
    withheld: bool = False
    """True if the prompt lists tools and `tool_choice` is "none"."""

    def schema(self, name: str) -> Mapping[str, Any]:
        """Returns the schema of a tool's arguments, the empty schema for an unknown tool."""
        return next((tool.parameters for tool in self.tools if tool.name == name), {})

    def __contains__(self, name: str) -> bool:
        return any(tool.name == name for tool in self.tools)


class MessageConstraints(Struct, frozen=True):
    """The constraints that the grammar of a message enforces."""

    calls: AllowedCalls
    may_reason: bool = False
    """True if the message may start with reasoning."""
    in_reasoning: bool = False
    """True if the prompt ends inside of the reasoning."""
    answer: str | None = None
    """The Lark expression of an answer without calls. None permits any text."""


class ChatFormat(ABC):
    """The notation in which a model family writes reasoning and tool calls. All state is in `MessageParser`."""

    name: ClassVar[str]
    template_substrings: ClassVar[tuple[str, ...]]
    """Substrings of chat templates. A template that contains one of them belongs to this format."""
    markers: ClassVar[tuple[str, ...]]
    """The markers that the parser searches for. Special tokens among them must be detokenized by name."""
    opens: ClassVar[tuple[str, ...]] = ("<think>",)
    """The tags that open reasoning."""
    closes: ClassVar[str] = "</think>"
    """The tag that closes reasoning; empty if the format has none."""

    @abstractmethod
    def parse(self, parser: MessageParser) -> Parse[None]:
        """Parses a whole message from `parser.buffer` and emits its parts to `parser`."""

    @abstractmethod
    def grammar(self, lark: LarkBuilder, constraints: MessageConstraints) -> None:
        """Adds the rules of a message, with `start` as the root. Raises RequestRefused for unsupported schemas."""

    def matches(self, template: str) -> bool:
        """True if models with this chat template write this format."""
        return any(text in template for text in self.template_substrings)

    def may_reason(self, template: str) -> bool:
        """True if models with this chat template may reason before they answer."""
        return any(tag in template for tag in self.opens)

    def call_id(self, index: int, name: str) -> str:
        """Returns a new id for a call without an id in its text."""
        return f"call_{uuid4().hex[:24]}"

    def opens_reasoning(self, prompt: str) -> bool:
        """True if `prompt` ends inside of the reasoning."""
        return prompt.rstrip().endswith(self.opens) if self.opens else False


class MessageParser:
    """Parses one message. The concatenated deltas depend on the text only, not on the pieces in which the text arrives.

    White space around reasoning is dropped, and so is white space at the end of the content of a message with calls.
    """

    def __init__(
        self, format: ChatFormat, calls: AllowedCalls, *, in_reasoning: bool = False, split_reasoning: bool = True
    ) -> None:
        """With `in_reasoning` the text starts inside of the reasoning. Without `split_reasoning` reasoning and its tags
        are content."""
        self.calls = calls
        self.in_reasoning = in_reasoning
        self.split_reasoning = split_reasoning
        self.buffer = TextBuffer()
        self.num_calls = 0
        """Calls started so far."""
        self._format = format
        self._deltas: list[MessageDelta] = []
        self._arguments: list[list[str]] = []  # of each call
        self._content_space = ""  # white space at the end of the content, held back until more content follows
        self._reasoning_space = ""
        self._has_reasoning = False
        self._strip_content = False  # the content so far is white space after reasoning
        self._routine = format.parse(self)

    def feed(self, text: str) -> list[MessageDelta]:
        """Adds text and returns the deltas that the text so far determines."""
        self.buffer.feed(text)
        return self._resume()

    def finish(self, *, truncated: bool = False) -> list[MessageDelta]:
        """Ends the text and returns the remaining deltas. A call whose header is incomplete is dropped.

        The beginning of a closing tag after a call is dropped too, and at the end of a `truncated` text the beginning
        of any marker: "</tool_" is no content. A whole answer may end with "<".
        """
        self.buffer.ended, self.buffer.truncated = True, truncated
        self.buffer.completes_options = truncated or self.num_calls > 0
        deltas = self._resume()
        if self._content_space and not self.num_calls:
            deltas.append(ContentDelta(self._content_space))
        return deltas

    @property
    def has_complete_calls(self) -> bool:
        """True if the message has calls and the arguments of each are valid JSON."""
        return self.num_calls > 0 and all(_is_json("".join(parts)) for parts in self._arguments)

    def _resume(self) -> list[MessageDelta]:
        next(self._routine, None)
        deltas, self._deltas = self._deltas, []
        return deltas

    # ── called by formats ──

    def content(self, text: str) -> None:
        """Emits content."""
        text = self._content_space + text
        if self._strip_content:
            text = text.lstrip()
        stripped = text.rstrip()
        self._content_space = text[len(stripped) :]
        if stripped:
            self._strip_content = False
            self._deltas.append(ContentDelta(stripped))

    def reasoning(self, text: str) -> None:
        """Emits reasoning."""
        if not self.split_reasoning:
            self.content(text)
            return
        text = self._reasoning_space + text
        if not self._has_reasoning:
            text = text.lstrip()
        stripped = text.rstrip()
        self._reasoning_space = text[len(stripped) :]
        if stripped:
            self._has_reasoning = True
            self._deltas.append(ReasoningDelta(stripped))

    def reasoning_tag(self, text: str) -> None:
        """Drops a tag around reasoning, or emits the tag as content if reasoning is content."""
        if not self.split_reasoning:
            self.content(text)

    def end_reasoning(self) -> None:
        """Ends the reasoning."""
        self._reasoning_space = ""
        self._strip_content = self.split_reasoning

    def begin_call(self, name: str, id: str = "") -> None:
        """Starts a call, with a new id if `id` is empty. Clears the buffer's marks, because a call cannot be undone."""
        self.buffer.clear_marks()
        index, self.num_calls = self.num_calls, self.num_calls + 1
        self._arguments.append([])
        self._deltas.append(ToolCallStart(index, id or self._format.call_id(index, name), name))

    def arguments(self, text: str) -> None:
        """Appends JSON text to the arguments of the last call."""
        if text:
            self._arguments[-1].append(text)
            self._deltas.append(ArgumentsDelta(self.num_calls - 1, text))


def _is_json(text: str) -> bool:
    try:
        jiter.from_json(text.encode(), allow_inf_nan=False)
    except ValueError:
        return False
    return True
