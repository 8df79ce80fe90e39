"""vLLM's render endpoints: return the token ids and parameters of a request without generating.

Routers use the token ids to send requests with equal prefixes to the same server.
"""

from __future__ import annotations

from typing import Literal
from uuid import uuid4

import msgspec
from msgspec import Struct
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from api.generation.choices import read_generation_request
from api.generation.loaded_model import AppState, LoadedModel
from api.generation.prepared_chat import prepare_chat
from api.generation.request_limits import max_new_tokens
from api.http.responses import JSONResponse
from api.openai.completions import DEFAULT_MAX_TOKENS, tokenize_prompts
from api.schema.request_values import StreamOptions
from api.schema.requests import ChatRequest, GenerationRequest, TextRequest
from engine import ContextExceeded

_CHAT_DECODER = msgspec.json.Decoder(ChatRequest)
_TEXT_DECODER = msgspec.json.Decoder(TextRequest)


class RenderedSampling(Struct, frozen=True, kw_only=True):
    """The sampling parameters of a request by vLLM's names, with the server's defaults."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: list[int]
    ignore_eos: bool
    max_tokens: int | None
    min_tokens: int

    @classmethod
    def of(
        cls, request: GenerationRequest, model: LoadedModel, token_limit: int | None, prompt_tokens: int
    ) -> RenderedSampling:
        """Returns the parameters of `request`. Raises RequestRefused for a value out of range."""
        sampling = request.sampling_params(model.options.sampling)
        return cls(
            n=request.n or 1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repeat_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=request.seed,
            stop=request.stop_strings,
            stop_token_ids=request.stop_token_ids or [],
            ignore_eos=bool(request.ignore_eos),
            max_tokens=max_new_tokens(model, token_limit, prompt_tokens),
            min_tokens=request.min_tokens or 0,
        )


class RenderedPrompt(Struct, frozen=True, kw_only=True):
    """One prompt in the shape that vLLM's disaggregated servers exchange."""

    request_id: str
    token_ids: tuple[int, ...]
    features: None = None
    sampling_params: RenderedSampling
    model: str
    stream: bool
    stream_options: StreamOptions | None
    cache_salt: str | None
    priority: int = 0
    kv_transfer_params: None = None


class InputTokensReply(Struct, frozen=True):
    """The body of POST /v1/responses/input_tokens and POST /v1/chat/completions/input_tokens."""

    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


class RenderEndpoints:
    """The endpoints that render prompts without generation: /render and /input_tokens below the completions."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def chat(self, http_request: HTTPRequest) -> Response:
        """Returns the rendered prompt of a chat completion."""
        model = self._state.model
        request = await read_generation_request(http_request, model, _CHAT_DECODER)
        chat = await prepare_chat(request, model.prompts)
        try:
            rendered = _render(model, request, chat.prompt, f"chatcmpl-{uuid4().hex}", request.token_limit)
        except ContextExceeded as error:
            error.field = "messages"
            raise
        return JSONResponse(rendered)

    async def count_chat(self, http_request: HTTPRequest) -> Response:
        """Returns the number of tokens of a chat's prompt, which may be longer than the context."""
        model = self._state.model
        request = await read_generation_request(http_request, model, _CHAT_DECODER)
        return JSONResponse(InputTokensReply(len((await prepare_chat(request, model.prompts)).prompt)))

    async def text(self, http_request: HTTPRequest) -> Response:
        """Returns a list with the rendered prompts of a text completion."""
        model = self._state.model
        request = await read_generation_request(http_request, model, _TEXT_DECODER)
        token_limit = DEFAULT_MAX_TOKENS if request.token_limit is None else request.token_limit
        prompts = await tokenize_prompts(model, request.prompts, request.suffix)
        request_id = f"cmpl-{uuid4().hex}"
        return JSONResponse(
            [
                _render(model, request, prompt, f"{request_id}-{index}", token_limit)
                for index, prompt in enumerate(prompts)
            ]
        )


def _render(
    model: LoadedModel, request: GenerationRequest, tokens: tuple[int, ...], request_id: str, token_limit: int | None
) -> RenderedPrompt:
    """Returns one rendered prompt. Raises ContextExceeded, as a completion of the prompt would."""
    if len(tokens) >= model.engine.request_limit:
        raise model.engine.context_exceeded(len(tokens))
    return RenderedPrompt(
        request_id=request_id,
        token_ids=tokens,
        sampling_params=RenderedSampling.of(request, model, token_limit, len(tokens)),
        model=model.name,
        stream=bool(request.stream),
        stream_options=request.stream_options,
        cache_salt=request.cache_salt,
    )
