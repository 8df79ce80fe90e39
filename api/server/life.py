"""A server's life: listen, load, serve, drain, end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import uvicorn
import uvloop

from api.config.flags import Options
from api.generation.loaded_model import Served, Site
from api.server.app import create_app
from api.server.terminal import Bar, address_of, say, welcome
from engine import Engine, EngineError

KEEP_ALIVE = 75
"""Seconds that an idle connection is kept: longer than clients' pools keep theirs, so that they close first."""

STACK = 64 * 2**20
"""Bytes of stack for each thread, reserved and not used: long texts are tokenized on threads, and for some models the
library splits them by a regular expression that recurses for each character (ggml-org/llama.cpp issue 27783)."""

LAST_WORDS = 3
"""Seconds that clients have, once the engine has drained, to read what was written to them."""


def run(options: Options) -> int:
    """Serves until a signal ends it. Returns the exit code: 1 if there was nothing to serve, or nowhere."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("paceline").setLevel(logging.DEBUG if options.server.verbose else logging.INFO)
    logging.getLogger("paceline.native").setLevel(logging.INFO)  # the library writes thousands of lines per load
    threading.stack_size(STACK)
    host, port = options.server.host, options.server.port
    try:
        listener = listen(host, port)
    except OSError as error:
        # socket adds the address to the system's words; a name that does not resolve has its own.
        reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror
        say(f"paceline: cannot listen on {host}:{port}: {reason}")
        return 1
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_live(options, listener))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError if the address is taken or is not ours."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address[:2], family=family, backlog=2048)


async def _live(options: Options, listener: socket.socket) -> int:
    """Answers from the start, with 503 until the model is loaded."""
    site = Site(options.server)
    signals = Signals()
    server = _Server(site)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    serving.add_done_callback(lambda _: signals.end.set())
    try:
        async with AsyncExitStack() as engines:
            engine = await _opened(options, engines, signals)
            if engine is None:
                return 0
            site.served = Served(engine, options)
            say(welcome(site.served, address_of(options.server, listener.getsockname()[1])))
            await signals.end.wait()
            site.draining = True
            await _drain(engine, options.server.grace, signals)
            await server.end(serving)  # before the engine closes: those who write may still ask it for text
        return 0
    except EngineError as error:
        say(f"paceline: {error}")
        return 1
    finally:
        await server.end(serving)


async def _opened(options: Options, engines: AsyncExitStack, signals: Signals) -> Engine | None:
    """The engine, closed with `engines`; None if a signal came first. Raises ModelError."""
    with Bar(f"Loading {Path(options.model.path).name}") as bar:
        opening = asyncio.create_task(engines.enter_async_context(Engine.open(options.engine, progress=bar.show)))
        ending = asyncio.create_task(signals.end.wait())
        await asyncio.wait({opening, ending}, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if opening.done():
            return opening.result()
        opening.cancel()
        await asyncio.wait({opening})
        return None


async def _drain(engine: Engine, grace: float, signals: Signals) -> None:
    """Ends what runs: after `grace` seconds, or at once if a second signal comes."""
    draining = asyncio.create_task(engine.drain(grace))
    hurrying = asyncio.create_task(signals.hurry.wait())
    await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    hurrying.cancel()
    if not draining.done():
        draining.cancel()
        await engine.drain(0.0)


class Signals:
    """SIGINT and SIGTERM: the first asks to end, the second to hurry. Made on the loop that is to hear them."""

    def __init__(self) -> None:
        self.end = asyncio.Event()
        self.hurry = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._hear)

    def _hear(self) -> None:
        (self.hurry if self.end.is_set() else self.end).set()


class _Server(uvicorn.Server):
    """uvicorn, but signals are ours to hear: its own handlers would raise them again at the end."""

    def __init__(self, site: Site) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(site),
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=LAST_WORDS,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def end(self, serving: asyncio.Task[None]) -> None:
        """Closes all connections and waits for `serving`, the task of `serve`. May be called twice."""
        self.should_exit = True
        await serving
