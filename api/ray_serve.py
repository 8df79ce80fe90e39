"""Paceline on Ray Serve: `serve run api.ray_serve:build flags="-m model.gguf" replicas=2`.

Each replica is a process with a model of its own. Ray's proxy is the one address, and Ray starts, checks, drains and
replaces the replicas. Needs the extra `paceline[ray]`.
"""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.types import ASGIApp

from api.config.command_line import OptionError, parse
from api.config.keys import check_key_files
from api.config.options import Options
from api.generation.loaded_model import AppState, LoadedModel
from api.generation.request_limits import check_request_defaults
from api.hub.resolve import resolve_models
from api.server.app import create_app
from api.server.logs import configure_logging
from api.server.terminal import print_line
from engine import WORKERS, Engine

_CONSISTENT_HASH = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
# Seconds between two looks of a replica that drains.
_DRAIN_LOOK_SECONDS = 0.2


class RayOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arguments of `build`, also in the `args` of a Serve config file."""

    flags: str = ""
    """The flags of `paceline serve`, as in a shell. Address, TLS, `--api-prefix` and connections are Ray's business."""
    replicas: Annotated[int, Meta(ge=1)] = 1
    """Number of replicas, and with `max_replicas` the smallest number."""
    max_replicas: Annotated[int, Meta(ge=0)] = 0
    """Largest number of replicas of the autoscaling; 0 keeps the number constant."""
    target_requests: Annotated[float, Meta(ge=0)] = 0.0
    """Running and queued requests for each replica that the autoscaling aims at; 0 is the number of slots."""
    cpus: Annotated[float, Meta(ge=0)] = 1.0
    """CPU cores that each replica reserves."""
    gpus: Annotated[float, Meta(ge=0)] = 0.0
    """GPUs that each replica reserves."""
    affinity: Literal["none", "session"] = "none"
    """`session` sends requests with the same `x-session-id` header to the same replica, which has their prefix."""


class ServeReplica:
    """One replica: an engine and the ASGI application over it, on the event loop that Ray gives it."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._state = AppState(options.server)
        self._exit_stack = AsyncExitStack()

    async def open(self) -> None:
        """Loads the model. Raises HubError or EngineError, after which Ray tries again."""
        configure_logging(self._options.log, verbose=self._options.server.verbose)
        WORKERS.start()
        options = await asyncio.to_thread(resolve_models, self._options, print_line)
        engine = await self._exit_stack.enter_async_context(Engine.open(options.engine))
        model = LoadedModel(engine, options)
        if engine.info.generates:
            await check_request_defaults(model)
        self._state.loaded = model

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Returns the application; called by Ray after the constructor."""
        return create_app(self._state)

    def check_health(self) -> None:
        """Raises the fault that ended the engine, after which Ray replaces the replica."""
        if self._state.loaded is not None and self._state.loaded.engine.fault is not None:
            raise self._state.loaded.engine.fault

    async def __del__(self) -> None:
        """Closes the engine; called by Ray once the requests have ended or the time for that is over."""
        self._state.draining = True
        if self._state.loaded is not None:
            await self._state.loaded.engine.drain(0.0)
        await self._exit_stack.aclose()


class _Ingress(ServeReplica):
    """A replica as Ray constructs it."""

    async def __init__(self, options: Options) -> None:  # type: ignore[misc]
        super().__init__(options)
        await self.open()


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """Returns the application for `serve run`. Raises OptionError if an argument or a flag is wrong."""
    try:
        ray_options = msgspec.convert(arguments, RayOptions, strict=False)
    except msgspec.ValidationError as error:
        raise OptionError(f"arguments of api.ray_serve:build: {error}") from None
    options = parse(shlex.split(ray_options.flags), os.environ)
    check_key_files(options.server)
    if options.kv_events.endpoint:
        raise OptionError("--kv-events-endpoint: Ray's routers read no KV events; leave the flag out")
    deployment = serve.deployment(serve.ingress()(_Ingress))
    return deployment.options(**deployment_options(ray_options, options)).bind(options)


def deployment_options(ray_options: RayOptions, options: Options) -> dict[str, Any]:
    """Returns Ray's settings of the deployment."""
    batch = options.batch
    chosen: dict[str, Any] = {
        "name": "paceline",
        "ray_actor_options": {"num_cpus": ray_options.cpus, "num_gpus": ray_options.gpus},
        # Requests beyond this wait in Ray's proxy, so the engine's own queue and its 429 come first.
        "max_ongoing_requests": batch.num_slots + batch.queue + 1,
        "graceful_shutdown_timeout_s": options.server.grace,
        "graceful_shutdown_wait_loop_s": _DRAIN_LOOK_SECONDS,
        "health_check_period_s": 2,
    }
    if ray_options.affinity == "session":
        chosen["request_router_config"] = RequestRouterConfig(request_router_class=_CONSISTENT_HASH)
    if ray_options.max_replicas:
        chosen["autoscaling_config"] = {
            "min_replicas": ray_options.replicas,
            "max_replicas": max(ray_options.replicas, ray_options.max_replicas),
            "target_ongoing_requests": ray_options.target_requests or batch.num_slots,
        }
    else:
        chosen["num_replicas"] = ray_options.replicas
    return chosen
