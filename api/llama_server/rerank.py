"""POST /rerank: scores documents by their relevance to a query, in the shapes of Jina, Cohere and TEI."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from api.generation.embedding import EmbeddedInput, embed_tokens, embedding_model
from api.generation.loaded_model import AppState, LoadedModel
from api.http.error_responses import EndpointDisabled
from api.http.events import JSONBody
from api.http.request_body import read_body
from api.http.request_context import RequestContext, request_context
from api.http.responses import PendingJSONResponse
from api.schema.requests import decode_any_body
from api.templates.text_tokens import without_added
from engine import WORKERS, EmbeddingModel, RequestRefused

# Maximum documents of one request.
_MAX_DOCUMENTS = 2048

# Replaced in one pass, as a query may contain the text of a placeholder.
_PLACEHOLDER = re.compile(r"\{query\}|\{document\}")


class RerankDocument(Struct):
    """A document as an object."""

    text: str


DocumentList = Annotated[list[str | RerankDocument], Meta(min_length=1, max_length=_MAX_DOCUMENTS)]


class RerankRequest(Struct):
    """Request body of POST /rerank. A body with `texts` gets TEI's shape."""

    query: str
    documents: DocumentList | None = None
    texts: DocumentList | None = None
    top_n: Annotated[int, Meta(ge=0)] | None = None
    return_documents: bool | None = None
    return_text: bool | None = None
    model: str | None = None
    user: str | None = None
    """The owner of the request for fair queueing on a server without API keys."""

    @property
    def all_texts(self) -> list[str]:
        """The documents. Raises RequestRefused if there are none."""
        given = self.texts if self.documents is None else self.documents
        if given is None:
            raise RequestRefused("documents must be a non-empty list of texts.", field="documents")
        return [each.text if isinstance(each, RerankDocument) else each for each in given]


class RerankResult(Struct, frozen=True, kw_only=True):
    """The score of one document in Jina's shape."""

    index: int
    relevance_score: float
    document: RerankDocument | UnsetType = UNSET


class TeiResult(Struct, frozen=True, kw_only=True):
    """The score of one document in TEI's shape."""

    index: int
    score: float
    text: str | UnsetType = UNSET


class RerankUsage(Struct, frozen=True):
    """The tokens of all pairs of the query and a document."""

    prompt_tokens: int
    total_tokens: int


class RerankReply(Struct, frozen=True, kw_only=True):
    """Reply of POST /rerank in Jina's shape."""

    model: str
    object: str = "list"
    usage: RerankUsage
    results: list[RerankResult]


_DECODER = msgspec.json.Decoder(RerankRequest)


class RerankEndpoint:
    """The endpoint POST /rerank."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def rank(self, request: HTTPRequest) -> Response:
        """Returns the documents' scores, the highest first. Raises EndpointDisabled if the model computes no scores."""
        model = self._state.model
        embedder = model.engine.embeddings
        if embedder is None or embedder.info.pooling != "rank":
            reason = f" The pooling of its embeddings is {embedder.info.pooling}." if embedder is not None else ""
            raise EndpointDisabled(
                "This server does not support reranking. Start it with `--reranking` and a reranker model." + reason
            )
        body = await decode_any_body(_DECODER, await read_body(request, model.options.server.max_body))
        if body.model != embedder.info.name:
            model.check_name(body.model)
        return PendingJSONResponse(partial(_reply, model, body, request_context(request.scope)))


async def _reply(model: LoadedModel, body: RerankRequest, context: RequestContext) -> JSONBody:
    texts, embedder = body.all_texts, embedding_model(model)
    pairs = await WORKERS.run(lambda: [_tokenize_pair(embedder, body.query, text) for text in texts])
    field = "texts" if body.documents is None else "documents"
    names = [f"{field}[{index}]" for index in range(len(texts))]
    scored = await embed_tokens(model, context, pairs, names, body.user)
    best = _best_first(scored)[: body.top_n]
    if body.documents is None:
        return [
            TeiResult(index=index, score=_score(scored[index]), text=texts[index] if body.return_text else UNSET)
            for index in best
        ]
    total = sum(each.tokens for each in scored)
    results = [
        RerankResult(
            index=index,
            relevance_score=_score(scored[index]),
            document=RerankDocument(texts[index]) if body.return_documents else UNSET,
        )
        for index in best
    ]
    name = embedder.info.name if model.options.embedding.path else model.name
    return RerankReply(model=name, usage=RerankUsage(total, total), results=results)


def _tokenize_pair(embedder: EmbeddingModel, query: str, document: str) -> list[int]:
    """Returns the tokens of a query and a document: in the model's template, or between its special tokens."""
    info, vocab = embedder.info, embedder.vocab
    if info.rerank_template:
        texts = {"{query}": query, "{document}": document}
        text = _PLACEHOLDER.sub(lambda found: texts[found[0]], info.rerank_template)
        return without_added(vocab, vocab.tokenize(text, special=True))
    start, middle, end = info.marks
    first, second = (vocab.tokenize(text, special=False) for text in (query, document))
    return [*start, *first, *middle, *second, *end]


def _score(embedded: EmbeddedInput) -> float:
    return float(embedded.vectors[0, 0])


def _best_first(scored: Sequence[EmbeddedInput]) -> list[int]:
    """Returns the indices of the documents, the highest score first."""
    return sorted(range(len(scored)), key=lambda index: -_score(scored[index]))
