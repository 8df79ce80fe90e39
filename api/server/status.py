"""The endpoints that report on the server: health, version, metrics, properties and the model list."""

from __future__ import annotations

import time

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from api.generation.loaded_model import PACELINE_VERSION, AppState, LoadedModel
from api.http.error_responses import EndpointDisabled
from api.http.responses import JSONResponse
from api.llama_server.props import props_reply
from api.schema.replies import HealthReply, ModelList, ModelMeta, ModelReply
from api.server.access_metrics import AccessCollector
from api.server.metrics import metrics_registry


class StatusEndpoints:
    """The endpoints /health, /version, /metrics, /props and /v1/models."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._registry: CollectorRegistry | None = None
        self._started = int(time.time())

    async def health(self, request: Request) -> Response:
        """Returns 200 if requests are accepted. Raises ModelLoading, Draining or EngineFault otherwise."""
        _ = self._state.model
        return JSONResponse(HealthReply())

    async def version(self, request: Request) -> Response:
        """Returns Paceline's version in vLLM's shape, also while the model loads."""
        return JSONResponse({"version": PACELINE_VERSION})

    async def metrics(self, request: Request) -> Response:
        """Returns the metrics in Prometheus' text format."""
        if self._registry is None:
            # Metrics go on after a fatal fault and during a stall.
            self._registry = metrics_registry(self._state.loaded or self._state.model)
            for collector in (AccessCollector(self._state), *self._state.collectors):
                self._registry.register(collector)
        headers = {"content-type": CONTENT_TYPE_LATEST, "process-start-time-unix": str(self._started)}
        return Response(generate_latest(self._registry), headers=headers)

    async def props(self, request: Request) -> Response:
        """Returns the properties of the model and the defaults of requests, in llama-server's shape."""
        return JSONResponse(props_reply(self._state.model))

    async def set_props(self, request: Request) -> Response:
        """Changes nothing, as in llama-server, which has no property to change. Raises EndpointDisabled without
        `--props`."""
        if not self._state.config.props:
            raise EndpointDisabled("This server does not support changing global properties. Start it with `--props`.")
        return JSONResponse({"success": True})

    async def models(self, request: Request) -> Response:
        """Returns a list with the loaded model."""
        model = self._state.model
        return JSONResponse(ModelList([_model_reply(model, model.name)]))

    async def model(self, request: Request) -> Response:
        """Returns the loaded model, by the alias in the path. Raises UnknownModel if the path names another model."""
        model, name = self._state.model, request.path_params["id"]
        model.require_name(name)
        return JSONResponse(_model_reply(model, name if name in model.aliases else model.name))


def _model_reply(model: LoadedModel, name: str) -> ModelReply:
    info = model.engine.info
    meta = ModelMeta(info.vocabulary, info.context, info.trained_context, info.parameters, info.bytes)
    limit, tags = model.engine.request_limit, model.options.server.tags
    return ModelReply(name, model.created, limit, meta, aliases=model.aliases, tags=tags)
