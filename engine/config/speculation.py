"""Speculative decoding: types of proposers, their settings, and the draft model.

Defaults are llama-server's, except for draft lengths, which follow from measured step costs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from engine.config.model import CacheType
from engine.contract import DraftLength, ProposerType, Share

# Tokens or occurrences.
_Positive = Annotated[int, Meta(ge=1, le=1024)]


class SpeculationConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Default types of proposers, which a request may override, and the settings of each type."""

    types: Annotated[
        tuple[ProposerType | Literal["none", "auto"], ...],
        Meta(
            description="default types of proposers, separated by commas; none is no speculative decoding, auto is "
            "every type, `draft` only with a draft model"
        ),
    ] = ("auto",)
    order: Annotated[
        Literal["measured", "fixed"],
        Meta(
            description="choice between drafts: measured verifies the drafts and lengths with the most expected tokens "
            "per second of the whole batch, by measured step costs and acceptance; fixed verifies the whole draft of "
            "the first type that has one, the draft model last"
        ),
    ] = "measured"
    default: Annotated[bool, Meta(description="the same as --spec-type ngram-mod")] = False
    size_n: Annotated[
        _Positive, Meta(description="n-gram length in tokens of ngram-simple, ngram-map-k and ngram-map-k4v")
    ] = 12
    size_m: Annotated[
        _Positive, Meta(description="maximum draft length in tokens of ngram-simple, ngram-map-k and ngram-map-k4v")
    ] = 48
    min_hits: Annotated[
        _Positive,
        Meta(
            description="occurrences of an n-gram before ngram-simple, ngram-map-k and ngram-map-k4v draft its "
            "continuation"
        ),
    ] = 1
    simple_size_n: Annotated[_Positive | None, Meta(description="--spec-ngram-size-n of ngram-simple alone")] = None
    simple_size_m: Annotated[_Positive | None, Meta(description="--spec-ngram-size-m of ngram-simple alone")] = None
    simple_min_hits: Annotated[_Positive | None, Meta(description="--spec-ngram-min-hits of ngram-simple alone")] = None
    map_k_size_n: Annotated[_Positive | None, Meta(description="--spec-ngram-size-n of ngram-map-k alone")] = None
    map_k_size_m: Annotated[_Positive | None, Meta(description="--spec-ngram-size-m of ngram-map-k alone")] = None
    map_k_min_hits: Annotated[_Positive | None, Meta(description="--spec-ngram-min-hits of ngram-map-k alone")] = None
    map_k4v_size_n: Annotated[_Positive | None, Meta(description="--spec-ngram-size-n of ngram-map-k4v alone")] = None
    map_k4v_size_m: Annotated[_Positive | None, Meta(description="--spec-ngram-size-m of ngram-map-k4v alone")] = None
    map_k4v_min_hits: Annotated[_Positive | None, Meta(description="--spec-ngram-min-hits of ngram-map-k4v alone")] = (
        None
    )
    mod_match: Annotated[_Positive, Meta(description="n-gram length in tokens of ngram-mod's pool")] = 24
    mod_min: Annotated[
        DraftLength, Meta(description="minimum draft length in tokens of ngram-mod; a shorter draft is dropped")
    ] = 48
    mod_max: Annotated[_Positive, Meta(description="maximum draft length in tokens of ngram-mod")] = 64
    pool_scope: Annotated[
        Literal["salt", "shared", "slot"],
        Meta(
            description="requests that share n-grams in ngram-mod's pool: salt is those of equal cache_salt, shared is "
            "all, slot is none"
        ),
    ] = "salt"
    pool_file: Annotated[
        str,
        Meta(description="file of ngram-mod's pool, loaded at start and saved at shutdown; empty is no file"),
    ] = ""
    cache_max: Annotated[_Positive, Meta(description="maximum draft length in tokens of ngram-cache")] = 8
    lookup_static: Annotated[
        str,
        Meta(
            description="file of ngram-cache's counts of a corpus, written by `paceline lookup build`; empty is no file"
        ),
    ] = ""
    lookup_dynamic: Annotated[
        str,
        Meta(
            description="file of ngram-cache's counts of past requests, loaded at start and saved at shutdown; empty "
            "is no file"
        ),
    ] = ""
    suffix_factor: Annotated[
        float,
        Meta(gt=0.0, le=64.0, description="maximum draft tokens of suffix for each token of the match"),
    ] = 1.0
    suffix_depth: Annotated[int, Meta(ge=2, le=1024, description="maximum length in tokens of a match of suffix")] = 64
    suffix_p_min: Annotated[Share, Meta(description="minimum estimated probability of a draft token of suffix")] = 0.1
    suffix_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=2**28,
            description="tokens of past outputs that suffix keeps, about 300 bytes each; the oldest are evicted",
        ),
    ] = 100_000

    @property
    def default_types(self) -> tuple[ProposerType | Literal["auto"], ...]:
        """Types for requests without `speculative`; `none` anywhere in `types` means none, as in llama-server."""
        if "none" in self.types:
            return ()
        named = tuple(kind for kind in self.types if kind != "none")
        if not self.default:
            return named
        return ("ngram-mod",) if named == ("auto",) else (*named, "ngram-mod")


class DraftConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The draft model, a smaller model with the same vocabulary. Settings without a field here are the target's."""

    path: Annotated[str, Meta(description="GGUF file of the draft model; empty is no draft model")] = ""
    context: Annotated[
        int, Meta(ge=0, le=2**24, description="KV cells of the draft model; 0 is as many as the target model has")
    ] = 0
    gpu_layers: Annotated[
        int, Meta(ge=-1, description="layers of the draft model offloaded to the GPU; -1 is all of them")
    ] = -1
    device: Annotated[
        str,
        Meta(
            description="devices that compute the draft model, as ggml names them, separated by commas; empty is the "
            "target model's"
        ),
    ] = ""
    threads: Annotated[
        int,
        Meta(
            ge=-1,
            le=512,
            description="threads of a draft model's step with one row; -1 or 0 is the same as --threads",
        ),
    ] = -1
    threads_batch: Annotated[
        int,
        Meta(
            ge=-1,
            le=512,
            description="threads of a draft model's step with several rows; -1 or 0 is the same as --threads-draft",
        ),
    ] = -1
    cache_type_k: Annotated[CacheType, Meta(description="type of the keys in the draft model's KV cache")] = "f16"
    cache_type_v: Annotated[CacheType, Meta(description="type of the values in the draft model's KV cache")] = "f16"
    noise: Annotated[
        Literal["shared", "greedy", "off"],
        Meta(
            description="sampling of draft tokens: shared uses the noise of the target model's sampling, which raises "
            "acceptance at any temperature; greedy takes the likeliest token; off uses independent noise"
        ),
    ] = "shared"
    n_max: Annotated[_Positive, Meta(description="maximum draft length in tokens of the draft model")] = 16
    n_min: Annotated[
        DraftLength,
        Meta(description="minimum draft length in tokens of the draft model; a shorter draft is not verified"),
    ] = 0
    p_min: Annotated[
        Share,
        Meta(description="minimum probability of a draft token by the draft model; a less likely token ends the draft"),
    ] = 0.0
