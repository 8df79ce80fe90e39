"""POST /v1/chat/completions/render and /v1/completions/render: vLLM's, what a completion would be asked for.

Routers take the token ids from here to send equal prefixes to one server.
"""

from __future__ import annotations

from uuid import uuid4

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from api.generation.choices import asked_of
from api.generation.loaded_model import Served, Site
from api.generation.turns import turn_of
from api.http.responses import JSONReply
from api.openai.completions import DEFAULT_LIMIT, tokens_of
from api.schema.requests import ChatRequest, Completion, StreamOptions, TextRequest
from engine import ContextExceeded

_CHAT = msgspec.json.Decoder(ChatRequest)
_TEXT = msgspec.json.Decoder(TextRequest)


class Sampling(Struct, frozen=True, kw_only=True):
    """What tokens are picked by, under vLLM's names."""

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
    def of(cls, asked: Completion, served: Served, limit: int | None) -> Sampling:
        """Of a request, with the server's defaults. Raises RequestRefused."""
        sampling = asked.sampling(served.options.sampling)
        return cls(
            n=asked.n or 1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repeat_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=asked.seed,
            stop=asked.stops,
            stop_token_ids=asked.stop_token_ids or [],
            ignore_eos=bool(asked.ignore_eos),
            max_tokens=None if limit == -1 else limit,
            min_tokens=asked.min_tokens or 0,
        )


class Rendered(Struct, frozen=True, kw_only=True):
    """One prompt, as vLLM's disaggregated servers pass it on."""

    request_id: str
    token_ids: tuple[int, ...]
    features: None = None
    sampling_params: Sampling
    model: str
    stream: bool
    stream_options: StreamOptions | None
    cache_salt: str | None
    priority: int = 0
    kv_transfer_params: None = None


class Render:
    """The endpoints."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def chat(self, request: Request) -> Response:
        """The prompt of a conversation."""
        served = self._site.open
        asked = await asked_of(request, served, _CHAT)
        turn = await turn_of(asked, served.prompts)
        try:
            return JSONReply(_rendered(served, asked, turn.prompt, f"chatcmpl-{uuid4().hex}", asked.limit))
        except ContextExceeded as error:
            error.field = "messages"
            raise

    async def text(self, request: Request) -> Response:
        """The prompts of a completion."""
        served = self._site.open
        asked = await asked_of(request, served, _TEXT)
        limit = DEFAULT_LIMIT if asked.limit is None else asked.limit
        prompts = await tokens_of(served, asked.prompts)
        name = f"cmpl-{uuid4().hex}"
        return JSONReply(
            [_rendered(served, asked, prompt, f"{name}-{index}", limit) for index, prompt in enumerate(prompts)]
        )


def _rendered(served: Served, asked: Completion, tokens: tuple[int, ...], name: str, limit: int | None) -> Rendered:
    """Raises ContextExceeded as the completion would."""
    if len(tokens) >= served.engine.request_limit:
        raise served.engine.context_exceeded(len(tokens))
    return Rendered(
        request_id=name,
        token_ids=tokens,
        sampling_params=Sampling.of(asked, served, limit),
        model=served.name,
        stream=bool(asked.stream),
        stream_options=asked.stream_options,
        cache_salt=asked.cache_salt,
    )
