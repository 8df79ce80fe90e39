"""Bodies and events of Anthropic's Messages API.

Requests have the shared generation fields too, so every sampling field acts as in a chat completion. Unknown fields,
`cache_control` among them, are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from api.schema.replies import UnenforcedKeywords
from api.schema.request_values import NonNegativeInt, StopStrings
from api.schema.requests import GenerationRequest
from engine import Usage

# ── requests ──


class BlockSource(Struct):
    """The `source` of a document or an image."""

    type: str
    data: str | None = None
    media_type: str | None = None
    url: str | None = None
    content: str | list[ContentBlock] | None = None


class ContentBlock(Struct):
    """One block of a message, of the system prompt or of a tool's result, with the fields of all types."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[ContentBlock] | None = None
    is_error: bool | None = None
    source: str | BlockSource | None = None
    title: str | None = None
    tool_name: str | None = None


class MessageParam(Struct):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class ToolParam(Struct):
    """A tool that the client runs. Tools that Anthropic defines have another `type` and may have no schema."""

    name: str = ""
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    """True hides the tool from the model until a `tool_reference` in the messages names it."""


class ToolChoiceParam(Struct):
    """Which tools the answer may or must call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingParam(Struct):
    """Whether the model reasons, for how many tokens, and whether the reply has the text of the reasoning."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: NonNegativeInt | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct):
    """The JSON schema of the answer."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct):
    """The format of the answer and the effort of the reasoning."""

    format: OutputFormat | None = None
    effort: Annotated[str, Meta(max_length=32)] | None = None


class MessagesRequest(GenerationRequest, kw_only=True):
    """The body of POST /v1/messages and of POST /v1/messages/count_tokens."""

    messages: Annotated[list[MessageParam], Meta(min_length=1)]
    metadata: dict[str, Any] | None = None
    system: str | list[ContentBlock] | None = None
    tools: Annotated[list[ToolParam], Meta(max_length=1024)] | None = None
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingParam | None = None
    stop_sequences: StopStrings | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """The older name of `output_config.format`."""
    chat_template_kwargs: dict[str, Any] | None = None
    mcp_servers: list[Any] | None = None
    container: Any = None
    compaction: Any = None
    thread: Any = None

    @property
    def has_stop(self) -> bool:
        return self.stop_sequences is not None or self.stop is not None

    @property
    def defines_output(self) -> bool:
        has_format = self.output_config is not None and self.output_config.format is not None
        return has_format or self.output_format is not None or super().defines_output

    @property
    def shows_thinking(self) -> bool:
        """True if the reply has the text of the reasoning."""
        return self.thinking is None or self.thinking.display != "omitted"


# ── replies ──


class TextBlock(Struct, frozen=True, tag="text"):
    """A part of the answer's text."""

    text: str


class ThinkingBlock(Struct, frozen=True, tag="thinking"):
    """A part of the reasoning."""

    thinking: str
    signature: str


class ToolUseBlock(Struct, frozen=True, tag="tool_use"):
    """A tool call."""

    id: str
    name: str
    input: dict[str, Any]


ReplyBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(Struct, frozen=True):
    """Tokens of one request. `input_tokens` are the tokens of the prompt that were computed for this request."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0

    @classmethod
    def of(cls, usage: Usage) -> MessageUsage:
        """Returns the engine's `usage` in Anthropic's shape."""
        return cls(usage.prompt - usage.cached, usage.completion, usage.cached)


class MessageReply(Struct, frozen=True, tag="message"):
    """The body of a whole reply. In the first event of a stream it has no content."""

    id: str
    model: str
    content: list[ReplyBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage
    role: Literal["assistant"] = "assistant"
    unenforced_schema_keywords: UnenforcedKeywords | UnsetType = UNSET


class TokenCountReply(Struct, frozen=True):
    """The body of a reply of POST /v1/messages/count_tokens."""

    input_tokens: int


# ── events ──


class MessageStart(Struct, frozen=True, tag="message_start"):
    """The first event of a stream."""

    message: MessageReply


class ContentBlockStart(Struct, frozen=True, tag="content_block_start"):
    """The start of block `index`, which has no text yet."""

    index: int
    content_block: ReplyBlock


class TextDelta(Struct, frozen=True, tag="text_delta"):
    """Text appended to a text block."""

    text: str


class ThinkingDelta(Struct, frozen=True, tag="thinking_delta"):
    """Text appended to a thinking block."""

    thinking: str


class SignatureDelta(Struct, frozen=True, tag="signature_delta"):
    """The signature of a thinking block, at its end."""

    signature: str


class InputJSONDelta(Struct, frozen=True, tag="input_json_delta"):
    """JSON text appended to the input of a tool call."""

    partial_json: str


class ContentBlockDelta(Struct, frozen=True, tag="content_block_delta"):
    """An increment of block `index`."""

    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJSONDelta


class ContentBlockStop(Struct, frozen=True, tag="content_block_stop"):
    """The end of block `index`."""

    index: int


class StopInfo(Struct, frozen=True):
    """The reason for the end of a message, and the stop sequence that ended it, if one did."""

    stop_reason: str
    stop_sequence: str | None


class MessageEnd(Struct, frozen=True, tag="message_delta"):
    """The event before the last, with the reason for the end of the message and its usage."""

    delta: StopInfo
    usage: MessageUsage
    unenforced_schema_keywords: UnenforcedKeywords | UnsetType = UNSET


class MessageStop(Struct, frozen=True, tag="message_stop"):
    """The last event of a stream."""


MessageEvent = MessageStart | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageEnd | MessageStop
