"""Settings of speculative decoding: types of proposers, and the draft model.

Defaults are llama-server's, except for draft lengths, which follow from measured step costs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from engine.config.model import CacheType
from engine.contract import DraftLength, ProposerType, Share

# A number of tokens or of occurrences.
_Positive = Annotated[int, Meta(ge=1, le=1024)]


class SpeculationConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Default types of proposers, which a request can override, and the settings of each type."""

    types: Annotated[
        tuple[ProposerType | Literal["none", "auto"], ...],
        Meta(
            description="default types of proposers, separated by commas; none disables speculative decoding, auto is "
            "all types, `draft` only if there is a draft model, and `draft-mtp` only if there is none and the model "
            "or the file of --model-draft has MTP layers",
        ),
    ] = ("auto",)
    order: Annotated[
        Literal["measured", "fixed"],
        Meta(
            description="choice of drafts: measured chooses the drafts and lengths with the most expected tokens per "
            "second of the whole batch, by measured step costs and acceptance; fixed takes the whole draft of the "
            "first type that has a draft, with the draft model or the MTP layers as the last type",
        ),
    ] = "measured"
    default: Annotated[
        bool,
        Meta(description="the same as --spec-type ngram-mod, or adds ngram-mod to the types that --spec-type names"),
    ] = False
    size_n: Annotated[
        _Positive, Meta(description="n-gram length in tokens of ngram-simple, ngram-map-k and ngram-map-k4v")
    ] = 12
    size_m: Annotated[
        _Positive, Meta(description="maximum draft length in tokens of ngram-simple, ngram-map-k and ngram-map-k4v")
    ] = 48
    min_hits: Annotated[
        _Positive,
        Meta(
            description="minimum number of occurrences of an n-gram whose continuation ngram-simple, ngram-map-k and "
            "ngram-map-k4v draft"
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
            description="requests that share n-grams in ngram-mod's pool: salt is requests with equal cache_salt, "
            "shared is all requests, slot is none",
        ),
    ] = "salt"
    pool_file: Annotated[
        str,
        Meta(description="file with ngram-mod's pool, loaded at start and saved at shutdown; empty is no file"),
    ] = ""
    cache_max: Annotated[_Positive, Meta(description="maximum draft length in tokens of ngram-cache")] = 8
    lookup_static: Annotated[
        str,
        Meta(
            description="file with ngram-cache's counts of a corpus, which `paceline lookup build` wrote; empty is no "
            "file",
        ),
    ] = ""
    lookup_dynamic: Annotated[
        str,
        Meta(
            description="file with ngram-cache's counts of past requests, loaded at start and saved at shutdown; empty "
            "is no file",
        ),
    ] = ""
    suffix_factor: Annotated[
        float,
        Meta(gt=0.0, le=64.0, description="maximum draft length of suffix in tokens for each token of the match"),
    ] = 1.0
    suffix_depth: Annotated[int, Meta(ge=2, le=1024, description="maximum length in tokens of suffix's match")] = 64
    suffix_p_min: Annotated[Share, Meta(description="minimum estimated probability of suffix's draft tokens")] = 0.1
    suffix_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=2**28,
            description="maximum number of tokens of past outputs that suffix keeps, at about 300 bytes each; the "
            "oldest outputs are evicted",
        ),
    ] = 100_000

    @property
    def default_types(self) -> tuple[ProposerType | Literal["auto"], ...]:
        """Types for requests without `speculative`. Empty if `types` contains `none`, as in llama-server."""
        if "none" in self.types:
            return ()
        named = tuple(kind for kind in self.types if kind != "none")
        if not self.default:
            return named
        return ("ngram-mod",) if named == ("auto",) else (*named, "ngram-mod")


# A request can raise the maximum length of the draft model's drafts up to this many tokens, because the longest draft
# delays all sequences.
MAX_REQUESTED_TOKENS = 16


class DraftConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The draft model, a smaller model with the same vocabulary, or the file of MTP layers.
    `EngineConfig.for_draft_model` completes the settings."""

    path: Annotated[
        str,
        Meta(
            description="GGUF file of the draft model, or of MTP layers for the model, which draft as `draft-mtp`; "
            "empty is no draft model"
        ),
    ] = ""
    context: Annotated[
        int,
        Meta(ge=0, le=2**24, description="KV cells of the draft model; 0 is the number of the target model's cells"),
    ] = 0
    gpu_layers: Annotated[
        int, Meta(ge=-1, le=2**31 - 1, description="layers of the draft model offloaded to the GPU; -1 is all of them")
    ] = -1
    device: Annotated[
        str,
        Meta(
            description="ggml's names of the devices that compute the draft model, separated by commas; empty is the "
            "devices of the target model"
        ),
    ] = ""
    threads: Annotated[
        int,
        Meta(
            ge=-1,
            le=512,
            description="threads of a draft model's step with one row; 0 or -1 is the same as --threads",
        ),
    ] = -1
    threads_batch: Annotated[
        int,
        Meta(
            ge=-1,
            le=512,
            description="threads of a draft model's step with several rows; 0 or -1 is the same as --threads-draft if "
            "that is given, and as --threads-batch if not",
        ),
    ] = -1
    cache_type_k: Annotated[CacheType, Meta(description="type of the keys in the draft model's KV cache")] = "f16"
    cache_type_v: Annotated[CacheType, Meta(description="type of the values in the draft model's KV cache")] = "f16"
    override_tensor: Annotated[tuple[str, ...], Meta(description="--override-tensor of the draft model")] = ()
    cpu_moe: Annotated[bool, Meta(description="--cpu-moe of the draft model")] = False
    n_cpu_moe: Annotated[int, Meta(ge=0, le=10_000, description="--n-cpu-moe of the draft model")] = 0
    noise: Annotated[
        Literal["shared", "greedy", "off"],
        Meta(
            description="sampling of the draft tokens of draft model and MTP layers: shared uses the noise of the "
            "target's sampling, which raises acceptance at any temperature; greedy takes the most likely token; off "
            "uses independent noise",
        ),
    ] = "shared"
    n_max: Annotated[_Positive, Meta(description="maximum draft length in tokens of draft model or MTP layers")] = 16
    n_min: Annotated[
        DraftLength,
        Meta(description="minimum draft length in tokens of draft model or MTP layers; a shorter draft is dropped"),
    ] = 0
    p_min: Annotated[
        Share,
        Meta(
            description="minimum probability that the draft model or the MTP layers give a draft token; a less likely "
            "one ends the draft",
        ),
    ] = 0.0

    def max_tokens(self, requested: int | None) -> int:
        """Returns the maximum length of the drafts of a request that asks for `requested` tokens; None asks for the
        default."""
        return min(requested or self.n_max, max(self.n_max, MAX_REQUESTED_TOKENS))
