"""POST /v1/embeddings in OpenAI's shape, and POST /embeddings and /embedding in llama-server's."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from api.generation.embedding import EmbeddedInput, embed_tokens, embedding_model, normalized, tokenize_inputs
from api.generation.loaded_model import AppState, LoadedModel
from api.http.events import JSONBody, encode_json
from api.http.request_body import read_body
from api.http.request_context import RequestContext, request_context
from api.http.responses import PendingJSONResponse
from api.schema.request_values import ContentPart
from api.schema.requests import decode_any_body
from api.templates.chat_messages import part_texts
from engine import Embedding, EmbeddingInfo, RequestRefused

# Maximum inputs of one request, as in OpenAI's API.
MAX_EMBEDDED_INPUTS = 2048

Norm = Annotated[int, Meta(ge=-1, le=64)]


class EmbeddingObject(Struct):
    """An input in llama-server's shapes with a name: a text, or content parts as in chats. Only text is supported."""

    prompt_string: str | None = None
    content: list[ContentPart] | None = None
    multimodal_data: Any = None


# A text, a mixed list of texts and token ids, an object, or a list of inputs.
EmbeddingField = str | list[str | int | list[str | int] | EmbeddingObject] | EmbeddingObject


class EmbeddingRequest(Struct, kw_only=True):
    """Request body of POST /v1/embeddings and /embeddings."""

    input: EmbeddingField | None = None
    content: EmbeddingField | None = None
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    embd_normalize: Norm | None = None
    user: str | None = None
    """The owner of the request for fair queueing on a server without API keys."""

    @property
    def field(self) -> str:
        """The name of the field that has the inputs."""
        return "content" if self.input is None else "input"

    @property
    def inputs(self) -> list[list[str | int]]:
        """The inputs, each a mixed list of texts and token ids. Raises RequestRefused if there are none or too many."""
        given = self.content if self.input is None else self.input
        if given is None or given == []:
            raise RequestRefused("input must be a text, token ids, or a non-empty list of inputs.", field="input")
        if isinstance(given, list) and any(isinstance(item, int) for item in given):
            return [_mixed(given, self.field)]
        items = given if isinstance(given, list) else [given]
        if len(items) > MAX_EMBEDDED_INPUTS:
            raise RequestRefused(
                f"{self.field} has {len(items)} inputs; send at most {MAX_EMBEDDED_INPUTS}.", field=self.field
            )
        return [list(_parts(item, f"{self.field}[{index}]")) for index, item in enumerate(items)]


class EmbeddingItem(Struct, frozen=True, kw_only=True):
    """The embedding of one input in OpenAI's shape."""

    object: str = "embedding"
    index: int
    embedding: Raw | str
    encoding_format: str | UnsetType = UNSET


class TokenUsage(Struct, frozen=True):
    """The tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(Struct, frozen=True, kw_only=True):
    """Reply of POST /v1/embeddings."""

    object: str = "list"
    data: list[EmbeddingItem]
    model: str
    usage: TokenUsage


class LlamaEmbeddingItem(Struct, frozen=True):
    """The vectors of one input in llama-server's shape: one, or one for each token without pooling."""

    index: int
    embedding: list[Raw]


_DECODER = msgspec.json.Decoder(EmbeddingRequest)


class EmbeddingEndpoints:
    """The endpoints that compute embeddings."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def create(self, request: HTTPRequest) -> Response:
        """Returns one vector for each input. A body with `content` gets llama-server's shape, as in llama-server."""
        model = self._state.model
        body = await _read(request, model)
        if body.input is None and body.content is not None:
            return PendingJSONResponse(partial(_llama_reply, model, body, request_context(request.scope)))
        if embedding_model(model).info.pooling == "none":
            raise RequestRefused(
                "The pooling type is 'none', which gives a vector for each token: use POST /embeddings, or start the "
                "server with another --pooling."
            )
        return PendingJSONResponse(partial(_reply, model, body, request_context(request.scope)))

    async def native(self, request: HTTPRequest) -> Response:
        """Returns the vectors of each input in llama-server's shape."""
        model = self._state.model
        body = await _read(request, model)
        return PendingJSONResponse(partial(_llama_reply, model, body, request_context(request.scope)))


async def _read(request: HTTPRequest, model: LoadedModel) -> EmbeddingRequest:
    """Returns the checked body. Raises EndpointDisabled or RequestRefused."""
    info = embedding_model(model).info
    if info.pooling == "rank":
        raise RequestRefused("The model computes scores, not embeddings: use POST /rerank.")
    body = await decode_any_body(_DECODER, await read_body(request, model.options.server.max_body))
    if body.model != info.name:
        model.check_name(body.model)
    if body.dimensions not in (None, info.width):
        raise RequestRefused(
            f"dimensions: this model's embeddings have {info.width} numbers and cannot be shortened; leave the field "
            "out.",
            field="dimensions",
        )
    return body


async def _embed(model: LoadedModel, body: EmbeddingRequest, context: RequestContext) -> list[EmbeddedInput]:
    inputs = body.inputs
    tokens = await tokenize_inputs(embedding_model(model), inputs)
    single = len(inputs) == 1 and not isinstance(body.input or body.content, list)
    names = [body.field] if single else [f"{body.field}[{index}]" for index in range(len(inputs))]
    embedded = await embed_tokens(model, context, tokens, names, body.user)
    if embedding_model(model).info.pooling == "none":
        return embedded  # as in llama-server, only pooled vectors are normalized
    norm = model.options.embedding.normalize if body.embd_normalize is None else body.embd_normalize
    return [each._replace(vectors=normalized(each.vectors, norm)) for each in embedded]


async def _reply(model: LoadedModel, body: EmbeddingRequest, context: RequestContext) -> JSONBody:
    embedded = await _embed(model, body, context)
    items: list[EmbeddingItem] = []
    for index, each in enumerate(embedded):
        await asyncio.sleep(0)  # lets the event loop serve other requests between two vectors
        if body.encoding_format == "base64":
            text = base64.b64encode(each.vectors.astype("<f4").tobytes()).decode()
            items.append(EmbeddingItem(index=index, embedding=text, encoding_format="base64"))
        else:
            items.append(EmbeddingItem(index=index, embedding=_numbers(each.vectors[0])))
    total = sum(each.tokens for each in embedded)
    return EmbeddingReply(data=items, model=_model_name(model), usage=TokenUsage(total, total))


async def _llama_reply(model: LoadedModel, body: EmbeddingRequest, context: RequestContext) -> JSONBody:
    replies: list[LlamaEmbeddingItem] = []
    for index, each in enumerate(await _embed(model, body, context)):
        await asyncio.sleep(0)
        replies.append(LlamaEmbeddingItem(index, [_numbers(vector) for vector in each.vectors]))
    return replies


def _model_name(model: LoadedModel) -> str:
    info: EmbeddingInfo = embedding_model(model).info
    return info.name if model.options.embedding.path else model.name


def _numbers(vector: Embedding) -> Raw:
    """Returns a vector as JSON, encoded here so that a large reply does not hold up the event loop at its end."""
    return Raw(encode_json(vector.tolist()))


def _mixed(items: Sequence[object], path: str) -> list[str | int]:
    parts = [item for item in items if isinstance(item, str | int)]
    if len(parts) < len(items):
        raise RequestRefused(f"{path} mixes token ids with lists or objects; send texts and token ids.", field=path)
    return parts


def _parts(item: str | int | Sequence[str | int] | EmbeddingObject, path: str) -> Iterator[str | int]:
    if isinstance(item, str | int):
        yield item
    elif isinstance(item, EmbeddingObject):
        yield _object_text(item, path)
    else:
        yield from item


def _object_text(item: EmbeddingObject, path: str) -> str:
    if item.multimodal_data:
        raise RequestRefused(
            f"{path}: multimodal_data is not supported; send the text alone in prompt_string.", field=path
        )
    if item.prompt_string is not None:
        return item.prompt_string
    if item.content is None:
        raise RequestRefused(f"{path} needs prompt_string or content.", field=path)
    return "".join(part_texts(item.content, f"{path}.content"))
