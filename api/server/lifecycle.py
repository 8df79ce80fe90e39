"""The server's lifecycle: listens, loads the model, serves, drains and closes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path

import uvicorn
import uvloop

from api.config.options import Options
from api.generation.loaded_model import AppState, LoadedModel
from api.server.app import create_app
from api.server.http_protocol import HTTPProtocol
from api.server.terminal import ProgressBar, client_url, print_line, start_message
from engine import Engine, EngineError

# Idle connections stay open longer than in clients' pools, so that the clients close them first.
_KEEP_ALIVE_SECONDS = 75

# Threads tokenize with llama.cpp, whose regular expression for some models recurses once per character
# (ggml-org/llama.cpp issue 27783). Only touched pages of the stack take memory.
THREAD_STACK_BYTES = 64 * 2**20

# Time for clients to receive the last data after draining.
_FLUSH_SECONDS = 3

_LISTEN_BACKLOG = 2048


def run(options: Options) -> int:
    """Serves until a signal arrives. Returns the exit code: 1 if the model or the address cannot be opened."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("paceline").setLevel(logging.DEBUG if options.server.verbose else logging.INFO)
    logging.getLogger("paceline.native").setLevel(logging.INFO)  # the library writes thousands of lines per load
    threading.stack_size(THREAD_STACK_BYTES)
    with ExitStack() as exit_stack:
        try:
            listeners = _listen_on_all(options.server.host, options.server.port, exit_stack)
        except _AddressError as error:
            print_line(f"paceline: {error}")
            return 1
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(options, listeners))


class _AddressError(Exception):
    """The server cannot listen on an address."""


def _listen_on_all(hosts: Sequence[str], port: int, exit_stack: ExitStack) -> list[socket.socket]:
    """Returns a listening socket for each host, which `exit_stack` closes. All have the same port: for port 0 the free
    port of the first. Raises _AddressError."""
    listeners: list[socket.socket] = []
    for host in dict.fromkeys(hosts):
        try:
            listeners.append(exit_stack.enter_context(listen(host, port)))
        except OSError as error:
            # A socket error's strerror repeats the address. Errors of name resolution have a negative errno, which
            # os.strerror does not know.
            reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror
            raise _AddressError(f"cannot listen on {host}:{port}: {reason}") from None
        port = listeners[0].getsockname()[1]
    return listeners


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket. Raises OSError if the address is in use or does not belong to this machine."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address[:2], family=family, backlog=_LISTEN_BACKLOG)


async def _serve(options: Options, listeners: list[socket.socket]) -> int:
    """Serves HTTP until the engine is drained: 503 during loading and draining. Returns the exit code."""
    state = AppState(options.server)
    signals = StopSignals()
    server = _UvicornServer(state)
    serving = asyncio.create_task(server.serve(sockets=listeners))
    serving.add_done_callback(lambda _: signals.stop.set())
    try:
        async with AsyncExitStack() as exit_stack:
            engine = await _open_engine(options, exit_stack, signals)
            if engine is None:
                return 0
            state.loaded = LoadedModel(engine, options)
            port = listeners[0].getsockname()[1]
            print_line(start_message(state.loaded, *(client_url(host, port) for host in options.server.host)))
            await signals.stop.wait()
            state.draining = True
            await _drain(engine, options.server.grace, signals)
            await server.close(serving)  # before the engine closes: open responses use the engine's vocabulary
        return 0
    except EngineError as error:
        print_line(f"paceline: {error}")
        return 1
    finally:
        await server.close(serving)


async def _open_engine(options: Options, exit_stack: AsyncExitStack, signals: StopSignals) -> Engine | None:
    """Returns the engine, which `exit_stack` closes. Returns None if a signal arrives first. Raises ModelError."""
    with ProgressBar(f"Loading {Path(options.model.path).name}") as bar:
        opening = asyncio.create_task(exit_stack.enter_async_context(Engine.open(options.engine, progress=bar.update)))
        first_signal = asyncio.create_task(signals.stop.wait())
        await asyncio.wait({opening, first_signal}, return_when=asyncio.FIRST_COMPLETED)
        first_signal.cancel()
        if opening.done():
            return opening.result()
        opening.cancel()
        await asyncio.wait({opening})
        return None


async def _drain(engine: Engine, grace_seconds: float, signals: StopSignals) -> None:
    """Drains the engine for at most `grace_seconds`, or until a second signal arrives."""
    draining = asyncio.create_task(engine.drain(grace_seconds))
    second_signal = asyncio.create_task(signals.force.wait())
    await asyncio.wait({draining, second_signal}, return_when=asyncio.FIRST_COMPLETED)
    second_signal.cancel()
    if not draining.done():
        draining.cancel()
        await engine.drain(0.0)


class StopSignals:
    """SIGINT and SIGTERM: the first signal sets `stop`, the second one `force`. Created on the server's event loop."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.force = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.force if self.stop.is_set() else self.stop).set()


class _UvicornServer(uvicorn.Server):
    """uvicorn without its signal handlers, which would raise the signals again at the end."""

    def __init__(self, state: AppState) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(state),
                http=HTTPProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_FLUSH_SECONDS,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def close(self, serving: asyncio.Task[None]) -> None:
        """Closes all connections and returns when `serving`, the task of `serve`, has ended. May be called twice."""
        self.should_exit = True
        await serving
