"""GET /props: the loaded model, the server's settings and the default parameters, in llama-server's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct

from api.config.options import Options
from api.generation.loaded_model import PACELINE_VERSION, LoadedModel
from api.schema.generation_settings import default_settings
from api.templates.chat_template import Capabilities
from api.templates.media_files import PROMPT_MARKER
from engine import MemoryInfo


class DefaultSettings(Struct, frozen=True):
    """Default parameters of a request."""

    n_ctx: int
    """Maximum tokens of a request, prompt and completion together."""
    params: dict[str, object]


class SpeculationProps(Struct, frozen=True):
    """The proposer types: default of requests, available, and unavailable with the reason."""

    types: Sequence[str]
    available: Sequence[str]
    unavailable: Mapping[str, str]


class PrefixCacheProps(Struct, frozen=True):
    """The layout of the KV cache and the sharing of prefixes."""

    kv_unified: bool
    """True if all slots share the KV cells, False if each slot has cells of its own."""
    kv_reason: str
    """The reason for the layout, in one line."""
    sharing: Literal["any token", "whole texts"]
    """The point at which a shared prefix may end: any token, or the end of a whole earlier sequence."""
    window: int
    """Size of the sliding attention window in tokens, 0 if all layers attend to all tokens."""
    ram_bytes: int
    """Capacity of the RAM tier."""
    disk: bool
    """True if prefixes survive a restart."""
    disk_bytes: int
    """Capacity of the disk tier."""
    moved_from: int
    """Minimum tokens of a recurring part of a prompt whose KV is moved instead of computed, 0 if no part is moved."""
    by_key: bool
    """True if only requests with the same API key share prefixes."""

    @classmethod
    def of(cls, memory: MemoryInfo, *, by_key: bool) -> PrefixCacheProps:
        """Returns the layout and capacities of the KV cache in the reply's shape."""
        return cls(
            memory.kv_unified,
            memory.kv_reason,
            "any token" if memory.partial else "whole texts",
            memory.window,
            memory.ram_bytes,
            memory.disk,
            memory.disk_bytes,
            memory.reuse_min_tokens,
            by_key,
        )


class Modalities(Struct, frozen=True):
    """Supported inputs besides text."""

    vision: bool = False
    audio: bool = False
    video: bool = False


class Props(Struct, frozen=True):
    """The reply of GET /props."""

    default_generation_settings: DefaultSettings
    total_slots: int
    model_alias: str
    model_path: str
    chat_template: str
    bos_token: str
    eos_token: str
    build_info: str
    deterministic: bool
    """True if the same seed gives the same completion under any load."""
    system_fingerprint: str
    """Hash of Paceline's version, the model file, the library build, the KV types and the attention kernel."""
    speculative: SpeculationProps
    memory: PrefixCacheProps
    endpoint_slots: bool
    """True if GET /slots is enabled."""
    chat_template_caps: Capabilities | None
    """None if the template is invalid."""
    model_ftype: str
    endpoint_props: bool = False
    endpoint_metrics: bool = True
    modalities: Modalities = Modalities()
    media_marker: str = PROMPT_MARKER
    """Stands for an item of `multimodal_data` in a prompt of POST /completion."""
    is_sleeping: bool = False


def _default_parameters(options: Options) -> dict[str, object]:
    """Returns the parameters of a request that sets none."""
    generation = options.generation
    return default_settings(
        options.sampling,
        n_predict=generation.n_predict,
        keep=options.batch.keep,
        ignore_eos=generation.ignore_eos,
        stop=generation.reverse_prompt,
    )


def props_reply(model: LoadedModel) -> Props:
    """Returns the properties of the loaded model and its server."""
    engine, info, template = model.engine, model.engine.info, model.prompts.template
    return Props(
        DefaultSettings(engine.request_limit, _default_parameters(model.options)),
        engine.slots,
        model.name,
        info.path,
        template.source if template else info.chat_template or "",
        info.bos,
        info.eos,
        f"paceline {PACELINE_VERSION}, {info.build}",
        info.exact,
        model.fingerprint,
        SpeculationProps(model.default_proposers, engine.proposers, engine.unavailable_proposers),
        PrefixCacheProps.of(engine.memory, by_key=model.options.server.cache_salt_by_key),
        model.options.server.slots_endpoint,
        template.capabilities if template else None,
        info.description,
        modalities=Modalities(vision=model.prompts.media.vision, audio=model.prompts.media.audio),
    )
