"""GET and POST /lora-adapters, in llama-server's shapes."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from api.generation.loaded_model import AppState
from api.http.request_body import read_body
from api.http.responses import JSONResponse
from api.schema.request_values import LoraScale
from api.schema.requests import decode_body
from engine import AdapterInfo


class LoraAdapterReply(Struct, frozen=True):
    """A loaded adapter, and its scale in requests without the field `lora`."""

    id: int
    path: str
    scale: float
    task_name: str
    prompt_prefix: str

    @classmethod
    def of(cls, info: AdapterInfo) -> LoraAdapterReply:
        """Returns the engine's description in llama-server's shape."""
        return cls(info.id, info.path, info.scale, info.task_name, info.prompt_prefix)


class LoraScalesReply(Struct, frozen=True):
    """The reply to new scales."""

    success: bool = True


_SCALES = msgspec.json.Decoder(Annotated[list[LoraScale], Meta(max_length=64)])


class LoraEndpoints:
    """The endpoints of /lora-adapters."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def show(self, request: Request) -> Response:
        """Returns the adapters in the order of their numbers."""
        return JSONResponse([LoraAdapterReply.of(info) for info in self._state.model.engine.adapters.infos])

    async def set_scales(self, request: Request) -> Response:
        """Sets the scales of later requests; an adapter that the body leaves out is not applied. Requests that have
        arrived before keep their scales. Raises RequestRefused with nothing changed."""
        model = self._state.model
        scales = decode_body(_SCALES, await read_body(request, model.options.server.max_body))
        model.engine.adapters.set_scales({each.id: each.scale for each in scales})
        return JSONResponse(LoraScalesReply())
