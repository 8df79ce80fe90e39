"""Bodies and events of the Responses API, in OpenAI's shapes with llama-server's `timings`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType, field

from api.openai.responses.request import TextOptions
from api.schema.replies import PromptProgress, TimingsReply, TokenLogprob, UnenforcedKeywords, UsageReply
from api.schema.speculation_stats import SpeculativeReply

FailureCode = Literal["server_error", "rate_limit_exceeded"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputTextPart(Struct, frozen=True):
    """The text of an assistant's message."""

    text: str
    logprobs: Sequence[TokenLogprob] = ()
    annotations: tuple[()] = ()
    type: Literal["output_text"] = "output_text"


class ReasoningTextPart(Struct, frozen=True):
    """The reasoning of a reasoning item."""

    text: str
    type: Literal["reasoning_text"] = "reasoning_text"


class SummaryTextPart(Struct, frozen=True):
    """The reasoning of a reasoning item, for clients that display summaries only."""

    text: str
    type: Literal["summary_text"] = "summary_text"


class MessageItem(Struct, frozen=True):
    """An assistant's message. Its content is empty while its status is `in_progress`."""

    id: str
    status: ItemStatus
    content: Sequence[OutputTextPart]
    role: Literal["assistant"] = "assistant"
    type: Literal["message"] = "message"


class FunctionCallItem(Struct, frozen=True):
    """A call of a function tool."""

    id: str
    call_id: str
    name: str
    arguments: str
    """JSON text."""
    status: ItemStatus
    namespace: str | UnsetType = UNSET
    type: Literal["function_call"] = "function_call"


class CustomToolCallItem(Struct, frozen=True):
    """A call of a custom tool, whose input is a text."""

    id: str
    call_id: str
    name: str
    input: str
    status: ItemStatus
    namespace: str | UnsetType = UNSET
    type: Literal["custom_tool_call"] = "custom_tool_call"


class ReasoningItem(Struct, frozen=True):
    """The reasoning before an answer, either in `content` or in `summary`."""

    id: str
    status: ItemStatus
    summary: Sequence[SummaryTextPart]
    content: Sequence[ReasoningTextPart] | UnsetType = UNSET
    encrypted_content: str | UnsetType = UNSET
    """The reasoning for later requests, if `include` has it (`encode_reasoning`)."""
    type: Literal["reasoning"] = "reasoning"


OutputItem = MessageItem | FunctionCallItem | CustomToolCallItem | ReasoningItem
OutputPart = OutputTextPart | ReasoningTextPart | SummaryTextPart


class InputTokensDetails(Struct, frozen=True):
    """Input tokens by origin; cached tokens were not computed for the response."""

    cached_tokens: int


class OutputTokensDetails(Struct, frozen=True):
    """Output tokens by purpose."""

    reasoning_tokens: int


class ResponseUsage(Struct, frozen=True):
    """Tokens of one response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: UsageReply, reasoning_tokens: int) -> ResponseUsage:
        """Returns `usage` in the Responses API's shape."""
        return cls(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(min(reasoning_tokens, usage.completion_tokens)),
            usage.total_tokens,
        )


class ResponseFailure(Struct, frozen=True):
    """The error of a failed response."""

    code: FailureCode
    message: str


class IncompleteDetails(Struct, frozen=True):
    """The reason of an incomplete response."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class RequestWarning(Struct, frozen=True):
    """A part of the request without effect."""

    param: str
    message: str
    type: Literal["unsupported_tool", "unenforced_grammar"] = "unsupported_tool"


class ReasoningReply(Struct, frozen=True):
    """The `reasoning` options of the request."""

    effort: str | None = None
    summary: str | None = None


class ResponseReply(Struct, frozen=True, kw_only=True):
    """A response: the body of POST and GET, and the `response` of an event."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    background: bool = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: Sequence[OutputItem] = ()
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningReply
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool
    temperature: float
    text: TextOptions
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None
    warnings: list[RequestWarning] | UnsetType = UNSET
    """Parts of the request without effect."""
    timings: TimingsReply | UnsetType = UNSET
    speculative: SpeculativeReply | UnsetType = UNSET
    unenforced_schema_keywords: UnenforcedKeywords | UnsetType = UNSET
    verbose: Struct | UnsetType = field(default=UNSET, name="__verbose")
    """llama-server's reply, if the request or the server has `verbose`."""
    seed: int
    """The seed of the output, from the request or drawn by the server."""


class ResponseEvent(Struct, kw_only=True):
    """An event with the state of the whole response."""

    type: str
    sequence_number: int = 0
    response: ResponseReply
    prompt_progress: PromptProgress | UnsetType = UNSET
    timings: TimingsReply | UnsetType = UNSET


class OutputEvent(Struct, kw_only=True):
    """An event of one output item. Fields that an event's type does not have are unset."""

    type: str
    sequence_number: int = 0
    output_index: int
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    summary_index: int | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    part: OutputPart | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: Sequence[TokenLogprob] | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    input: str | UnsetType = UNSET
    timings: TimingsReply | UnsetType = UNSET
    """llama-server's timings so far, with `timings_per_token`."""


class DeletedResponse(Struct, frozen=True):
    """The body of DELETE /v1/responses/{id}."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputItemList(Struct, frozen=True):
    """The body of GET /v1/responses/{id}/input_items."""

    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"
