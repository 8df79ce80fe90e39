"""A server that a command starts on a free loopback port, and ends with itself."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from api.commands.server_client import ServerClient, ServerError
from api.config.options import Options

_HOST = "127.0.0.1"
_POLL_SECONDS = 0.05
# Time for the server to close before it is killed.
_CLOSE_SECONDS = 10.0


@contextmanager
def own_server(flags: Sequence[str], options: Options) -> Iterator[ServerClient]:
    """Starts `paceline serve` with `flags`, of which `options` was parsed, and returns a client once the model is
    loaded. Leaving the context manager ends the server. Raises ServerError if the server ends before.

    The start message is shown, the log is not, unless `flags` ask for it. SIGTERM and SIGHUP end the server as well.
    """
    port = _free_port()
    own = ("--host", _HOST, "--port", str(port), "--ssl-cert-file", "", "--ssl-key-file", "")
    command = [sys.executable, "-m", "api", "serve", "--log-verbosity", "1", *flags, *own]
    # In a session of its own, as Ctrl+C stops a reply, not the server.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        with _exit_on_signals():
            url = f"http://{_HOST}:{port}{options.server.api_prefix}"
            with ServerClient(url, next(iter(options.server.api_keys), "")) as client:
                _wait_until_loaded(client, process)
                yield client
    finally:
        process.terminate()
        try:
            process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _wait_until_loaded(client: ServerClient, process: subprocess.Popen[bytes]) -> None:
    while True:
        if (code := process.poll()) is not None:
            raise ServerError(f"the server ended with exit code {code}")
        try:
            client.get("/health")
        except ServerError:
            time.sleep(_POLL_SECONDS)
        else:
            return


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise SystemExit."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
