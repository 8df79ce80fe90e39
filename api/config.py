"""How the server listens, answers and stops. Fields carry their flags, units and ranges, as in `engine.config`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from engine.config import flags


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP side."""

    host: Annotated[str, Meta(min_length=1, description="address to listen on", extra=flags("--host"))] = "127.0.0.1"
    port: Annotated[
        int,
        Meta(ge=0, le=65535, description="port to listen on; 0 lets the system choose", extra=flags("--port")),
    ] = 8000
    alias: Annotated[
        str,
        Meta(
            description="the model's name for clients; empty is the file's name without .gguf",
            extra=flags("-a", "--alias"),
        ),
    ] = ""
    api_keys: Annotated[
        tuple[str, ...],
        Meta(
            description="a key that clients must send as `Authorization: Bearer`; without any, none is asked for",
            extra=flags("--api-key"),
        ),
    ] = ()
    sse_ping: Annotated[
        float,
        Meta(
            ge=0.0,
            le=3600.0,
            description="seconds of silence after which a stream gets a comment line; 0 is off",
            extra=flags("--sse-ping", "--sse-ping-interval"),
        ),
    ] = 15.0
    grace: Annotated[
        float,
        Meta(
            ge=0.0,
            le=3600.0,
            description="seconds that running requests have to finish at shutdown",
            extra=flags("--grace"),
        ),
    ] = 5.0
    max_body: Annotated[
        int,
        Meta(ge=1024, le=2**30, description="bytes of a request's body at most", extra=flags("--max-body")),
    ] = 8 * 2**20
    verbose: Annotated[
        bool, Meta(description="log health checks, scrapes and details too", extra=flags("-v", "--verbose"))
    ] = False
