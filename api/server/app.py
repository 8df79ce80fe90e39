"""The application: routes, errors and what stands before them."""

from __future__ import annotations

from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from api.generation.loaded_model import Served, Site
from api.http.error_responses import problem_of
from api.http.keys import Keys
from api.http.request_context import HUNG_UP, Exchanges, exchange_of
from api.http.responses import JSONReply, problem_reply
from api.llama_server.completion import Native
from api.llama_server.props import props_of
from api.llama_server.slots import Slots
from api.llama_server.tokenize import Tokens
from api.openai.chat import Chat
from api.openai.completions import Text
from api.openai.render import Render
from api.schema.replies import Health, ModelList, ModelMeta, ModelReply
from api.server.metrics import registry_of
from engine import EngineError


def create_app(site: Site) -> ASGIApp:
    """The server's ASGI application. While `site` serves nothing yet, everything answers 503."""
    chat, text, status, slots = Chat(site), Text(site), Status(site), Slots(site)
    native, render, tokens = Native(site), Render(site), Tokens(site)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat.complete, methods=["POST"]),
            Route("/chat/completions", chat.complete, methods=["POST"]),
            Route("/v1/completions", text.complete, methods=["POST"]),
            Route("/completion", native.complete, methods=["POST"]),
            Route("/completions", native.complete, methods=["POST"]),
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
            EngineError: _tell,
            HTTPException: _tell_http,
            ClientDisconnect: _gone,
            RecursionError: _tell,
            Exception: _tell,
        },
    )
    # Around Starlette, not inside it: its own answer to a crash needs an id too.
    return Exchanges(Keys(app, site.config.api_keys, apart=site.config.cache_salt_by_key))


class Status:
    """The endpoints that tell about the server."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._registry: CollectorRegistry | None = None

    async def health(self, request: Request) -> Response:
        """200 once requests are served, until the server ends or its engine failed for good."""
        _ = self._site.open
        return JSONReply(Health())

    async def metrics(self, request: Request) -> Response:
        """The Prometheus text."""
        if self._registry is None:
            self._registry = registry_of(self._site.open.engine)
        return Response(generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def props(self, request: Request) -> Response:
        """What is served and what requests default to."""
        return JSONReply(props_of(self._site.open))

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONReply(ModelList([_model(self._site.open)]))

    async def model(self, request: Request) -> Response:
        """The model under any of its names."""
        served = self._site.open
        served.check_model(request.path_params["id"])
        return JSONReply(_model(served))


def _model(served: Served) -> ModelReply:
    info = served.engine.info
    meta = ModelMeta(info.vocabulary, info.context, info.trained_context, info.parameters, info.bytes)
    return ModelReply(served.name, served.created, served.engine.request_limit, meta)


async def _tell(request: Request, error: Exception) -> Response:
    exchange_of(request.scope).failure = error
    return problem_reply(problem_of(error))


async def _tell_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.detail == HTTPStatus(error.status_code).phrase:
        error.detail = f"{error.detail}: {request.method} {request.url.path}"
    return await _tell(request, error)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=HUNG_UP)  # nobody is left to read it
