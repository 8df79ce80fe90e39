"""The OpenAPI document, and random requests by its schemas: no server error, documented replies only."""

from __future__ import annotations

import asyncio
import json
import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import BaseSchema, Case, GenerationMode
from starlette.routing import Route
from starlette.types import ASGIApp

from api.generation.loaded_model import AppState
from api.server.app import create_app
from api.server.openapi import OpenAPIEndpoint, function_of
from api.server.operations import OPERATIONS, SCHEMA_PATH
from api.ui.page import PageEndpoints
from engine import EmbeddingInfo, EmbeddingModel, RerankMarks
from tests.api.asgi import CapturedResponse, call
from tests.api.fake import FakeEngine, app_state
from tests.sizes import sized

# Random requests for each operation with a body or parameters, by half valid and invalid by the document.
EXAMPLES = sized(24, 2000)


def make_state(folder: Path | str = "") -> AppState:
    """Returns the state of a server with every endpoint."""
    engine = FakeEngine()
    info = EmbeddingInfo("small", "small.gguf", "mean", 3, 512, "", RerankMarks((), (), ()))
    engine.embeddings = EmbeddingModel(info, engine.vocab)
    return app_state(engine, slot_save_path=str(folder), props=True)


@cache
def document() -> dict[str, Any]:
    """Returns the document of the server."""
    answer = asyncio.run(call(create_app(make_state()), "GET", "/openapi.json"))
    assert isinstance(answer.json, dict)
    return answer.json


def names() -> list[tuple[str, str]]:
    """Returns a method and path for each kind of operation, of which aliases have the same. The stream of events is
    left out, as it does not end."""
    kinds: dict[str, tuple[str, str]] = {}
    for path, methods in document()["paths"].items():
        for method, described in methods.items():
            kind = [method, described.get("requestBody"), described["responses"]["200"], described["parameters"]]
            if not path.endswith("/events"):
                kinds.setdefault(json.dumps(kind, sort_keys=True), (method.upper(), path))
    return list(kinds.values())


@cache
def random_document() -> BaseSchema:
    """Returns the document for random requests. No object has other fields than those that the document names, so that
    few random fields are ignored."""
    closed = deepcopy(document())
    for schema in closed["components"]["schemas"].values():
        if "properties" in schema:
            schema["additionalProperties"] = False
    return schemathesis.openapi.from_dict(closed)


def check(case: Case[Any], answer: CapturedResponse) -> None:
    """Asserts that a response is one of the document's."""
    assert answer.status is not None
    assert answer.status < 500 or answer.status == 501, answer.chunks
    described = document()["paths"][case.operation.path][case.method.lower()]["responses"][str(answer.status)]
    if "$ref" in described:
        described = document()["components"]["responses"][described["$ref"].rpartition("/")[2]]
    media_type = answer.headers["content-type"].partition(";")[0]
    schema = described["content"][media_type]["schema"]
    for body in [answer.json] if media_type == "application/json" else answer.events if "stream" in media_type else []:
        if body != "[DONE]" and "error" not in body:
            validator({"anyOf": [schema]}).validate(body)


def validator(schema: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    """Returns a validator of a part of the document."""
    return _validator(json.dumps(schema))


@cache
def _validator(schema: str) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator({**json.loads(schema), "components": document()["components"]})


async def send(app: ASGIApp, case: Case[Any]) -> CapturedResponse:
    """Returns the response to a random request."""
    arguments = case.as_transport_kwargs()
    query = urlencode(arguments.get("params") or {}, doseq=True)
    body = json.dumps(arguments["json"]).encode() if "json" in arguments else arguments.get("data") or b""
    path = case.formatted_path + (f"?{query}" if query else "")
    headers = {"content-type": "application/json"}
    return await call(app, case.method.upper(), path, body if isinstance(body, bytes) else b"?", headers=headers)


@pytest.mark.parametrize(("method", "path"), names())
def test_random_requests_get_documented_replies(method: str, path: str, tmp_path: Path) -> None:
    operation, app = random_document()[path][method], create_app(make_state(tmp_path))
    has_input = operation.body or operation.query or operation.path_parameters
    modes = GenerationMode if operation.body else [GenerationMode.POSITIVE]
    limits = settings(
        max_examples=EXAMPLES // 2 if has_input else 1,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with asyncio.Runner() as runner:
        for mode in modes:

            @limits
            @given(case=operation.as_strategy(generation_mode=mode))
            def run(case: Case[Any]) -> None:
                check(case, runner.run(send(app, case)))

            run()


def test_every_route_and_reference_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_MODE", "PREDICTION")
    routes: list[Route] = []
    state = make_state()
    monkeypatch.setattr(state.responses, "use_routes", lambda given, prefix: routes.extend(given))
    create_app(state)
    functions = {function_of(route): getattr(route.endpoint, "__self__", None) for route in routes}
    others = (PageEndpoints, OpenAPIEndpoint)
    assert {each for each, owner in functions.items() if not isinstance(owner, others)} == OPERATIONS.keys()
    references = set(re.findall(r'"(#/[^"]*)"', json.dumps(document())))
    for reference in references:
        value: Any = document()
        for key in reference[2:].split("/"):
            value = value[key]
    assert SCHEMA_PATH.format(name="ChatRequest") in references


def test_fields_have_their_ranges() -> None:
    chat = document()["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"]
    temperature = chat["properties"]["temperature"]["anyOf"][0]
    assert (temperature["minimum"], temperature["maximum"]) == (0.0, 100.0)
    assert chat["properties"]["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 128}
    events = document()["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    assert events["schema"] == {"$ref": SCHEMA_PATH.format(name="ChatCompletionChunk")}
