"""Bodies of OpenAI's generation requests, with the fields that llama-server and vLLM add.

Unknown fields are ignored; null is the same as an absent field. The decoder checks types. The ranges of sampling
parameters are checked in `GenerationRequest.sampling_params`, so that each range is defined once, in `SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct

from api.config.samplers import MAX_SAMPLERS
from api.http.decode_errors import as_refusal, path_of_wrong_type
from api.schema.logit_bias import MAX_LOGIT_BIASES, LogitBias, bias_pairs, numeric_biases
from api.schema.request_values import (
    ChoiceCount,
    ContentPart,
    ContextKeep,
    Int32,
    LoraScale,
    NonNegativeInt,
    PredictedOutput,
    ProbabilityCount,
    PromptObject,
    ResponseFormat,
    SchedulingFields,
    SignedSeed,
    StopString,
    StopStrings,
    StreamOptions,
    StructuredOutputs,
    TokenLimit,
    TopLogprobCount,
    prompt_text,
)
from api.schema.samplers import parse_samplers
from api.schema.speculation import SpeculativeField, with_dotted_fields
from engine import WORKERS, RequestRefused, SamplingParams

_BodyT = TypeVar("_BodyT", bound=Struct)

# Bodies of this many bytes are decoded on a worker thread: decoding takes up to 10 ns for each byte.
LONG_BODY_BYTES = 2**17


class GenerationRequest(SchedulingFields, kw_only=True):
    """The fields that all generation endpoints share. Fields named as in `SamplingParams` have the same meaning."""

    shape: ClassVar[Literal["chat", "text", "llama-server"]] = "chat"
    """The kind of endpoint: a chat API, OpenAI's text completion, or llama-server's completion."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: ChoiceCount | None = None
    n_cmpl: ChoiceCount | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[NonNegativeInt], Meta(max_length=1024)] | None = None
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    n_predict: TokenLimit | None = None
    min_tokens: NonNegativeInt | None = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[str, Meta(max_length=1024)] | None = None
    speculative: SpeculativeField = None
    # llama-server's spelling of the fields of `speculative`, which `parse_speculation` checks.
    speculative_type: Any = msgspec.field(default=None, name="speculative.type")
    speculative_n_max: Any = msgspec.field(default=None, name="speculative.n_max")
    speculative_n_min: Any = msgspec.field(default=None, name="speculative.n_min")
    speculative_p_min: Any = msgspec.field(default=None, name="speculative.p_min")
    speculative_size_n: Any = msgspec.field(default=None, name="speculative.ngram_size_n")
    speculative_min_hits: Any = msgspec.field(default=None, name="speculative.ngram_min_hits")
    prediction: PredictedOutput | None = None

    seed: SignedSeed | None = None
    temperature: float | None = None
    top_k: Int32 | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_last_n: Int32 | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: Int32 | None = None
    dry_penalty_last_n: Int32 | None = None
    dry_sequence_breakers: Annotated[list[StopString], Meta(max_length=64)] | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    logit_bias: dict[str, float | bool] | Annotated[list[LogitBias], Meta(max_length=MAX_LOGIT_BIASES)] | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    top_n_sigma: float | None = None
    mirostat: Int32 | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    adaptive_target: float | None = None
    adaptive_decay: float | None = None
    min_keep: Int32 | None = None
    samplers: Annotated[str, Meta(max_length=1024)] | Annotated[list[str], Meta(max_length=MAX_SAMPLERS)] | None = None

    lora: Annotated[list[LoraScale], Meta(max_length=64)] | None = None
    id_slot: Int32 | None = None
    cache_prompt: bool | None = None
    n_keep: ContextKeep | None = None
    n_discard: NonNegativeInt | None = None
    n_probs: ProbabilityCount | None = None
    post_sampling_probs: bool | None = None
    t_max_predict_ms: Int32 | None = None
    timings_per_token: bool | None = None
    return_progress: bool | None = None
    verbose: bool | None = None
    token_origins: bool | None = None
    backend_sampling: bool | None = None
    """Accepted without effect: where tokens are sampled changes no output."""

    response_format: ResponseFormat | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    # Fields that some endpoints refuse (`refuse_unsupported`); `ChatFields` has the types from `top_logprobs` on.
    grammar_lazy: bool | None = None
    n_indent: NonNegativeInt | None = None
    return_tokens: bool | None = None
    response_fields: Annotated[list[str], Meta(max_length=64)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: ChoiceCount | None = None
    top_logprobs: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    reasoning_format: Any = None
    reasoning_effort: Any = None
    enable_thinking: Any = None
    reasoning_budget: Any = None
    reasoning_budget_tokens: Any = None
    thinking_budget_tokens: Any = None
    reasoning_budget_message: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    documents: Any = None

    def __post_init__(self) -> None:
        self.n = self.n_cmpl if self.n is None else self.n

    @property
    def token_limit(self) -> int | None:
        """The maximum number of new tokens, -1 for unlimited. None if the request sets no limit."""
        return _first_given(self.max_completion_tokens, self.max_tokens, self.n_predict)

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """True if each chunk has the usage of its choice so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings; empty if there are none."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def has_stop(self) -> bool:
        """True if the request has the field of stop strings."""
        return self.stop is not None

    @property
    def defines_output(self) -> bool:
        """True if the request has a field of structured output, or tools."""
        forms = self.response_format, self.grammar, self.json_schema, self.structured_outputs, self.guided_json
        guided = self.guided_regex, self.guided_choice, self.guided_grammar
        return bool(self.tools or self.functions) or any(form is not None for form in (*forms, *guided))

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """Returns `defaults` updated with the request's sampling fields except the seed.

        Raises RequestRefused for a value out of range.
        """
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if self.repetition_penalty is not None:
            given.setdefault("repeat_penalty", self.repetition_penalty)
        if self.logit_bias:
            given["logit_bias"] = numeric_biases(bias_pairs(self.logit_bias))
        if self.samplers is not None:
            given["samplers"] = parse_samplers(self.samplers)
        if not given:
            return defaults
        values = msgspec.structs.asdict(defaults) | given
        try:
            return msgspec.convert(values, SamplingParams)
        except msgspec.ValidationError as error:
            raise as_refusal(error, SamplingParams, values) from None

    @property
    def speculative_fields(self) -> SpeculativeField:
        """The field `speculative`, with the fields that the request spells with a dot."""
        dotted = {
            "type": self.speculative_type,
            "n_max": self.speculative_n_max,
            "n_min": self.speculative_n_min,
            "p_min": self.speculative_p_min,
            "size_n": self.speculative_size_n,
            "min_hits": self.speculative_min_hits,
        }
        return with_dotted_fields(self.speculative, dotted)


_SAMPLING_FIELDS = tuple(
    name for name in SamplingParams.__struct_fields__ if name not in ("seed", "logit_bias", "samplers")
)


class ChatMessageParam(Struct, omit_defaults=True):
    """One message of a conversation, with the fields that chat templates use."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, Any] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatFields(GenerationRequest, kw_only=True):
    """The shared fields with the types of the fields that only chats have."""

    top_logprobs: TopLogprobCount | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    function_call: str | dict[str, Any] | None = None
    reasoning_format: Literal["auto", "deepseek", "none"] | None = None
    reasoning_effort: Annotated[str, Meta(max_length=32)] | None = None
    enable_thinking: bool | None = None
    reasoning_budget: TokenLimit | None = None
    reasoning_budget_tokens: TokenLimit | None = None
    thinking_budget_tokens: TokenLimit | None = None
    reasoning_budget_message: Annotated[str, Meta(max_length=4096)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None


class ChatRequest(ChatFields, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessageParam], Meta(min_length=1)]
    logprobs: bool | None = None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools for the template, with OpenAI's legacy `functions` as tools."""
        return self.tools or [{"type": "function", "function": function} for function in self.functions or ()]

    @property
    def num_logprobs(self) -> int | None:
        """The number of alternatives reported for each token. None reports no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else self.n_probs or None

    @property
    def thinking_budget(self) -> int | None:
        """The maximum number of reasoning tokens, -1 for unlimited. None if the request sets no budget."""
        return _first_given(self.reasoning_budget, self.reasoning_budget_tokens, self.thinking_budget_tokens)


class TextRequest(GenerationRequest, kw_only=True):
    """The body of POST /v1/completions."""

    shape = "text"

    prompt: str | PromptObject | list[str | int | PromptObject | list[int]]
    logprobs: TopLogprobCount | None = None

    @property
    def num_logprobs(self) -> int | None:
        """The number of alternatives reported for each token. None reports no log probabilities."""
        return self.n_probs or None if self.logprobs is None else self.logprobs

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, each a text or token ids. Raises RequestRefused for an empty list or a list of mixed types."""
        if not isinstance(self.prompt, list):
            return [prompt_text(self.prompt)]
        texts = [prompt_text(item) for item in self.prompt if isinstance(item, str | PromptObject)]
        lists = [item for item in self.prompt if isinstance(item, list)]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        for prompts in (texts, lists, [tokens] if tokens else []):
            if prompts and len(texts) + len(lists) + len(tokens) == len(texts or lists or tokens):
                return prompts
        raise RequestRefused(
            "prompt: the list is empty or mixes types; send a text, a list of texts, a list of token ids or a list of "
            "lists of token ids.",
            field="prompt",
        )


def decode_body(decoder: msgspec.json.Decoder[_BodyT], body: bytes) -> _BodyT:
    """Returns the request in `body`. Raises RequestRefused, for an invalid value with the field's path."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        # The decoder's type has no ranges of sampling parameters.
        is_sampling = path_of_wrong_type(error) in _SAMPLING_FIELDS
        raise as_refusal(error, SamplingParams if is_sampling else decoder.type, _decode_untyped(body)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRefused(f"The body is not valid JSON: {error}") from None


async def decode_any_body(decoder: msgspec.json.Decoder[_BodyT], body: bytes) -> _BodyT:
    """Returns `decode_body(decoder, body)`, computed on a worker thread if the body is long. Raises RequestRefused."""
    if len(body) < LONG_BODY_BYTES:
        return decode_body(decoder, body)
    return await WORKERS.run(decode_body, decoder, body)


def _decode_untyped(body: bytes) -> Any:
    """Returns the value in `body`; UNSET if the rest after the first invalid value is not valid JSON."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return UNSET


def _first_given(*values: int | None) -> int | None:
    """Returns the first of `values` that is not None."""
    return next((value for value in values if value is not None), None)
