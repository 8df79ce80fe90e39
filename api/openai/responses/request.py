"""Bodies of POST /v1/responses, with the generation fields that all endpoints share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from api.schema.request_values import TokenLimit
from api.schema.requests import ChatFields
from engine import RequestRefused

SummaryDetail = Literal["auto", "concise", "detailed"]
MetadataKey = Annotated[str, Meta(max_length=64)]
MetadataValue = Annotated[str, Meta(max_length=512)]
_LOGPROBS_INCLUDE = "message.output_text.logprobs"
_REASONING_INCLUDE = "reasoning.encrypted_content"


class ReasoningOptions(Struct, frozen=True):
    """OpenAI's `reasoning`. Any value of `summary` puts the reasoning into the item's summary, unabridged."""

    effort: Annotated[str, Meta(max_length=32)] | None = None
    summary: SummaryDetail | None = None
    generate_summary: SummaryDetail | None = None
    """The older name of `summary`."""


class TextFormat(Struct, frozen=True, omit_defaults=True):
    """OpenAI's constraint on the text of the output."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(Struct, frozen=True, omit_defaults=True):
    """OpenAI's `text`. `verbosity` has no effect, as no chat template has it."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesRequest(ChatFields, kw_only=True):
    """The body of POST /v1/responses and /v1/responses/input_tokens."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Meta(max_length=128)] | None = None
    store: bool | None = None
    include: list[str] | None = None
    max_output_tokens: TokenLimit | None = None
    max_tool_calls: int | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=16)] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None

    @property
    def defines_output(self) -> bool:
        return (self.text is not None and self.text.format is not None) or super().defines_output

    @property
    def output_limit(self) -> int | None:
        """The maximum number of new tokens, -1 for unlimited. None if the request sets no limit."""
        return self.token_limit if self.max_output_tokens is None else self.max_output_tokens

    @property
    def wants_summary(self) -> bool:
        """True if reasoning belongs into the summary of its item."""
        return self.reasoning is not None and bool(self.reasoning.summary or self.reasoning.generate_summary)

    @property
    def wants_encrypted_reasoning(self) -> bool:
        """True if reasoning items have `encrypted_content`."""
        return _REASONING_INCLUDE in (self.include or ())

    @property
    def wants_logprobs(self) -> bool:
        """True if the parts of messages have log probabilities."""
        return _LOGPROBS_INCLUDE in (self.include or ()) or bool(self.top_logprobs)

    def refuse_foreign(self) -> None:
        """Raises RequestRefused for a field that would have no effect although the client expects one."""
        reasons = {
            "background": "responses are not generated in the background; leave the field out and use stream",
            "conversation": "conversations are not stored; use previous_response_id or send the whole conversation",
            "prompt": "there are no stored prompts; send instructions and input",
            "token_origins": "events of a response have no origins of tokens; use /v1/chat/completions",
        }
        for field, reason in reasons.items():
            if getattr(self, field):
                raise RequestRefused(f"{field}: {reason}.", field=field)
        if (self.n or 1) > 1:
            raise RequestRefused("n: a response has one output; leave the field out or send 1.", field="n")
