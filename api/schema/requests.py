"""Bodies of OpenAI's generation requests, with the fields that llama-server and vLLM add.

Unknown fields are ignored; null is the same as an absent field. The decoder checks types. The ranges of sampling
parameters are checked in `GenerationRequest.sampling_params`, so that each range is defined once, in `SamplingParams`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct

from api.http.decode_errors import as_refusal, path_of_wrong_type
from engine import RequestRefused, SamplingParams

# Every JSON parser reads integers up to 2^53 exactly.
NonNegativeInt = Annotated[int, Meta(ge=0, le=2**53)]
# A maximum number of tokens; -1 is unlimited.
TokenLimit = Annotated[int, Meta(ge=-1, le=2**53)]
ChoiceCount = Annotated[int, Meta(ge=1, le=128)]
TopLogprobCount = Annotated[int, Meta(ge=0, le=20)]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
SignedSeed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
StopString = Annotated[str, Meta(max_length=512)]
StopStrings = Annotated[list[StopString], Meta(max_length=64)]
# A pair of a token and its bias. The token is an id, or a text whose tokens all get the bias (POST /completion only);
# the bias false bans the token.
LogitBias = tuple[int | str, float | bool]

# Maximum entries of one request's `logit_bias`.
MAX_LOGIT_BIASES = 2**16
# The bias of a banned token: far below any logit, and finite.
_BAN_BIAS = -1e9
_TOKEN_ID = re.compile(r"\d{1,19}")

_BodyT = TypeVar("_BodyT", bound=Struct)


class StreamOptions(Struct):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None


class NamedSchema(Struct):
    """A JSON schema in OpenAI's shape. The grammar enforces the schema with and without `strict`."""

    schema: dict[str, Any]
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    """OpenAI's constraint on the output. `schema` is llama-server's extension of type `json_object`."""

    type: str
    json_schema: NamedSchema | None = None
    schema: dict[str, Any] | None = None


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """vLLM's constraint on the output. At most one field may be set."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class ContentPart(Struct):
    """One part of a message's content."""

    type: str
    text: str | None = None


class PredictedOutput(Struct):
    """OpenAI's `prediction`: a text of which the output probably repeats large parts."""

    type: Literal["content"]
    content: str | list[ContentPart]


class GenerationRequest(Struct, kw_only=True):
    """The fields that all generation endpoints share. Fields named as in `SamplingParams` have the same meaning."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: ChoiceCount | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[NonNegativeInt], Meta(max_length=1024)] | None = None
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    n_predict: TokenLimit | None = None
    min_tokens: NonNegativeInt | None = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[str, Meta(max_length=1024)] | None = None
    speculative: bool | str | dict[str, Any] | None = None
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
    dry_sequence_breakers: list[str] | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    logit_bias: dict[str, float] | Annotated[list[LogitBias], Meta(max_length=MAX_LOGIT_BIASES)] | None = None

    response_format: ResponseFormat | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def token_limit(self) -> int | None:
        """The maximum number of new tokens, -1 for unlimited. None if the request sets no limit."""
        return _first_given(self.max_completion_tokens, self.max_tokens, self.n_predict)

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings; empty if there are none."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """Returns `defaults` updated with the request's sampling fields except the seed.

        Raises RequestRefused for a value out of range.
        """
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if self.repetition_penalty is not None:
            given.setdefault("repeat_penalty", self.repetition_penalty)
        if self.logit_bias:
            given["logit_bias"] = self._logit_biases()
        if not given:
            return defaults
        values = msgspec.structs.asdict(defaults) | given
        try:
            return msgspec.convert(values, SamplingParams)
        except msgspec.ValidationError as error:
            raise as_refusal(error, SamplingParams, values) from None

    def _logit_biases(self) -> list[tuple[int, float]]:
        if len(self.logit_bias or ()) > MAX_LOGIT_BIASES:
            raise RequestRefused(
                f"logit_bias: {len(self.logit_bias or ())} entries are too many; send at most {MAX_LOGIT_BIASES}.",
                field="logit_bias",
            )
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias or ()
        biases = []
        for token, bias in pairs:
            if not _TOKEN_ID.fullmatch(str(token)) or bias is True:
                raise RequestRefused(
                    f"logit_bias: {str(token)[:32]!r}: {bias!r} is not a bias; map token ids to numbers.",
                    field="logit_bias",
                )
            biases.append((int(token), _BAN_BIAS if bias is False else float(bias)))
        return biases


_SAMPLING_FIELDS = tuple(name for name in SamplingParams.__struct_fields__ if name not in ("seed", "logit_bias"))


class ChatMessageParam(Struct, omit_defaults=True):
    """One message of a conversation, with the fields that chat templates use."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatRequest(GenerationRequest, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessageParam], Meta(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: TopLogprobCount | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    reasoning_format: Literal["auto", "deepseek", "none"] | None = None
    reasoning_effort: Annotated[str, Meta(max_length=32)] | None = None
    enable_thinking: bool | None = None
    reasoning_budget: TokenLimit | None = None
    reasoning_budget_tokens: TokenLimit | None = None
    thinking_budget_tokens: TokenLimit | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None

    @property
    def thinking_budget(self) -> int | None:
        """The maximum number of reasoning tokens, -1 for unlimited. None if the request sets no budget."""
        return _first_given(self.reasoning_budget, self.reasoning_budget_tokens, self.thinking_budget_tokens)


class TextRequest(GenerationRequest, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: TopLogprobCount | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: ChoiceCount | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, each a text or token ids. Raises RequestRefused for an empty list or a list of mixed types."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [item for item in self.prompt if isinstance(item, str)]
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


def _decode_untyped(body: bytes) -> Any:
    """Returns the value in `body`. Returns UNSET if it is not valid JSON after the first invalid value."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return UNSET


def refuse_unsupported(request: GenerationRequest) -> None:
    """Raises RequestRefused for a field that would have no effect although the client expects one."""
    if isinstance(request, ChatRequest) and request.top_logprobs is not None and not request.logprobs:
        raise RequestRefused("top_logprobs: logprobs is not set; set logprobs to true.", field="top_logprobs")
    if isinstance(request, TextRequest):
        _refuse_unsupported_text(request)


def _refuse_unsupported_text(request: TextRequest) -> None:
    if request.suffix:
        raise RequestRefused("suffix: insertion is not supported; leave the field out.", field="suffix")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestRefused(
            f"best_of: {request.best_of} is not supported; leave the field out or set it to n, {request.n or 1}.",
            field="best_of",
        )
    if request.echo and request.logprobs is not None:
        raise RequestRefused("echo: logprobs of the prompt are not computed; leave out echo or logprobs.", field="echo")


def _first_given(*values: int | None) -> int | None:
    """Returns the first of `values` that is not None."""
    return next((value for value in values if value is not None), None)
