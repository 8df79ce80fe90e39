"""The server's lifecycle: listens, loads the model, serves, drains and closes."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

import uvicorn
import uvloop

from api.config.options import Options
from api.config.server import KVEventsConfig, ServerConfig
from api.generation.loaded_model import AppState, LoadedModel
from api.generation.request_limits import check_request_defaults
from api.server.app import create_app
from api.server.connections import ConnectionLimits, WaitingConnections, connection_limits
from api.server.http_protocol import HTTPProtocol
from api.server.logs import configure_logging
from api.server.terminal import ProgressBar, client_url, print_line, start_message
from engine import WORKERS, Engine, EngineError, hanging_threads

if TYPE_CHECKING:
    from api.server.kv_events import KVEventPublisher
    from api.server.tracing import Tracing

# Exit codes: the start has failed; a fatal fault has ended the engine; a thread did not end at the shutdown.
START_FAILED, ENGINE_FAULT, THREAD_HANGS = 1, 3, 4

# Time for clients to receive the last data after draining.
_FLUSH_SECONDS = 3

_LISTEN_BACKLOG = 2048


def run(options: Options) -> int:
    """Serves until a signal arrives or the engine fails. Returns the exit code: 0, `START_FAILED` if the model, the
    address or a file cannot be opened, or `ENGINE_FAULT`. Ends the process with `THREAD_HANGS` if a thread hangs."""
    with ExitStack() as exit_stack:
        try:
            _configure_log(options)
            _check_certificate(options.server)
            listeners = _listen_on_all(options.server, exit_stack)
            tracing = _open_tracing(options.server, exit_stack)
            kv_events = _open_kv_events(options.kv_events, exit_stack)
        except _StartError as error:
            print_line(f"paceline: {error}")
            return START_FAILED
        WORKERS.start()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(_serve(options, listeners, tracing, kv_events))
            if names := hanging_threads():
                print_line(f"paceline: abandoned {' and '.join(names)}, which did not end; the log has the stacks")
                _end_process(THREAD_HANGS)
            return code


def _end_process(code: int) -> NoReturn:
    """Ends the process without the clean-up of the interpreter and of native libraries, which a hanging thread still
    uses."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


class _StartError(Exception):
    """The server cannot listen on an address, or cannot use a file."""


def _configure_log(options: Options) -> None:
    try:
        configure_logging(options.log, verbose=options.server.verbose)
    except OSError as error:
        raise _StartError(f"--log-file: cannot write {options.log.file}: {error.strerror}") from None


def _open_tracing(config: ServerConfig, exit_stack: ExitStack) -> Tracing | None:
    """Returns the connection to the collector of spans, which `exit_stack` closes; None without one."""
    if not config.otlp_traces_endpoint:
        return None
    try:
        from api.server.tracing import Tracing
    except ImportError as error:
        raise _StartError(f"--otlp-traces-endpoint: {error}; install the extra paceline[otel]") from None
    return exit_stack.enter_context(closing(Tracing(config.otlp_traces_endpoint)))


def _open_kv_events(config: KVEventsConfig, exit_stack: ExitStack) -> KVEventPublisher | None:
    """Returns the publisher of KV events, which `exit_stack` closes; None without an endpoint."""
    if not config.endpoint:
        if config.replay_endpoint:
            raise _StartError("--kv-events-replay-endpoint needs --kv-events-endpoint as well")
        return None
    try:
        from api.server.kv_events import KVEventPublisher, KVEventsUnusable
    except ImportError as error:
        raise _StartError(f"--kv-events-endpoint: {error}; install the extra paceline[kv-events]") from None
    try:
        return exit_stack.enter_context(closing(KVEventPublisher(config)))
    except KVEventsUnusable as error:
        raise _StartError(str(error)) from None


def _check_certificate(config: ServerConfig) -> None:
    """Raises _StartError unless both or none of the files for HTTPS are given, and fit each other."""
    files = {"--ssl-cert-file": config.ssl_cert_file, "--ssl-key-file": config.ssl_key_file}
    given = [flag for flag, path in files.items() if path]
    if not given:
        return
    if missing := [flag for flag in files if flag not in given]:
        raise _StartError(f"{given[0]} needs {missing[0]} as well: HTTPS takes a certificate and its private key")
    for flag, path in files.items():
        if not os.access(path, os.R_OK):
            raise _StartError(f"{flag}: cannot read {path}")
    try:
        # An encrypted key would ask for a password on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_cert_file, config.ssl_key_file, password="")
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise _StartError(
            f"--ssl-cert-file, --ssl-key-file: not a certificate and its unencrypted key: {reason}"
        ) from None


def _listen_on_all(config: ServerConfig, exit_stack: ExitStack) -> list[socket.socket]:
    """Returns a listening socket for each host, which `exit_stack` closes. All have the same port: for port 0 the free
    port of the first. Raises _StartError."""
    listeners: list[socket.socket] = []
    port = config.port
    for host in dict.fromkeys(config.host):
        try:
            listeners.append(exit_stack.enter_context(listen(host, port, reuse_port=config.reuse_port)))
        except OSError as error:
            # A socket error's strerror repeats the address. Errors of name resolution have a negative errno, which
            # os.strerror does not know.
            reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror
            raise _StartError(f"cannot listen on {host}:{port}: {reason}") from None
        except UnicodeError:  # such as 127.0.0..1, which has an empty part
            raise _StartError(f"cannot listen on {host}:{port}: not an address or the name of a host") from None
        port = listeners[0].getsockname()[1]
    return listeners


def listen(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """Returns a listening socket. Raises OSError if the address is in use or does not belong to this machine."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address[:2], family=family, backlog=_LISTEN_BACKLOG, reuse_port=reuse_port)


async def _serve(
    options: Options, listeners: list[socket.socket], tracing: Tracing | None, kv_events: KVEventPublisher | None
) -> int:
    """Serves HTTP until the engine is drained or fails: 503 during loading and draining. Returns the exit code."""
    state = AppState(options.server)
    signals = StopSignals(state.reload_keys if options.server.has_key_files else None)
    server = UvicornServer(state, connection_limits(options.server), tracing)
    serving = asyncio.create_task(server.serve(sockets=listeners))
    serving.add_done_callback(lambda _: signals.stop.set())
    try:
        async with AsyncExitStack() as exit_stack:
            engine = await _open_engine(options, state, exit_stack, signals)
            if engine is None:
                return 0
            model = LoadedModel(engine, options)
            if engine.info.generates:
                await check_request_defaults(model)
            if kv_events is not None:
                state.collectors.append(kv_events)
                await engine.report_kv_changes(kv_events.publish)
            gc.collect()
            gc.freeze()  # else each full collection of garbage stops all streams for 30 to 60 ms
            state.loaded = model
            port = listeners[0].getsockname()[1]
            print_line(start_message(state.loaded, *_client_urls(options.server, port)))
            await _until_end(engine, options.server, signals)
            if engine.fault is None:
                state.draining = True
                await _drain(engine, options.server.grace, signals)
            await server.close(serving)  # before the engine closes: open responses use the engine's vocabulary
        return _exit_code(engine)
    except EngineError as error:
        print_line(f"paceline: {error}")
        return START_FAILED
    finally:
        await server.close(serving)


def _client_urls(config: ServerConfig, port: int) -> list[str]:
    scheme = "https" if config.ssl_cert_file else "http"
    return [client_url(host, port, scheme) + config.api_prefix for host in config.host]


async def _open_engine(
    options: Options, state: AppState, exit_stack: AsyncExitStack, signals: StopSignals
) -> Engine | None:
    """Returns the engine, which `exit_stack` closes. Returns None if a signal arrives first. Raises ModelError."""
    with ProgressBar(f"Loading {Path(options.model.path).name}") as bar:

        def progress(share: float) -> None:
            state.loaded_share = share
            bar.update(share)

        configure = partial(configure_logging, options.log, verbose=options.server.verbose)
        opened = Engine.open(options.engine, progress=progress, configure_process=configure)
        opening = asyncio.create_task(exit_stack.enter_async_context(opened))
        first_signal = asyncio.create_task(signals.stop.wait())
        await asyncio.wait({opening, first_signal}, return_when=asyncio.FIRST_COMPLETED)
        first_signal.cancel()
        if opening.done():
            return opening.result()
        opening.cancel()
        await asyncio.wait({opening})
        return None


async def _until_end(engine: Engine, config: ServerConfig, signals: StopSignals) -> None:
    """Waits for the first signal, or for a fatal fault unless the server stays after one."""
    events = [signals.stop, engine.failed] if config.on_fault == "exit" else [signals.stop]
    waiting = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


def _exit_code(engine: Engine) -> int:
    """Returns the exit code of the process after the engine was closed."""
    if engine.fault is not None:
        print_line("paceline: the engine has failed; the log has the reason")
        return ENGINE_FAULT
    return 0


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
    """SIGINT, SIGTERM and SIGHUP: the first signal sets `stop`, the second one `force`. Created on the server's event
    loop."""

    def __init__(self, on_hangup: Callable[[], None] | None = None) -> None:
        """SIGHUP only calls `on_hangup` if that is given."""
        self.stop = asyncio.Event()
        self.force = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        if on_hangup is not None or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
            loop.add_signal_handler(signal.SIGHUP, on_hangup or self._on_signal)

    def _on_signal(self) -> None:
        (self.force if self.stop.is_set() else self.stop).set()


class UvicornServer(uvicorn.Server):
    """uvicorn without its signal handlers, which would raise the signals again at the end."""

    def __init__(self, state: AppState, limits: ConnectionLimits, tracing: Tracing | None = None) -> None:
        config = state.config
        refused = state.responses.add_refused
        protocol = partial(HTTPProtocol, limits=limits, waiting=WaitingConnections(), on_refused=refused)
        app = create_app(state)
        super().__init__(
            uvicorn.Config(
                tracing.around(app, state) if tracing else app,
                http=cast("type[asyncio.Protocol]", protocol),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=config.keep_alive,
                ssl_keyfile=config.ssl_key_file or None,
                ssl_certfile=config.ssl_cert_file or None,
                timeout_graceful_shutdown=_FLUSH_SECONDS,
            )
        )
        state.responses.open_connections = lambda: len(self.server_state.connections)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def close(self, serving: asyncio.Task[None]) -> None:
        """Closes all connections and returns when `serving`, the task of `serve`, has ended. May be called twice."""
        self.should_exit = True
        await serving
