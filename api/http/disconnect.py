"""Cancels requests whose client disconnects before the response starts, such as during a long tokenization."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.tasks import run_until_disconnect


class DisconnectMiddleware:
    """ASGI middleware that cancels the application if the client disconnects between the end of the request's body and
    the start of the response. Afterwards the response itself awaits the disconnect."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body_received, started, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def receive_body() -> Message:
            if body_received.is_set():
                await gone.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                body_received.set()
            return message

        async def send_response(message: Message) -> None:
            started.set()
            await send(message)

        async def disconnect() -> Message:
            await body_received.wait()
            message = await receive()
            gone.set()
            if started.is_set() or message["type"] != "http.disconnect":
                await asyncio.Event().wait()  # until the application ends
            return message

        async def run() -> None:
            await self._app(scope, receive_body, send_response)

        await run_until_disconnect(disconnect, run)
