"""The sampling parameters of a request."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

SamplerStage = Literal[
    "penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature", "infill", "adaptive_p"
]
# llama-server's stages in their default order.
DEFAULT_SAMPLERS: tuple[SamplerStage, ...] = (
    "penalties",
    "dry",
    "top_n_sigma",
    "top_k",
    "typ_p",
    "top_p",
    "min_p",
    "xtc",
    "temperature",
)
# The type of probabilities.
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
# The number of latest tokens that a penalty considers; -1 means all tokens, 0 none.
TokenWindow = Annotated[int, Meta(ge=-1, le=2**31 - 1)]


class SamplingParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of sampling, with the names and defaults of llama-server.

    After `logit_bias` the stages run in the order of `samplers`. `adaptive_p` is always the last stage, and also runs
    if `samplers` has its default value and `adaptive_target` is not negative. Mirostat replaces all stages except
    `temperature`, and has no dynamic temperature. The penalties and DRY look back on the prompt and the output, as
    llama-server's do. `msgspec.convert` checks the ranges; the constructor does not.
    """

    temperature: Annotated[float, Meta(ge=0.0, le=100.0, description="0 picks the most likely token")] = 0.8
    dynatemp_range: Annotated[
        float,
        Meta(ge=0.0, le=100.0, description="the temperature varies by up to this much with the entropy; 0 is off"),
    ] = 0.0
    dynatemp_exponent: Annotated[
        float, Meta(ge=0.0, le=100.0, description="exponent of the normalised entropy in the dynamic temperature")
    ] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1, description="keep the k most likely tokens; 0 or -1 keeps all")] = (
        40
    )
    top_p: Annotated[Share, Meta(description="keep the most likely tokens that together have this probability")] = 0.95
    min_p: Annotated[Share, Meta(description="drop tokens below this fraction of the highest probability")] = 0.05
    typical_p: Annotated[Share, Meta(description="locally typical sampling; 1 is off")] = 1.0
    repeat_penalty: Annotated[
        float, Meta(gt=0.0, le=100.0, description="lowers logits of tokens that occurred; 1 is off")
    ] = 1.0
    repeat_last_n: Annotated[
        TokenWindow,
        Meta(description="number of latest tokens that the three penalties cover; -1 is all"),
    ] = 64
    presence_penalty: Annotated[
        float, Meta(ge=-100.0, le=100.0, description="subtracted from the logit of a token that occurred; 0 is off")
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        Meta(ge=-100.0, le=100.0, description="subtracted from a token's logit for each occurrence; 0 is off"),
    ] = 0.0
    dry_multiplier: Annotated[float, Meta(ge=0.0, le=100.0, description="DRY repetition penalty; 0 is off")] = 0.0
    dry_base: Annotated[
        float, Meta(ge=1.0, le=100.0, description="factor of the DRY penalty for each further repeated token")
    ] = 1.75
    dry_allowed_length: Annotated[
        int, Meta(ge=0, le=2**31 - 1, description="repeats of up to this many tokens have no DRY penalty")
    ] = 2
    dry_penalty_last_n: Annotated[
        TokenWindow, Meta(description="number of latest tokens that DRY covers; -1 is all")
    ] = 64
    dry_sequence_breakers: Annotated[tuple[str, ...], Meta(description="strings that end a repeat for DRY")] = (
        "\n",
        ":",
        '"',
        "*",
    )
    xtc_probability: Annotated[Share, Meta(description="chance that XTC is applied to a token; 0 is off")] = 0.0
    xtc_threshold: Annotated[
        Share, Meta(description="XTC drops the tokens above this probability except the least likely")
    ] = 0.1
    top_n_sigma: Annotated[
        float,
        Meta(
            ge=-100.0,
            le=100.0,
            description="keep tokens whose logit is at most this many standard deviations below the maximum; 0 or "
            "less is off",
        ),
    ] = -1.0
    mirostat: Annotated[
        int, Meta(ge=0, le=2, description="1 or 2: Mirostat of this version in place of the other stages; 0 is off")
    ] = 0
    mirostat_tau: Annotated[float, Meta(ge=0.0, le=100.0, description="surprise in bits that Mirostat aims at")] = 5.0
    mirostat_eta: Annotated[float, Meta(ge=0.0, le=100.0, description="learning rate of Mirostat")] = 0.1
    adaptive_target: Annotated[
        float,
        Meta(
            ge=-100.0, le=1.0, description="probability near which adaptive-p selects tokens; a negative value is off"
        ),
    ] = -1.0
    adaptive_decay: Annotated[
        float, Meta(ge=0.0, le=0.99, description="decay of adaptive-p's average of earlier probabilities")
    ] = 0.9
    min_keep: Annotated[
        int, Meta(ge=0, le=2**31 - 1, description="minimum number of tokens that typical_p, top_p, min_p and XTC keep")
    ] = 0
    samplers: Annotated[tuple[SamplerStage, ...], Meta(max_length=64, description="stages in order")] = DEFAULT_SAMPLERS
    logit_bias: Annotated[
        tuple[tuple[int, float], ...], Meta(description="tokens and the numbers added to their logits")
    ] = ()
    seed: Annotated[
        Annotated[int, Meta(ge=0, le=2**63 - 1)] | None,
        Meta(description="default seed of requests; without it each request has a random one"),
    ] = None
