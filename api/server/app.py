"""The ASGI application: routes, error handlers and middleware."""

from __future__ import annotations

import os
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from api.anthropic.errors import ANTHROPIC_DIALECT
from api.anthropic.messages import MessagesEndpoints
from api.generation.loaded_model import AppState
from api.http.api_keys import ApiKeyMiddleware
from api.http.connection_limit import ConnectionLimitMiddleware
from api.http.content_type import JSONContentMiddleware
from api.http.disconnect import DisconnectMiddleware
from api.http.origins import CorsMiddleware, CorsPolicy, LoopbackGuard, StateGuard, is_loopback
from api.http.prefix import PathPrefixMiddleware
from api.http.request_context import CLIENT_CLOSED_REQUEST, RequestContextMiddleware, request_context
from api.http.responses import json_error
from api.llama_server.completion import CompletionEndpoint
from api.llama_server.infill import InfillEndpoint
from api.llama_server.lora import LoraEndpoints
from api.llama_server.rerank import RerankEndpoint
from api.llama_server.slots import SlotEndpoints
from api.llama_server.tokenize import TokenizeEndpoints
from api.openai.chat import ChatCompletionEndpoint
from api.openai.completions import TextCompletionEndpoint
from api.openai.embeddings import EmbeddingEndpoints
from api.openai.render import RenderEndpoints
from api.openai.responses.endpoint import ResponsesEndpoints
from api.server.openapi import OPENAPI_PATH, OpenAPIEndpoint
from api.server.predict import predict_routes
from api.server.router_info import ProbeEndpoints
from api.server.status import StatusEndpoints
from api.ui.events import EVENTS_PATH, LiveEventsEndpoint
from api.ui.page import ASSET_PATH, PAGE_PATH, PageEndpoints
from engine import EngineError

_MESSAGES_PATH = "/v1/messages"
# Paths whose POST requests change the state that all clients share.
_STATE_PATHS = ("/slots/", "/lora-adapters", "/props")


def create_app(state: AppState) -> ASGIApp:
    """Returns the ASGI application. Routes answer 503 until `state` has a loaded model."""
    routes = [
        *_openai_routes(state),
        *_responses_routes(state),
        *_anthropic_routes(state),
        *_llama_server_routes(state),
        *_embedding_routes(state),
        *_status_routes(state),
        *_page_routes(state),
    ]
    routes += predict_routes(routes, os.environ, state.config.max_body)
    routes.append(Route(OPENAPI_PATH, OpenAPIEndpoint(routes, state.config.api_prefix).show))
    state.responses.use_routes(routes, state.config.api_prefix)
    app: ASGIApp = Starlette(
        routes=routes,
        exception_handlers={
            EngineError: _on_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            RecursionError: _on_error,
            Exception: _on_error,
        },
    )
    # The middleware encloses Starlette, because Starlette's own response to an unexpected exception needs a request id.
    # The outermost comes last.
    config = state.config
    if not config.any_content_type:
        app = JSONContentMiddleware(app)
    app = ApiKeyMiddleware(
        app,
        state.keys,
        separate_namespaces=config.cache_salt_by_key,
        is_public=_is_page if config.ui else _never,
        admin_paths=_STATE_PATHS,
    )
    cors = CorsPolicy(config.cors_origins, config.cors_methods, config.cors_headers, config.cors_credentials)
    # A page of a foreign origin has no key, so keys make the checks needless, also behind a proxy on this machine.
    if not state.keys.required:
        app = StateGuard(app, cors, _STATE_PATHS)
        if all(map(is_loopback, config.host)):
            app = LoopbackGuard(app, cors, config.allowed_hosts)
    app = DisconnectMiddleware(CorsMiddleware(ConnectionLimitMiddleware(app), cors))
    if config.api_prefix:
        app = PathPrefixMiddleware(app, config.api_prefix)
    dialects = {config.api_prefix + _MESSAGES_PATH: ANTHROPIC_DIALECT}
    return RequestContextMiddleware(app, dialects, lambda: state.draining, state.errors, state.responses)


def _openai_routes(state: AppState) -> list[Route]:
    chat, text, render = ChatCompletionEndpoint(state), TextCompletionEndpoint(state), RenderEndpoints(state)
    return [
        Route("/v1/chat/completions", chat.create, methods=["POST"]),
        Route("/chat/completions", chat.create, methods=["POST"]),
        Route("/v1/completions", text.create, methods=["POST"]),
        Route("/v1/chat/completions/input_tokens", render.count_chat, methods=["POST"]),
        Route("/chat/completions/input_tokens", render.count_chat, methods=["POST"]),
        Route("/v1/chat/completions/render", render.chat, methods=["POST"]),
        Route("/v1/completions/render", render.text, methods=["POST"]),
    ]


def _responses_routes(state: AppState) -> list[Route]:
    responses = ResponsesEndpoints(state)
    return [
        route
        for path in ("/v1/responses", "/responses")
        for route in (
            Route(path, responses.create, methods=["POST"]),
            Route(f"{path}/input_tokens", responses.input_tokens, methods=["POST"]),
            Route(f"{path}/", responses.retrieve, methods=["GET"]),
            Route(f"{path}/{{id}}", responses.retrieve, methods=["GET"]),
            Route(f"{path}/{{id}}", responses.delete, methods=["DELETE"]),
            Route(f"{path}/{{id}}/input_items", responses.input_items, methods=["GET"]),
        )
    ]


def _anthropic_routes(state: AppState) -> list[Route]:
    messages = MessagesEndpoints(state)
    return [
        Route(_MESSAGES_PATH, messages.create, methods=["POST"]),
        Route(f"{_MESSAGES_PATH}/count_tokens", messages.count_tokens, methods=["POST"]),
    ]


def _llama_server_routes(state: AppState) -> list[Route]:
    completion, tokens, slots = CompletionEndpoint(state), TokenizeEndpoints(state), SlotEndpoints(state)
    infill, lora = InfillEndpoint(state), LoraEndpoints(state)
    return [
        Route("/completion", completion.complete, methods=["POST"]),
        Route("/completions", completion.complete, methods=["POST"]),
        Route("/infill", infill.fill, methods=["POST"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        Route("/apply-template", tokens.apply_template, methods=["POST"]),
        Route("/slots", slots.show),
        Route("/lora-adapters", lora.show),
        Route("/lora-adapters", lora.set_scales, methods=["POST"]),
        Route("/slots/{id}", slots.act, methods=["POST"]),
    ]


def _embedding_routes(state: AppState) -> list[Route]:
    embeddings, rerank = EmbeddingEndpoints(state), RerankEndpoint(state)
    rerank_paths = ("/rerank", "/reranking", "/v1/rerank", "/v1/reranking", "/v2/rerank")
    return [
        Route("/v1/embeddings", embeddings.create, methods=["POST"]),
        Route("/embeddings", embeddings.native, methods=["POST"]),
        Route("/embedding", embeddings.native, methods=["POST"]),
        *(Route(path, rerank.rank, methods=["POST"]) for path in rerank_paths),
    ]


def _status_routes(state: AppState) -> list[Route]:
    status = StatusEndpoints(state)
    return [
        *(Route(path, status.models) for path in ("/v1/models", "/v1/models/", "/models")),
        Route("/v1/models/{id:path}", status.model),
        Route("/health", status.health),
        Route("/v1/health", status.health),
        Route("/version", status.version),
        Route("/metrics", status.metrics),
        Route("/props", status.props),
        Route("/props", status.set_props, methods=["POST"]),
        *_probe_routes(state),
    ]


def _probe_routes(state: AppState) -> list[Route]:
    probes = ProbeEndpoints(state)
    return [
        Route("/livez", probes.live),
        Route("/is_sleeping", probes.is_sleeping),
        *(Route(path, probes.server_info) for path in ("/server_info", "/get_server_info")),
        *(Route(path, probes.model_info) for path in ("/model_info", "/get_model_info")),
    ]


def _page_routes(state: AppState) -> list[Route]:
    events = Route(EVENTS_PATH, LiveEventsEndpoint(state).stream)
    if not state.config.ui:
        return [events]
    page = PageEndpoints(needs_key=state.config.has_keys)
    return [events, Route(PAGE_PATH, page.page), Route(f"{ASSET_PATH}{{name}}", page.asset)]


def _is_page(path: str) -> bool:
    return path == PAGE_PATH or path.startswith(ASSET_PATH)


def _never(path: str) -> bool:
    return False


async def _on_error(request: Request, error: Exception) -> Response:
    request_context(request.scope).error = error
    return json_error(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.detail == HTTPStatus(error.status_code).phrase:
        error.detail = f"{error.detail}: {request.method} {request.url.path}"
    return await _on_error(request, error)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)  # only for the log: the client has closed the connection
