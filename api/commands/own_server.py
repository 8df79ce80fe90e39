"""Runs a server for one command, on a free loopback port."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from api.commands.server_client import ServerClient, ServerError
from api.config.keys import configured_keys
from api.config.options import Options

_HOST = "127.0.0.1"
_POLL_SECONDS = 0.05
# Time for the server to close before it is killed.
_CLOSE_SECONDS = 10.0


@contextmanager
def own_server(flags: Sequence[str], options: Options) -> Iterator[ServerClient]:
    """Starts `paceline serve` with `flags`, and yields a client once the model is loaded. `options` are the parsed
    flags. Leaving the `with` block ends the server, and so do SIGTERM and SIGHUP. Raises ServerError if the server ends
    while it loads.

    The server prints its start message, and logs only errors unless a flag sets `--log-verbosity`.
    """
    port = _free_port()
    own = ("--host", _HOST, "--port", str(port), "--ssl-cert-file", "", "--ssl-key-file", "")
    command = [sys.executable, "-m", "api", "serve", "--log-verbosity", "1", *flags, *own]
    # A new session keeps the signal of Ctrl+C, which ends a reply, from the server.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        with _exit_on_signals():
            url = f"http://{_HOST}:{port}{options.server.api_prefix}"
            with ServerClient(url, _first_key(options)) as client:
                _wait_until_loaded(client, process)
                yield client
    finally:
        process.terminate()
        try:
            process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _first_key(options: Options) -> str:
    return next((each.key for each in configured_keys(options.server)), "")


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
