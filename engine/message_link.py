"""Messages between two processes over a connected socket: the length of a pickle, then the pickle."""

from __future__ import annotations

import asyncio
import pickle
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

_LENGTH = struct.Struct("<Q")
# Bytes that the kernel keeps for a reader that is late.
_SOCKET_BUFFER_BYTES = 2**20


class MessageSender:
    """Sends messages from any thread, so that the outputs of a step do not wait for a turn of the event loop."""

    def __init__(self, end: socket.socket) -> None:
        """A `MessageLink` may receive from `end`, and must not send."""
        self._end = end.dup()
        self._sending = threading.Lock()
        self._writable = select.poll()
        self._writable.register(self._end, select.POLLOUT)

    def send(self, message: object) -> None:
        """Blocks until the kernel has taken `message`. No effect after the end of the socket. Raises the exceptions of
        `pickle.dumps`, with nothing sent."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        rest = memoryview(_LENGTH.pack(len(data)) + data)
        with self._sending, suppress(BrokenPipeError, ConnectionResetError):
            while rest:
                try:
                    rest = rest[self._end.send(rest) :]
                except BlockingIOError:
                    self._writable.poll()


class MessageLink(asyncio.Protocol):
    """One end of the socket, on its event loop. Only a process that this one has started may have the other end, since
    unpickling can run any code."""

    def __init__(self, on_message: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        """`on_message` is called with each message, and `on_end` once, after the socket was closed at one end."""
        self._on_message = on_message
        self._on_end = on_end
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(
        cls, end: socket.socket, on_message: Callable[[Any], None], on_end: Callable[[], None]
    ) -> MessageLink:
        """Returns the link over `end`, which it owns."""
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        end.setblocking(False)
        link = cls(on_message, on_end)
        await asyncio.get_running_loop().create_connection(lambda: link, sock=end)
        return link

    def send(self, message: object) -> None:
        """Sends `message`, or keeps it until the other process reads. No effect after the end of the socket. Raises the
        exceptions of `pickle.dumps`, with nothing sent."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines((_LENGTH.pack(len(data)), data))

    def close(self) -> None:
        """Closes the socket once all messages are sent."""
        if self._transport is not None:
            self._transport.close()

    # ── called by the event loop ──

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Passes complete messages on."""
        self._received += data
        start = 0
        with memoryview(self._received) as view:
            while len(view) >= start + _LENGTH.size:
                first = start + _LENGTH.size
                end = first + _LENGTH.unpack_from(view, start)[0]
                if len(view) < end:
                    break
                start = end
                self._on_message(pickle.loads(view[first:end]))
        del self._received[:start]

    def connection_lost(self, error: Exception | None) -> None:
        """Reports the end."""
        self._on_end()
