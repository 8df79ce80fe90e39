"""Starts several simulated workers with a public router in front of them.

`make test-scale` installs the routers' wheels into environments of their own below `.scale/`.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from bench.server import HOST, Server, free_port, running

ENVIRONMENTS = Path(__file__).parents[1] / ".scale"
MODEL_NAME = "sim"
# Seconds for the workers and the router to become healthy.
_START_SECONDS = 90.0

# Returns the command of a router for its port, a port for its metrics, and the URLs of the workers.
RouterCommand = Callable[[int, int, Sequence[str], Path], list[str]]


class Fleet(msgspec.Struct, frozen=True):
    """Workers, and the port to which clients send requests."""

    port: int
    workers: tuple[Server, ...]


class PublicRouter(msgspec.Struct, frozen=True):
    """A router that is installed from its wheel."""

    environment: str
    """Folder below `ENVIRONMENTS`."""
    command: RouterCommand
    health: str = "/readiness"
    counts_workers: bool = True
    """True if the reply to `health` has the number of workers that the router has found."""

    @property
    def python(self) -> Path:
        """The interpreter of the router's environment."""
        return ENVIRONMENTS / self.environment / "bin" / "python"


def _launcher(module: str, *flags: str) -> RouterCommand:
    """Returns the command of a router that descends from SGLang's."""

    def command(port: int, metrics_port: int, workers: Sequence[str], folder: Path) -> list[str]:
        own = ["--host", HOST, "--port", str(port), "--prometheus-port", str(metrics_port), "--log-level", "error"]
        checks = ["--health-check-interval-secs", "1", "--health-failure-threshold", "1"]
        return ["-m", *module.split(), *own, *checks, *flags, "--worker-urls", *workers]

    return command


def _litellm(port: int, metrics_port: int, workers: Sequence[str], folder: Path) -> list[str]:
    """Returns the command of LiteLLM's proxy. It knows no prefixes: a session stays with a worker by its id."""
    models = [
        {
            "model_name": MODEL_NAME,
            "litellm_params": {"model": f"hosted_vllm/{MODEL_NAME}", "api_base": f"{worker}/v1", "api_key": "none"},
        }
        for worker in workers
    ]
    retries = {"num_retries": 3, "retry_after": 0, "allowed_fails": 0, "cooldown_time": 60}
    routing = {"routing_strategy": "least-busy", "optional_pre_call_checks": ["session_affinity"]}
    path = folder / "litellm.json"
    # JSON is YAML.
    path.write_bytes(msgspec.json.encode({"model_list": models, "router_settings": retries | routing}))
    return ["-m", "litellm.proxy.proxy_cli", "--config", str(path), "--host", HOST, "--port", str(port)]


# smg diverts one request in eight from the worker with its prefix to one with less in its cache.
_NO_WARM_UP = ("--worker-warmup-secs", "0", "--worker-warmup-divert-every", "0")

PUBLIC_ROUTERS = {
    "vllm-router": PublicRouter(
        "routers",
        _launcher("vllm_router.launch_router", "--policy", "cache_aware", "--worker-startup-check-interval", "1"),
    ),
    "sglang-router": PublicRouter("routers", _launcher("sglang_router.launch_router", "--policy", "cache_aware")),
    # smg leaves out a worker with eight queued requests as long as another one, even a dead one, has fewer.
    "smg": PublicRouter(
        "routers",
        _launcher("smg launch", "--policy", "cache_aware", "--disable-worker-overload-protection", *_NO_WARM_UP),
    ),
    "litellm": PublicRouter("litellm", _litellm, health="/health/liveliness", counts_workers=False),
}
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOG": "WARNING",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # it listens on loopback
}


@contextmanager
def fleet_workers(count: int, *flags: str) -> Iterator[tuple[Server, ...]]:
    """Runs `count` servers with these flags for the length of the block."""
    with ExitStack() as stack:
        servers = []
        for _ in range(count):
            port = free_port()
            own = ["--port", str(port), "--alias", MODEL_NAME, "--grace", "60", "-lv", "2", "--no-webui"]
            command = [sys.executable, "-m", "api", "serve", *own, *flags]
            servers.append(stack.enter_context(running(command, port, _START_SECONDS)))
        yield tuple(servers)


@contextmanager
def routed(name: str, workers: tuple[Server, ...], log: Path) -> Iterator[Fleet]:
    """Runs a router in front of `workers` for the length of the block. Raises RuntimeError with the end of its log."""
    router, port = PUBLIC_ROUTERS[name], free_port()
    with TemporaryDirectory() as folder, log.open("w+") as out:
        urls = [f"http://{HOST}:{worker.port}" for worker in workers]
        command = [str(router.python), *router.command(port, free_port(), urls, Path(folder))]
        environment = os.environ | _ENVIRONMENT
        with running(command, port, _START_SECONDS, out, health=router.health, environment=environment):
            if router.counts_workers:
                _wait_for_workers(f"http://{HOST}:{port}{router.health}", len(workers))
            yield Fleet(port, workers)


def _wait_for_workers(url: str, count: int) -> None:
    """Blocks until the router has found all workers. Raises RuntimeError if it does not."""
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        with urllib.request.urlopen(url, timeout=5) as response:
            if msgspec.json.decode(response.read())["healthy_workers"] >= count:
                return
        time.sleep(0.1)
    raise RuntimeError("the router did not find all workers")
