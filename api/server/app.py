"""The ASGI application: routes, error handlers and middleware."""

from __future__ import annotations

from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from api.generation.loaded_model import AppState, LoadedModel
from api.http.api_keys import ApiKeyMiddleware
from api.http.request_context import CLIENT_CLOSED_REQUEST, RequestContextMiddleware, request_context
from api.http.responses import JSONResponse, json_error
from api.llama_server.completion import CompletionEndpoint
from api.llama_server.props import props_reply
from api.llama_server.slots import SlotEndpoints
from api.llama_server.tokenize import TokenizeEndpoints
from api.openai.chat import ChatCompletionEndpoint
from api.openai.completions import TextCompletionEndpoint
from api.openai.render import RenderEndpoints
from api.schema.replies import HealthReply, ModelList, ModelMeta, ModelReply
from api.server.metrics import metrics_registry
from engine import EngineError


def create_app(state: AppState) -> ASGIApp:
    """Returns the ASGI application. Routes answer 503 until `state` has a loaded model."""
    chat, text, render = ChatCompletionEndpoint(state), TextCompletionEndpoint(state), RenderEndpoints(state)
    completion, tokens, slots = CompletionEndpoint(state), TokenizeEndpoints(state), SlotEndpoints(state)
    status = StatusEndpoints(state)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat.create, methods=["POST"]),
            Route("/chat/completions", chat.create, methods=["POST"]),
            Route("/v1/completions", text.create, methods=["POST"]),
            Route("/completion", completion.complete, methods=["POST"]),
            Route("/completions", completion.complete, methods=["POST"]),
            Route("/v1/chat/completions/render", render.chat, methods=["POST"]),
            Route("/v1/completions/render", render.text, methods=["POST"]),
            Route("/tokenize", tokens.tokenize, methods=["POST"]),
            Route("/detokenize", tokens.detokenize, methods=["POST"]),
            Route("/apply-template", tokens.apply_template, methods=["POST"]),
            Route("/v1/models", status.models),
            Route("/v1/models/{id:path}", status.model),
            Route("/health", status.health),
            Route("/metrics", status.metrics),
            Route("/props", status.props),
            Route("/slots", slots.show),
            Route("/slots/{id}", slots.act, methods=["POST"]),
        ],
        exception_handlers={
            EngineError: _on_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            RecursionError: _on_error,
            Exception: _on_error,
        },
    )
    config = state.config
    # The middleware encloses Starlette, because Starlette's own response to an unexpected exception needs a request id.
    return RequestContextMiddleware(
        ApiKeyMiddleware(app, config.api_keys, separate_namespaces=config.cache_salt_by_key)
    )


class StatusEndpoints:
    """The endpoints that report on the server: /health, /metrics, /props and /v1/models."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._registry: CollectorRegistry | None = None

    async def health(self, request: Request) -> Response:
        """Returns 200 if requests are accepted. Raises ModelLoading, Draining or EngineFault otherwise."""
        _ = self._state.model
        return JSONResponse(HealthReply())

    async def metrics(self, request: Request) -> Response:
        """Returns the metrics in Prometheus' text format."""
        if self._registry is None:
            self._registry = metrics_registry(self._state.model.engine)
        return Response(generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def props(self, request: Request) -> Response:
        """Returns the properties of the model and the defaults of requests, in llama-server's shape."""
        return JSONResponse(props_reply(self._state.model))

    async def models(self, request: Request) -> Response:
        """Returns a list with the loaded model."""
        return JSONResponse(ModelList([_model_reply(self._state.model)]))

    async def model(self, request: Request) -> Response:
        """Returns the loaded model. Raises UnknownModel if the path names another one."""
        model = self._state.model
        model.check_name(request.path_params["id"])
        return JSONResponse(_model_reply(model))


def _model_reply(model: LoadedModel) -> ModelReply:
    info = model.engine.info
    meta = ModelMeta(info.vocabulary, info.context, info.trained_context, info.parameters, info.bytes)
    return ModelReply(model.name, model.created, model.engine.request_limit, meta)


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
