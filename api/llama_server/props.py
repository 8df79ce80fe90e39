"""GET /props: what is served and what requests default to, in llama-server's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct

from api.generation.loaded_model import VERSION, Served
from api.llama_server.generation_settings import default_settings
from api.templates.chat_template import Capabilities
from engine import MemoryInfo


class Defaults(Struct, frozen=True):
    """What a request gets that does not say."""

    n_ctx: int
    """Tokens that it may have, prompt and continuation together."""
    params: dict[str, object]


class Guessing(Struct, frozen=True):
    """Who guesses for requests that do not say, who could, and why the others cannot."""

    types: Sequence[str]
    available: Sequence[str]
    unavailable: Mapping[str, str]


class Memory(Struct, frozen=True):
    """How prefixes are kept and shared."""

    kv_unified: bool
    """True if all slots share the KV cells, False if each has its own."""
    kv_reason: str
    """Why, in one line."""
    sharing: Literal["any token", "whole texts"]
    """Where a prefix that requests share may end."""
    window: int
    """Positions that some layers look back on; 0 if all look on all."""
    ram_bytes: int
    """Prefixes in RAM at most."""
    disk: bool
    """Whether prefixes outlive the server."""
    disk_bytes: int
    moved_from: int
    """Tokens that must recur for a part of a changed prompt to be moved instead of computed; 0 if none is."""
    by_key: bool
    """Whether only requests of equal API key share."""

    @classmethod
    def of(cls, memory: MemoryInfo, *, by_key: bool) -> Memory:
        """The same for clients."""
        return cls(
            memory.kv_unified,
            memory.kv_reason,
            "any token" if memory.partial else "whole texts",
            memory.window,
            memory.ram_bytes,
            memory.disk,
            memory.disk_bytes,
            memory.moved_from,
            by_key,
        )


class Modalities(Struct, frozen=True):
    """What a request may hold besides text."""

    vision: bool = False
    audio: bool = False
    video: bool = False


class Props(Struct, frozen=True):
    """The reply."""

    default_generation_settings: Defaults
    total_slots: int
    model_alias: str
    model_path: str
    chat_template: str
    bos_token: str
    eos_token: str
    build_info: str
    deterministic: bool
    """Whether the same seed gives the same text, whatever else runs."""
    system_fingerprint: str
    """Equal only where that text is the same: of the model file, the library's build and the profile."""
    speculative: Guessing
    memory: Memory
    endpoint_slots: bool
    """Whether GET /slots answers."""
    chat_template_caps: Capabilities | None
    """None if the template cannot be used."""
    model_ftype: str
    endpoint_props: bool = False
    endpoint_metrics: bool = True
    modalities: Modalities = Modalities()
    is_sleeping: bool = False


def props_of(served: Served) -> Props:
    """The properties of what is served."""
    engine, info, template = served.engine, served.engine.info, served.prompts.template
    return Props(
        Defaults(engine.request_limit, default_settings(served.options.sampling)),
        engine.slots,
        served.name,
        info.path,
        template.source if template else info.chat_template or "",
        info.bos,
        info.eos,
        f"paceline {VERSION}, {info.build}",
        info.exact,
        served.fingerprint,
        Guessing(served.guessers, engine.proposers, engine.silent),
        Memory.of(engine.memory, by_key=served.options.server.cache_salt_by_key),
        served.options.server.slots_endpoint,
        template.capabilities if template else None,
        info.description,
    )
