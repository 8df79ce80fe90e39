"""Vertex AI's prediction protocol: one request has several instances, each the body of another endpoint."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Scope

from api.http.decode_errors import nearest_hint
from api.http.events import JSONBody, encode_json
from api.http.request_body import read_body
from api.http.responses import PendingJSONResponse, json_error
from api.http.tasks import run_concurrently
from api.schema.requests import decode_body
from engine import RequestRefused

_FORMAT = "@requestFormat"
# Headers that describe the body of the whole request.
_BODY_HEADERS = (b"content-length", b"content-encoding", b"transfer-encoding")


class PredictRequest(Struct):
    """The body of a prediction. Each instance is the body of the endpoint that `@requestFormat` names."""

    instances: Annotated[list[dict[str, Any]], Meta(max_length=128)]


class Predictions(Struct, frozen=True):
    """The reply, with the reply of each instance, which can be an error."""

    predictions: list[Raw]


_DECODER = msgspec.json.Decoder(PredictRequest)


def predict_routes(routes: Sequence[Route], environment: Mapping[str, str], max_body: int) -> list[Route]:
    """Returns the routes of the protocol that `environment` requests, in which `routes` can be named; none if
    `AIP_MODE` is not `PREDICTION`."""
    if environment.get("AIP_MODE") != "PREDICTION":
        return []
    predict = PredictEndpoint(routes, max_body)
    added = [Route(_path(environment, "AIP_PREDICT_ROUTE", "/predict"), predict.predict, methods=["POST"])]
    if health := _path(environment, "AIP_HEALTH_ROUTE", ""):
        added += [Route(health, route.endpoint) for route in routes if route.path == "/health"]
    return added


def _path(environment: Mapping[str, str], name: str, default: str) -> str:
    path = environment.get(name, "") or default
    return f"/{path.strip('/')}" if path else ""


def format_name(path: str) -> str:
    """Returns the name of an endpoint as llama-server derives it.

    >>> format_name("/v1/chat/completions"), format_name("/apply-template")
    ('chatCompletions', 'applyTemplate')
    """
    first, *others = re.split(r"[/_-]", path.removeprefix("/v1").removeprefix("/"))
    return first + "".join(word[:1].upper() + word[1:] for word in others)


class PredictEndpoint:
    """The endpoint of the protocol."""

    def __init__(self, routes: Sequence[Route], max_body: int) -> None:
        callable_routes = [each for each in routes if "POST" in (each.methods or ()) and not each.param_convertors]
        self._routes = {format_name(route.path): route for route in reversed(callable_routes)}
        self._routes |= {route.path: route for route in callable_routes}
        self._max_body = max_body

    async def predict(self, request: Request) -> Response:
        """Runs all instances concurrently and returns their replies. An instance cannot stream."""
        body = decode_body(_DECODER, await read_body(request, self._max_body))
        return PendingJSONResponse(partial(self._predictions, request.scope, body.instances))

    async def _predictions(self, scope: Scope, instances: Sequence[dict[str, Any]]) -> JSONBody:
        replies = [Raw(b"null")] * len(instances)

        async def run(index: int) -> None:
            replies[index] = await self._reply(scope, instances[index], f"instances[{index}].{_FORMAT}")

        await run_concurrently([partial(run, index) for index in range(len(instances))])
        return Predictions(replies)

    async def _reply(self, scope: Scope, instance: dict[str, Any], field: str) -> Raw:
        """Returns the body of the reply of one instance."""
        name = str(instance.pop(_FORMAT, ""))
        if (route := self._routes.get(name)) is None:
            hint = nearest_hint(name, list(self._routes))
            refusal = RequestRefused(f"{field}: there is no endpoint {name[:64]!r}{hint}.", field=field)
            return await _body_of(json_error(refusal), scope, b"")
        if "stream" in instance:
            instance["stream"] = False
        return await _body_of(route, {**scope, "path": route.path, "path_params": {}}, encode_json(instance))


async def _body_of(response: Route | Response, scope: Scope, body: bytes) -> Raw:
    """Returns the body of a response, or of a route's response to a request with `body`."""
    requests = [{"type": "http.request", "body": body}]
    parts: list[bytes] = []

    async def receive() -> Message:
        if not requests:
            await asyncio.Event().wait()  # until the caller is cancelled, when its client disconnects
        return requests.pop()

    async def send(message: Message) -> None:
        parts.append(message.get("body", b""))

    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _BODY_HEADERS]
    handler = response.app if isinstance(response, Route) else response
    try:
        await handler({**scope, "headers": headers}, receive, send)
    except Exception as error:
        parts.clear()
        await json_error(error)(scope, receive, send)
    return Raw(b"".join(parts) or b"null")
