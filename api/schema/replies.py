"""Bodies and chunks of replies in the shapes of OpenAI's API, with llama-server's `timings`.

Structs of chunks are mutable: a stream reuses one chunk, and one choice per index, for all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import UNSET, Struct, UnsetType, field

from api.schema.speculation_stats import MetricsReply, SpeculativeReply
from api.schema.token_origins import TokenOrigin
from engine import Finished, PrefillProgress


class PromptDetails(Struct, frozen=True):
    """Prompt tokens by origin; cached tokens were not computed for the request."""

    cached_tokens: int


class CompletionDetails(Struct, frozen=True):
    """Draft tokens by verification result. The counts cover all proposer types, not only `prediction`."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageReply(Struct, frozen=True):
    """Tokens of one HTTP request. A prompt with several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails

    @classmethod
    def of(cls, prompts: Sequence[Sequence[Finished]]) -> UsageReply:
        """Returns the sum over `prompts`, each given as the terminal updates of its choices."""
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


class RunningUsage(Struct, frozen=True):
    """vLLM's `usage` of a chunk: the tokens of the chunk's choice so far."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PromptProgress(Struct, frozen=True):
    """llama-server's `prompt_progress`: prefill progress in tokens; `processed` includes tokens from the cache."""

    total: int
    cache: int
    processed: int
    time_ms: int

    @classmethod
    def of(cls, progress: PrefillProgress) -> PromptProgress:
        """Returns the engine's prefill progress in llama-server's shape."""
        return cls(progress.prompt, progress.cached, progress.processed, round(progress.seconds * 1e3))


class TimingsReply(Struct, frozen=True):
    """llama-server's `timings`: token counts, durations and rates. Durations are those of the slowest choice."""

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
    """True if a context shift discarded tokens of a choice."""
    moved_n: int | UnsetType = UNSET
    """Tokens of `cache_n` whose KV was computed at other positions or after other tokens."""

    @classmethod
    def of(cls, prompts: Sequence[Sequence[Finished]]) -> TimingsReply:
        """Returns the timings over `prompts`, each given as the terminal updates of its choices."""
        ends = [end for choices in prompts for end in choices]
        cached = sum(_cached(choices) for choices in prompts)
        prefilled = sum(choices[0].usage.prompt for choices in prompts) - cached
        prefill_seconds = max(end.timings.prompt for end in ends)
        predicted = sum(end.usage.completion for end in ends)
        # The last prefill step emits the first token of a choice, so the decode time covers the other tokens only.
        decoded = sum(max(0, end.usage.completion - 1) for end in ends)
        decode_seconds = max(end.timings.predicted for end in ends)
        drafted = sum(end.usage.drafted for end in ends)
        return cls(
            cached,
            *_speeds(prefilled, prefilled, prefill_seconds),
            *_speeds(predicted, decoded, decode_seconds),
            drafted or UNSET,
            sum(end.usage.accepted for end in ends) if drafted else UNSET,
            any(end.discarded for end in ends) or UNSET,
            sum(min(end.usage.moved for end in choices) for choices in prompts) or UNSET,
        )

    @classmethod
    def running(cls, prefill: PrefillProgress | None, prompt: int, predicted: int, seconds: float) -> TimingsReply:
        """Returns the timings of a choice that has not finished.

        `seconds` is the time since the first of `predicted` tokens. Without `prefill`, the last progress of the
        prefill, no time of the `prompt` tokens is known.
        """
        cached = 0 if prefill is None else prefill.cached
        prefilled = prompt if prefill is None else prefill.processed - prefill.cached
        prefill_seconds = 0.0 if prefill is None else prefill.seconds
        return cls(
            cached, *_speeds(prefilled, prefilled, prefill_seconds), *_speeds(predicted, max(0, predicted - 1), seconds)
        )


def _cached(choices: Sequence[Finished]) -> int:
    # The first choice computes the prompt and the others find it in the cache: the minimum is the first choice's count.
    return min(end.usage.cached for end in choices)


def _speeds(tokens: int, timed: int, seconds: float) -> tuple[int, float, float, float]:
    """Returns `tokens`, the milliseconds, and milliseconds per token and tokens per second of the `timed` tokens."""
    return tokens, seconds * 1e3, _ratio(seconds * 1e3, timed), _ratio(timed, seconds)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


class TopLogprob(Struct, frozen=True):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct, frozen=True):
    """An emitted token, and the most likely tokens at its position."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """The log probabilities of a chat choice or chunk."""

    content: list[TokenLogprob]


class TextLogprobs(Struct, frozen=True):
    """The log probabilities of a text choice or chunk. Offsets are in characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class FunctionCallReply(Struct):
    """The function of a tool call. In a chunk, `arguments` is a part of the arguments."""

    arguments: str
    """JSON text."""
    name: str | UnsetType = UNSET


class ToolCallReply(Struct):
    """A tool call of a whole message."""

    id: str
    function: FunctionCallReply
    type: Literal["function"] = "function"


class ToolCallChunk(Struct):
    """A part of a tool call in a chunk. Only the call's first part has the id, the type and the name."""

    index: int
    function: FunctionCallReply
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatMessage(Struct, frozen=True, kw_only=True):
    """The assistant's message of a chat choice."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallReply] | UnsetType = UNSET
    function_call: FunctionCallReply | UnsetType = UNSET
    """The call of a request with `functions`."""


class ChatChoice(Struct, frozen=True):
    """A chat choice of a body."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    token_origins: list[TokenOrigin] | UnsetType = UNSET


class DeltaMessage(Struct):
    """The fields that a chunk adds to the message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallChunk] | UnsetType = UNSET
    function_call: FunctionCallReply | UnsetType = UNSET
    """A part of the call of a request with `functions`."""


class ChatChunkChoice(Struct):
    """A chat choice of a chunk."""

    index: int
    delta: DeltaMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_origins: list[TokenOrigin] | UnsetType = UNSET


class TextChoice(Struct):
    """A choice of POST /v1/completions, in a body or a chunk."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    token_origins: list[TokenOrigin] | UnsetType = UNSET


class UnenforcedKeywords(Struct, frozen=True):
    """The keywords of the request's schemas that the grammar did not enforce, and whether the outputs satisfy them."""

    keywords: list[str]
    """The path of the schema in the request, then the JSON pointer of the keyword."""
    satisfied: list[bool | None]
    """For each choice, True if it is valid by the schemas with these keywords. None if a choice cannot be checked, such
    as a truncated one, and if the schemas describe no part of the output."""


class CompletionReply(Struct, kw_only=True):
    """The body or a chunk of an OpenAI completion, chat or text."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: Sequence[ChatChoice | ChatChunkChoice | TextChoice]
    usage: UsageReply | RunningUsage | UnsetType | None = UNSET
    timings: TimingsReply | UnsetType = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET
    metrics: MetricsReply | UnsetType = UNSET
    speculative: SpeculativeReply | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    """The seed of the choices, from the request or drawn by the server."""
    unenforced_schema_keywords: UnenforcedKeywords | UnsetType = UNSET
    verbose: Struct | UnsetType = field(default=UNSET, name="__verbose")
    """llama-server's reply for the choice, if the request or the server has `verbose`."""


class ModelMeta(Struct, frozen=True):
    """llama-server's `meta` of a model: counts of tokens and parameters, and the size in bytes."""

    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    n_params: int
    size: int


class ModelReply(Struct, frozen=True):
    """An entry of the list at /v1/models."""

    id: str
    created: int
    max_model_len: int
    meta: ModelMeta
    object: Literal["model"] = "model"
    owned_by: Literal["paceline"] = "paceline"
    aliases: tuple[str, ...] = ()
    """The names of `--alias`."""
    tags: tuple[str, ...] = ()
    """The words of `--tags`."""


class ModelList(Struct, frozen=True):
    """The body of GET /v1/models."""

    data: list[ModelReply]
    object: Literal["list"] = "list"


class HealthReply(Struct, frozen=True):
    """The body of GET /health while the server accepts requests."""

    status: Literal["ok"] = "ok"
