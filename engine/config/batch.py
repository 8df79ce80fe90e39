"""How much at once."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from engine.config.flags import flags


class BatchConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much is held, and how much one step may do."""

    context: Annotated[
        int,
        Meta(
            ge=0,
            le=2**24,
            description="cells (tokens) shared by all requests; 0 is the model's training context",
            extra=flags("-c", "--ctx-size", env="LLAMA_ARG_CTX_SIZE"),
        ),
    ] = 0
    slots: Annotated[
        int,
        Meta(
            ge=1,
            le=256,
            description="requests decoded together",
            extra=flags("-np", "--parallel", env="LLAMA_ARG_N_PARALLEL"),
        ),
    ] = 16
    queue: Annotated[
        int,
        Meta(
            ge=0,
            le=100_000,
            description="requests that may wait for a slot; one more gets 429 with Retry-After",
            extra=flags("--queue"),
        ),
    ] = 256
    rows: Annotated[
        int,
        Meta(
            ge=32,
            le=2**16,
            description="rows (tokens) of one decode at most",
            extra=flags("-b", "--batch-size", env="LLAMA_ARG_BATCH"),
        ),
    ] = 2048
    ubatch: Annotated[
        int,
        Meta(
            ge=32,
            le=2**16,
            description="rows that the library computes in one pass over the weights",
            extra=flags("-ub", "--ubatch-size", env="LLAMA_ARG_UBATCH"),
        ),
    ] = 512
    outputs: Annotated[
        int,
        Meta(
            ge=0,
            le=2**16,
            description="rows of logits of one decode at most, which bounds the drafts of all slots together; "
            "0 is 128, or 8 for each slot if that is more",
            extra=flags("--outputs"),
        ),
    ] = 0
    context_shift: Annotated[
        bool,
        Meta(
            description="a request that fills its context forgets half of it and goes on, instead of ending",
            extra=flags("--context-shift", env="LLAMA_ARG_CONTEXT_SHIFT"),
        ),
    ] = False
    keep: Annotated[
        int,
        Meta(
            ge=-1,
            le=2**24,
            description="tokens at a prompt's start that are never forgotten, at most half of the context; -1 is all",
            extra=flags("--keep"),
        ),
    ] = 0
    step_ms: Annotated[
        float,
        Meta(
            ge=0.0,
            le=60_000.0,
            description="milliseconds a step may take while prompts are read beside running streams; "
            "0 is twice a step without prompts, so that streams keep half their speed, and more where more prompts are "
            "read than streams run",
            extra=flags("--step-ms"),
        ),
    ] = 0.0
    idle_step_ms: Annotated[
        float,
        Meta(
            ge=1.0,
            le=60_000.0,
            description="milliseconds a step may take while only prompts are read",
            extra=flags("--idle-step-ms"),
        ),
    ] = 500.0
