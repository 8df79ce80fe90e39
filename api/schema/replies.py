"""What clients get: bodies, chunks and errors in the shapes of OpenAI's API, with llama-server's `timings`.

Chunks are not frozen: a stream keeps one of each and changes only its text, which spares the hot path two objects
and a dictionary per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from api.schema.drafts import MetricsReply, SpeculativeReply
from engine import Finished


class PromptDetails(Struct, frozen=True):
    """How much of the prompt needed no computing."""

    cached_tokens: int


class CompletionDetails(Struct, frozen=True):
    """What became of the drafts."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageReply(Struct, frozen=True):
    """Tokens of a whole HTTP request; the prompt of several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails

    @classmethod
    def of(cls, prompts: Sequence[Sequence[Finished]]) -> UsageReply:
        """The sum over prompts, each given as the ends of its choices."""
        ends = [end for choices in prompts for end in choices]
        prompt = sum(choices[0].usage.prompt for choices in prompts)
        completion = sum(end.usage.completion for end in ends)
        accepted = sum(end.usage.accepted for end in ends)
        return cls(
            prompt,
            completion,
            prompt + completion,
            PromptDetails(sum(_cached(choices) for choices in prompts)),
            CompletionDetails(accepted, sum(end.usage.drafted for end in ends) - accepted),
        )


class TimingsReply(Struct, frozen=True):
    """Counts, milliseconds and rates as llama-server names them. Of choices side by side, the longest counts."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    draft_n: int | UnsetType = UNSET
    draft_n_accepted: int | UnsetType = UNSET
    truncated: bool | UnsetType = UNSET
    """True if a choice forgot a part of its context."""
    moved_n: int | UnsetType = UNSET
    """Of `cache_n`, those that were computed at other places or after another text."""

    @classmethod
    def of(cls, prompts: Sequence[Sequence[Finished]]) -> TimingsReply:
        """The same for the ends of the choices of each prompt."""
        ends = [end for choices in prompts for end in choices]
        cached = sum(_cached(choices) for choices in prompts)
        read = sum(choices[0].usage.prompt for choices in prompts) - cached
        reading = max(end.timings.prompt for end in ends)
        predicted = sum(end.usage.completion for end in ends)
        # The first token of each comes with the prompt's last row, so the time is that of the others.
        timed = sum(max(0, end.usage.completion - 1) for end in ends)
        predicting = max(end.timings.predicted for end in ends)
        drafted = sum(end.usage.drafted for end in ends)
        return cls(
            cached,
            read,
            reading * 1e3,
            _ratio(reading * 1e3, read),
            _ratio(read, reading),
            predicted,
            predicting * 1e3,
            _ratio(predicting * 1e3, timed),
            _ratio(timed, predicting),
            drafted or UNSET,
            sum(end.usage.accepted for end in ends) if drafted else UNSET,
            any(end.forgotten for end in ends) or UNSET,
            sum(min(end.usage.moved for end in choices) for choices in prompts) or UNSET,
        )


def _cached(choices: Sequence[Finished]) -> int:
    # The other choices share what the first to run has computed; counting that would hide it.
    return min(end.usage.cached for end in choices)


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0


class TopLogprob(Struct, frozen=True):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct, frozen=True):
    """A token of the text, and those likeliest in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """The tokens of a chat choice or chunk."""

    content: list[TokenLogprob]


class TextLogprobs(Struct, frozen=True):
    """The same as /v1/completions tells it; offsets are in characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class FunctionReply(Struct):
    """A function that the model calls, whole or its part of a chunk."""

    arguments: str
    """JSON."""
    name: str | UnsetType = UNSET


class CallReply(Struct):
    """A call in a whole message."""

    id: str
    function: FunctionReply
    type: Literal["function"] = "function"


class CallDelta(Struct):
    """A call's part of a chunk: id, type and name come once, with the first."""

    index: int
    function: FunctionReply
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatMessage(Struct, frozen=True, kw_only=True):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallReply] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    """A whole chat choice."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class Delta(Struct):
    """What a chunk adds to the message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChatDelta(Struct):
    """A chat choice's part of a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class TextChoice(Struct):
    """A choice of /v1/completions, whole or its part of a chunk."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class Reply(Struct, kw_only=True):
    """A body or a chunk."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: Sequence[ChatChoice | ChatDelta | TextChoice]
    usage: UsageReply | UnsetType | None = UNSET
    timings: TimingsReply | UnsetType = UNSET
    metrics: MetricsReply | UnsetType = UNSET
    speculative: SpeculativeReply | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    """What the choices were drawn with, whether asked for or not."""


class ModelMeta(Struct, frozen=True):
    """What llama-server tells about a model."""

    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    n_params: int
    size: int


class ModelReply(Struct, frozen=True):
    """An entry of /v1/models."""

    id: str
    created: int
    max_model_len: int
    meta: ModelMeta
    object: Literal["model"] = "model"
    owned_by: Literal["paceline"] = "paceline"


class ModelList(Struct, frozen=True):
    """GET /v1/models."""

    data: list[ModelReply]
    object: Literal["list"] = "list"


class Health(Struct, frozen=True):
    """GET /health while requests are served."""

    status: Literal["ok"] = "ok"
