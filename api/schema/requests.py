"""What clients send: the requests of OpenAI's API, with the extras of llama-server and vLLM.

Unknown fields are ignored and null is the same as absent. Types are checked while the JSON is read, ranges of the
sampling parameters when they are merged with the server's defaults, so that every range is stated once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from api.http.decode_errors import refused
from engine import RequestRefused, SamplingParams

Count = Annotated[int, Meta(ge=0, le=2**53)]
Limit = Annotated[int, Meta(ge=-1, le=2**53)]
"""A number of tokens at most; -1 is no limit."""
Choices = Annotated[int, Meta(ge=1, le=128)]
Alternatives = Annotated[int, Meta(ge=0, le=20)]
Int = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
"""Wide enough for any setting, and narrow enough for native code."""
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
BANNED = -1e9
"""The bias that llama-server writes as `false`: far below any logit, and still a number."""
BIASES = 2**16
"""Tokens that one request may weigh otherwise."""
Bias = tuple[int | str, float | bool]
Stop = Annotated[str, Meta(max_length=512)]
Stops = Annotated[list[Stop], Meta(max_length=64)]


class StreamOptions(Struct):
    """What a stream tells besides the text."""

    include_usage: bool | None = None


class NamedSchema(Struct):
    """A JSON schema in OpenAI's shape. It holds whether `strict` or not."""

    schema: dict[str, Any]
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    """The form that the text must have; `schema` is llama-server's, of `json_object`."""

    type: str
    json_schema: NamedSchema | None = None
    schema: dict[str, Any] | None = None


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """The same in vLLM's shape: one of these."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Completion(Struct, kw_only=True):
    """The fields that every kind of completion has.

    Those named as fields of `SamplingParams` mean the same; `sampling` merges them with the server's defaults.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[list[Count], Meta(max_length=1024)] | None = None
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    n_predict: Limit | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[str, Meta(max_length=1024)] | None = None
    speculative: bool | str | dict[str, Any] | None = None
    prediction: Prediction | None = None

    seed: Seed | None = None
    temperature: float | None = None
    top_k: Int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_last_n: Int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: Int | None = None
    dry_penalty_last_n: Int | None = None
    dry_sequence_breakers: list[str] | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    logit_bias: dict[str, float] | Annotated[list[Bias], Meta(max_length=BIASES)] | None = None

    response_format: ResponseFormat | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def limit(self) -> int | None:
        """New tokens at most, under whichever name; None if the client did not say."""
        for value in (self.max_completion_tokens, self.max_tokens, self.n_predict):
            if value is not None:
                return value
        return None

    @property
    def with_usage(self) -> bool:
        """Whether a stream is to end with a chunk that tells the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """`defaults` with what the client asked for, all but the seed. Raises RequestRefused."""
        asked = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        if self.repetition_penalty is not None:
            asked.setdefault("repeat_penalty", self.repetition_penalty)
        if self.logit_bias:
            asked["logit_bias"] = self._biases()
        if not asked:
            return defaults
        try:
            return msgspec.convert(msgspec.structs.asdict(defaults) | asked, SamplingParams)
        except msgspec.ValidationError as error:
            raise refused(error) from None

    def _biases(self) -> list[tuple[int, float]]:
        if len(self.logit_bias or ()) > BIASES:
            raise RequestRefused(f"logit_bias names more than {BIASES} tokens.", field="logit_bias")
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias or ()
        biases = []
        for token, bias in pairs:
            if not _TOKEN.fullmatch(str(token)) or bias is True:
                raise RequestRefused("logit_bias maps token ids to numbers.", field="logit_bias")
            biases.append((int(token), BANNED if bias is False else float(bias)))
        return biases


_TOKEN = re.compile(r"\d{1,19}")
_SAMPLING = tuple(name for name in SamplingParams.__struct_fields__ if name not in ("seed", "logit_bias"))


class Part(Struct):
    """A piece of a message's content."""

    type: str
    text: str | None = None


class Prediction(Struct):
    """What the client expects the text to be, more or less."""

    type: Literal["content"]
    content: str | list[Part]


class Message(Struct, omit_defaults=True):
    """One turn of a conversation, as the chat template gets it."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatRequest(Completion, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    reasoning_format: Literal["auto", "deepseek", "none"] | None = None
    reasoning_effort: Annotated[str, Meta(max_length=32)] | None = None
    enable_thinking: bool | None = None
    reasoning_budget: Limit | None = None
    reasoning_budget_tokens: Limit | None = None
    thinking_budget_tokens: Limit | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None

    @property
    def thinking_budget(self) -> int | None:
        """Tokens that may be thought, under whichever name; None if the client did not say."""
        for value in (self.reasoning_budget, self.reasoning_budget_tokens, self.thinking_budget_tokens):
            if value is not None:
                return value
        return None


class TextRequest(Completion, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: Alternatives | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Choices | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, each text or tokens. Raises RequestRefused for a list that is empty or of mixed kinds."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [item for item in self.prompt if isinstance(item, str)]
        lists = [item for item in self.prompt if isinstance(item, list)]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        for prompts in (texts, lists, [tokens] if tokens else []):
            if prompts and len(texts) + len(lists) + len(tokens) == len(texts or lists or tokens):
                return prompts
        raise RequestRefused(
            "prompt must be a text, a list of texts, a list of token ids or a list of such lists, and not empty.",
            field="prompt",
        )


Body = TypeVar("Body", bound=Struct)


def decode(decoder: msgspec.json.Decoder[Body], body: bytes) -> Body:
    """The request in `body`. Raises RequestRefused, which names the field, for anything but the right JSON."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise refused(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRefused(f"The body is not valid JSON: {error}") from None


def refuse_unsupported(request: Completion) -> None:
    """Raises RequestRefused for a wish that would silently not be met."""
    if isinstance(request, ChatRequest) and request.top_logprobs is not None and not request.logprobs:
        raise RequestRefused("top_logprobs needs logprobs to be true.", field="top_logprobs")
    if isinstance(request, TextRequest):
        _refuse_legacy(request)


def _refuse_legacy(request: TextRequest) -> None:
    if request.suffix:
        raise RequestRefused("suffix is not supported yet.", field="suffix")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestRefused("best_of is not supported, other than equal to n.", field="best_of")
    if request.echo and request.logprobs is not None:
        raise RequestRefused(
            "echo cannot be combined with logprobs: logprobs of the prompt are not computed.", field="echo"
        )
