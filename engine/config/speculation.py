"""Who guesses ahead, and how. Defaults are llama-server's where lengths do not follow from measurement."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from engine.config.flags import flags
from engine.config.model import CacheType
from engine.contract import Length, ProposerType, Share

Size = Annotated[int, Meta(ge=1, le=1024)]
"""A number of tokens, or of occurrences."""


class SpeculationConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Draft types and their settings; requests may choose others."""

    types: Annotated[
        tuple[ProposerType | Literal["none", "auto"], ...],
        Meta(
            description="who guesses for requests that do not say: none, auto (every type, `draft` if there is a "
            "draft model), or types separated by commas",
            extra=flags("--spec-type", env="LLAMA_ARG_SPEC_TYPE"),
        ),
    ] = ("auto",)
    order: Annotated[
        Literal["measured", "fixed"],
        Meta(
            description="measured: the drafts and lengths that make a step fastest for all who take part, by its "
            "measured cost and what became of earlier drafts; fixed: the first type that answers, the draft model "
            "last, and all that it says",
            extra=flags("--spec-order"),
        ),
    ] = "measured"
    default: Annotated[bool, Meta(description="the same as --spec-type ngram-mod", extra=flags("--spec-default"))] = (
        False
    )
    size_n: Annotated[
        Size,
        Meta(
            description="tokens that must recur before ngram-simple and the ngram-map types guess",
            extra=flags("--spec-ngram-size-n"),
        ),
    ] = 12
    size_m: Annotated[
        Size, Meta(description="tokens that these guess at most", extra=flags("--spec-ngram-size-m", "--spec-ngram-m"))
    ] = 48
    min_hits: Annotated[
        Size, Meta(description="how often the tokens must have occurred", extra=flags("--spec-ngram-min-hits"))
    ] = 1
    simple_size_n: Annotated[
        Size | None, Meta(description="--spec-ngram-size-n of this type", extra=flags("--spec-ngram-simple-size-n"))
    ] = None
    simple_size_m: Annotated[
        Size | None, Meta(description="--spec-ngram-size-m of this type", extra=flags("--spec-ngram-simple-size-m"))
    ] = None
    simple_min_hits: Annotated[
        Size | None, Meta(description="--spec-ngram-min-hits of this type", extra=flags("--spec-ngram-simple-min-hits"))
    ] = None
    map_k_size_n: Annotated[
        Size | None, Meta(description="--spec-ngram-size-n of this type", extra=flags("--spec-ngram-map-k-size-n"))
    ] = None
    map_k_size_m: Annotated[
        Size | None, Meta(description="--spec-ngram-size-m of this type", extra=flags("--spec-ngram-map-k-size-m"))
    ] = None
    map_k_min_hits: Annotated[
        Size | None, Meta(description="--spec-ngram-min-hits of this type", extra=flags("--spec-ngram-map-k-min-hits"))
    ] = None
    map_k4v_size_n: Annotated[
        Size | None, Meta(description="--spec-ngram-size-n of this type", extra=flags("--spec-ngram-map-k4v-size-n"))
    ] = None
    map_k4v_size_m: Annotated[
        Size | None, Meta(description="--spec-ngram-size-m of this type", extra=flags("--spec-ngram-map-k4v-size-m"))
    ] = None
    map_k4v_min_hits: Annotated[
        Size | None,
        Meta(description="--spec-ngram-min-hits of this type", extra=flags("--spec-ngram-map-k4v-min-hits")),
    ] = None
    mod_match: Annotated[
        Size, Meta(description="tokens that ngram-mod's pool is asked by", extra=flags("--spec-ngram-mod-n-match"))
    ] = 24
    mod_min: Annotated[
        Length,
        Meta(
            description="tokens that the pool must know for ngram-mod to guess", extra=flags("--spec-ngram-mod-n-min")
        ),
    ] = 48
    mod_max: Annotated[
        Size, Meta(description="tokens that ngram-mod guesses at most", extra=flags("--spec-ngram-mod-n-max"))
    ] = 64
    pool_scope: Annotated[
        Literal["salt", "shared", "slot"],
        Meta(
            description="who shares ngram-mod's pool: requests of equal cache_salt, all, or nobody",
            extra=flags("--spec-pool-scope"),
        ),
    ] = "salt"
    pool_file: Annotated[
        str,
        Meta(
            description="file that ngram-mod's pool is loaded from at start and saved to at the end",
            extra=flags("--spec-pool-file"),
        ),
    ] = ""
    cache_max: Annotated[
        Size, Meta(description="tokens that ngram-cache guesses at most", extra=flags("--spec-ngram-cache-n-max"))
    ] = 8
    lookup_static: Annotated[
        str,
        Meta(
            description="ngram-cache's counts of a corpus, made by `paceline lookup build`",
            extra=flags("-lcs", "--lookup-cache-static"),
        ),
    ] = ""
    lookup_dynamic: Annotated[
        str,
        Meta(
            description="file with ngram-cache's counts of past requests, loaded at start and saved at the end",
            extra=flags("-lcd", "--lookup-cache-dynamic"),
        ),
    ] = ""
    suffix_factor: Annotated[
        float,
        Meta(
            gt=0.0,
            le=64.0,
            description="tokens that suffix guesses for each token of its match",
            extra=flags("--spec-suffix-factor"),
        ),
    ] = 1.0
    suffix_depth: Annotated[
        Annotated[int, Meta(ge=2, le=1024)],
        Meta(description="tokens that a match of suffix may have", extra=flags("--spec-suffix-depth")),
    ] = 64
    suffix_p_min: Annotated[
        Share,
        Meta(description="suffix guesses no further than this likely", extra=flags("--spec-suffix-p-min")),
    ] = 0.1
    suffix_tokens: Annotated[
        Annotated[int, Meta(ge=0, le=2**28)],
        Meta(
            description="tokens of past outputs that suffix remembers, about 300 bytes each; the oldest leave",
            extra=flags("--spec-suffix-tokens"),
        ),
    ] = 100_000

    @property
    def chosen(self) -> tuple[ProposerType | Literal["auto"], ...]:
        """The types for requests that do not say; `none` anywhere means nobody, as with llama-server."""
        if "none" in self.types:
            return ()
        named = tuple(kind for kind in self.types if kind != "none")
        if not self.default:
            return named
        return ("ngram-mod",) if named == ("auto",) else (*named, "ngram-mod")


class DraftConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The draft model: a smaller one with the same vocabulary. Settings not named here are the model's."""

    path: Annotated[
        str,
        Meta(
            description="GGUF file; empty is none",
            extra=flags("-md", "--model-draft", "--spec-draft-model", env="LLAMA_ARG_SPEC_DRAFT_MODEL"),
        ),
    ] = ""
    context: Annotated[
        int,
        Meta(
            ge=0,
            le=2**24,
            description="cells of the draft model; 0 is as many as the model has",
            extra=flags("-cd", "--ctx-size-draft", env="LLAMA_ARG_CTX_SIZE_DRAFT"),
        ),
    ] = 0
    gpu_layers: Annotated[
        int,
        Meta(
            ge=-1,
            description="its layers kept on the GPU; -1 is all of them",
            extra=flags(
                "-ngld",
                "--gpu-layers-draft",
                "--n-gpu-layers-draft",
                "--spec-draft-ngl",
                env="LLAMA_ARG_N_GPU_LAYERS_DRAFT",
            ),
        ),
    ] = -1
    device: Annotated[
        str,
        Meta(
            description="devices that compute it by ggml's names, separated by commas; empty is the model's",
            extra=flags("-devd", "--device-draft", "--spec-draft-device"),
        ),
    ] = ""
    threads: Annotated[
        int,
        Meta(
            ge=-1,
            le=512,
            description="threads of a pass with one row; -1 or 0 is the same as --threads",
            extra=flags("-td", "--threads-draft", "--spec-draft-threads"),
        ),
    ] = -1
    threads_batch: Annotated[
        int,
        Meta(
            ge=-1,
            le=512,
            description="threads of a pass with more rows; -1 or 0 is the same as --threads-draft",
            extra=flags("-tbd", "--threads-batch-draft", "--spec-draft-threads-batch"),
        ),
    ] = -1
    cache_type_k: Annotated[
        CacheType,
        Meta(
            description="type of a cell's keys",
            extra=flags(
                "-ctkd", "--cache-type-k-draft", "--spec-draft-type-k", env="LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K"
            ),
        ),
    ] = "f16"
    cache_type_v: Annotated[
        CacheType,
        Meta(
            description="type of a cell's values",
            extra=flags(
                "-ctvd", "--cache-type-v-draft", "--spec-draft-type-v", env="LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V"
            ),
        ),
    ] = "f16"
    noise: Annotated[
        Literal["shared", "greedy", "off"],
        Meta(
            description="how the draft model picks: with the noise that will pick the model's token, so that both "
            "often agree at any temperature; its likeliest token; or with noise of its own",
            extra=flags("--draft-noise"),
        ),
    ] = "shared"
    n_max: Annotated[
        Size,
        Meta(
            description="tokens that the draft model guesses at most",
            extra=flags("--draft-max", "--draft", "--draft-n", "--spec-draft-n-max", env="LLAMA_ARG_SPEC_DRAFT_N_MAX"),
        ),
    ] = 16
    n_min: Annotated[
        Length,
        Meta(
            description="shorter drafts of it are not verified",
            extra=flags("--draft-min", "--draft-n-min", "--spec-draft-n-min", env="LLAMA_ARG_SPEC_DRAFT_N_MIN"),
        ),
    ] = 0
    p_min: Annotated[
        Share,
        Meta(
            description="it stops before a token that it thinks less likely than this",
            extra=flags("--draft-p-min", "--spec-draft-p-min", env="LLAMA_ARG_SPEC_DRAFT_P_MIN"),
        ),
    ] = 0.0
