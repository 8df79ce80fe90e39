"""Spans of requests for OpenTelemetry, with the names of its conventions for generative AI.

Needs the extra `paceline[otel]`. OpenTelemetry's own variables apply, such as `OTEL_SERVICE_NAME`,
`OTEL_TRACES_SAMPLER` and `OTEL_EXPORTER_OTLP_HEADERS`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.generation.loaded_model import PACELINE_VERSION, AppState
from api.http.request_context import RequestContext, is_monitoring, request_context

_FLUSH_SECONDS = 3.0
# Words of the conventions for the ends of paths, the longest first.
_OPERATIONS = {
    "/chat/completions": "chat",
    "/v1/messages": "chat",
    "/responses": "chat",
    "/completions": "text_completion",
    "/completion": "text_completion",
    "/infill": "text_completion",
    "/embeddings": "embeddings",
    "/embedding": "embeddings",
}


class Tracing:
    """The connection to a collector, a URL for OTLP over HTTP such as `http://127.0.0.1:4318/v1/traces`."""

    def __init__(self, endpoint: str) -> None:
        resource = Resource.create({SERVICE_VERSION: PACELINE_VERSION})
        if "OTEL_SERVICE_NAME" not in os.environ:
            resource = resource.merge(Resource({SERVICE_NAME: "paceline"}))
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))

    def around(self, app: ASGIApp, state: AppState) -> ASGIApp:
        """Returns `app` with a span for each request."""
        tracer = self.provider.get_tracer("paceline", PACELINE_VERSION)
        return TracingMiddleware(app, tracer, lambda: state.loaded.name if state.loaded else "")

    def close(self) -> None:
        """Sends the last spans, for which the collector has some seconds."""
        thread = threading.Thread(target=self.provider.shutdown, daemon=True)
        thread.start()
        thread.join(_FLUSH_SECONDS)


class TracingMiddleware:
    """ASGI middleware around RequestContextMiddleware: one span for each request, a child of the client's span if the
    request has a `traceparent`. Health checks and scrapes have no spans.

    `model_name` returns the name of the model in replies, and an empty text before it is loaded.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer, model_name: Callable[[], str]) -> None:
        self._app = app
        self._tracer = tracer
        self._model_name = model_name
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_monitoring(scope["path"]):
            await self._app(scope, receive, send)
            return
        parent = self._propagator.extract(Headers(scope=scope))
        with self._tracer.start_as_current_span(
            scope["method"], parent, SpanKind.SERVER, record_exception=False
        ) as span:
            try:
                await self._app(scope, receive, send)
            finally:
                self._describe(span, request_context(scope))

    def _describe(self, span: Span, context: RequestContext) -> None:
        operation = _operation(context.path)
        if operation:
            span.update_name(f"{operation} {self._model_name()}")
            span.set_attribute("gen_ai.operation.name", operation)
            span.set_attribute("gen_ai.provider.name", "paceline")
            span.set_attribute("gen_ai.response.model", self._model_name())
        span.set_attributes(dict(_attributes(context)))
        if context.status >= 500 or (context.error is not None and context.status == 200):
            span.set_status(Status(StatusCode.ERROR, str(context.error or "")))


def _operation(path: str) -> str:
    return next((name for end, name in _OPERATIONS.items() if path.endswith(end)), "")


def _attributes(context: RequestContext) -> Iterator[tuple[str, AttributeValue]]:
    yield "http.request.method", context.method
    yield "url.path", context.path
    yield "http.response.status_code", context.status
    yield "paceline.request.id", context.id
    if context.error is not None:
        yield "error.type", type(context.error).__name__
    if context.first_token_seconds is not None:
        yield "gen_ai.response.time_to_first_chunk", context.first_token_seconds
    if not context.finished:
        return
    usages = [end.usage for end in context.finished]
    yield "gen_ai.response.finish_reasons", [str(end.reason) for end in context.finished]
    yield "gen_ai.usage.input_tokens", sum(usage.prompt for usage in usages)
    yield "gen_ai.usage.cache_read.input_tokens", sum(usage.cached for usage in usages)
    yield "gen_ai.usage.output_tokens", sum(usage.completion for usage in usages)
    yield "paceline.usage.accepted_draft_tokens", sum(usage.accepted for usage in usages)
    # The slowest choice; the names are vLLM's.
    timings = [end.timings for end in context.finished]
    yield "gen_ai.latency.time_in_queue", max(each.queue for each in timings)
    yield "gen_ai.latency.time_in_model_prefill", max(each.prompt for each in timings)
    yield "gen_ai.latency.time_in_model_decode", max(each.predicted for each in timings)
