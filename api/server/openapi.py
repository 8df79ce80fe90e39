"""GET /openapi.json: the OpenAPI document of the server's endpoints, made from the structs of their bodies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from api.generation.loaded_model import PACELINE_VERSION
from api.http.responses import JSONResponse
from api.schema.requests import GenerationRequest
from api.server.operations import OPERATIONS, REFERENCED, SCHEMA_PATH, AnyOf, Operation
from engine import SamplingParams

OPENAPI_PATH = "/openapi.json"

# The statuses of every endpoint besides 200; README.md has their causes.
_ERRORS = (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 501, 503, 529)
_JSON, _EVENTS = "application/json", "text/event-stream"
# Fields with a type of their own in requests.
_OTHER_SAMPLING = ("seed", "logit_bias", "samplers")
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}

OpenAPIObject = dict[str, Any]


class OpenAPIEndpoint:
    """The endpoint /openapi.json. The document is made at the first request."""

    def __init__(self, routes: Sequence[Route], prefix: str) -> None:
        self._routes, self._prefix = list(routes), prefix
        self._document: OpenAPIObject | None = None

    async def show(self, request: Request) -> Response:
        """Returns the OpenAPI document of this server."""
        if self._document is None:
            self._document = openapi_document(self._routes, self._prefix)
        return JSONResponse(self._document)


def openapi_document(routes: Sequence[Route], prefix: str = "") -> OpenAPIObject:
    """Returns the document of those `routes` that `OPERATIONS` describes."""
    paths: dict[str, OpenAPIObject] = {}
    found = [(route, OPERATIONS[function]) for route in routes if (function := function_of(route)) in OPERATIONS]
    types = [*REFERENCED, *(type for _, operation in found for type in _types(operation))]
    schemas, components = msgspec.json.schema_components(types, schema_hook=_any, ref_template=SCHEMA_PATH)
    by_type = {id(type): schema for type, schema in zip(types, schemas, strict=True)}
    for route, operation in found:
        for method in sorted((route.methods or {"GET"}) - {"HEAD"}):
            path = route.path.replace(":path}", "}")
            paths.setdefault(path, {})[method.lower()] = _operation(route, method, operation, by_type)
    _set_sampling_ranges(components)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Paceline", "version": PACELINE_VERSION},
        "servers": [{"url": prefix or "/"}],
        "security": [{}, *({name: []} for name in _KEYS)],
        "paths": paths,
        "components": {"schemas": components, "responses": _error_responses(), "securitySchemes": _KEYS},
    }


def _error_responses() -> OpenAPIObject:
    names = sorted({operation.error.__name__ for operation in OPERATIONS.values()})
    return {
        name: {"description": "An error", "content": {_JSON: {"schema": {"$ref": SCHEMA_PATH.format(name=name)}}}}
        for name in names
    }


def function_of(route: Route) -> Any:
    """Returns the method of the endpoint's class that a route calls."""
    return getattr(route.endpoint, "__func__", route.endpoint)


def _any(kind: type) -> OpenAPIObject:
    """Returns the schema of a type that msgspec does not know, such as encoded JSON."""
    return {"description": "any value"}


def _types(operation: Operation) -> Iterator[Any]:
    for type in (operation.reply, operation.request, operation.event, operation.error):
        if isinstance(type, AnyOf):
            yield from type
        elif type is not None and not isinstance(type, str):
            yield type


def _operation(route: Route, method: str, operation: Operation, schemas: dict[int, OpenAPIObject]) -> OpenAPIObject:
    def content(media_type: str, type: Any) -> OpenAPIObject:
        if isinstance(type, str):
            return {type: {"schema": {"type": "string"}}}
        schema = {"anyOf": [schemas[id(each)] for each in type]} if isinstance(type, AnyOf) else schemas[id(type)]
        return {media_type: {"schema": schema}}

    replies = content(_JSON, operation.reply)
    if operation.event is not None:
        replies |= content(_EVENTS, operation.event)
    errors = {str(status): {"$ref": f"#/components/responses/{operation.error.__name__}"} for status in _ERRORS}
    summary = (route.endpoint.__doc__ or "").partition(". ")[0].split("\n\n")[0]
    described: OpenAPIObject = {
        "operationId": f"{method.lower()}{route.path}",
        "summary": " ".join(summary.split()),
        "parameters": [*_path_parameters(route), *_query_parameters(operation)],
        "responses": {"200": {"description": "success", "content": replies}, **errors},
    }
    if operation.request is not None:
        described["requestBody"] = {"required": True, "content": content(_JSON, operation.request)}
    return described


def _path_parameters(route: Route) -> Iterator[OpenAPIObject]:
    for name in route.param_convertors:
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _query_parameters(operation: Operation) -> Iterator[OpenAPIObject]:
    for name, kind in operation.query.items():
        yield {"name": name, "in": "query", "schema": msgspec.json.schema(kind)}


def _set_sampling_ranges(components: dict[str, OpenAPIObject]) -> None:
    """Sets the ranges of sampling fields, which the structs of requests leave to `SamplingParams`."""
    ranges = msgspec.json.schema(SamplingParams, ref_template=SCHEMA_PATH)["$defs"]["SamplingParams"]["properties"]
    fields = set(SamplingParams.__struct_fields__) & set(GenerationRequest.__struct_fields__) - set(_OTHER_SAMPLING)
    for component in components.values():
        properties = component.get("properties", {})
        if fields <= properties.keys():
            for name in fields:
                schema = {key: value for key, value in ranges[name].items() if key != "default"}
                properties[name] = {"anyOf": [schema, {"type": "null"}], "default": None}
