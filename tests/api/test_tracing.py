"""Spans of requests for OpenTelemetry, and lines of requests in the JSON log."""

from __future__ import annotations

import json
import logging

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from api.server.app import create_app
from api.server.logs import JSONFormatter
from api.server.tracing import TracingMiddleware
from engine import EngineFault
from tests.api.asgi import call, post
from tests.api.fake import FakeEngine, app_state

HELLO = {"messages": [{"role": "user", "content": "hi"}]}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "r-1"}


async def spans_of(engine: FakeEngine, *calls: tuple[str, str, object]) -> tuple[ReadableSpan, ...]:
    """Returns the spans of requests, given by method, path and body."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = TracingMiddleware(create_app(app_state(engine)), provider.get_tracer("test"), lambda: "fake-1")
    for method, path, body in calls:
        await call(app, method, path, body, headers=HEADERS)
    return exporter.get_finished_spans()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_is_a_child_of_the_clients_span(engine: FakeEngine, stream: bool) -> None:
    [span] = await spans_of(engine, ("POST", "/v1/chat/completions", {**HELLO, "stream": stream}))
    assert span.name == "chat fake-1"
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    attributes = dict(span.attributes or {})
    assert isinstance(attributes.pop("gen_ai.response.time_to_first_chunk"), float)
    assert attributes.pop("gen_ai.usage.input_tokens", 0) == len(engine.requests[0].prompt)
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "paceline",
        "gen_ai.response.model": "fake-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.output_tokens": 12,
        "paceline.usage.accepted_draft_tokens": 3,
        "gen_ai.latency.time_in_queue": 0.25,
        "gen_ai.latency.time_in_model_prefill": 0.5,
        "gen_ai.latency.time_in_model_decode": 2.0,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
        "paceline.request.id": "r-1",
    }


async def test_errors_and_monitoring() -> None:
    """A client's error is no error of the server; scrapes have no span."""
    broken = FakeEngine(lambda request: [b"a", EngineFault("broken")])
    refused, failed, models = await spans_of(
        broken,
        ("POST", "/v1/chat/completions", {"messages": 3}),
        ("POST", "/v1/messages", {**HELLO, "max_tokens": 5, "stream": True}),
        ("GET", "/health", None),
        ("GET", "/metrics", None),
        ("GET", "/v1/models", None),
    )
    assert (refused.status.status_code, failed.status.status_code) == (StatusCode.UNSET, StatusCode.ERROR)
    assert (failed.attributes or {})["error.type"] == "EngineFault"
    assert models.name == "GET"


async def test_lines_of_requests_in_a_json_log(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paceline")
    await post(create_app(app_state(engine)), "/v1/chat/completions", HELLO, headers=HEADERS)
    line = json.loads(JSONFormatter().format(caplog.records[-1]))
    assert line["msg"].startswith("r-1 POST /v1/chat/completions 200 ")
    assert line["request"].pop("seconds") >= line["request"].pop("ttft_seconds") > 0
    assert line["request"] == {
        "id": "r-1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "trace_id": TRACE,
        "prompt_tokens": len(engine.requests[0].prompt),
        "cached_tokens": 2,
        "completion_tokens": 12,
        "finish_reasons": ["stop"],
    }
