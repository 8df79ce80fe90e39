"""Context, slots and batch sizes."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from engine.config.flags import flags


class BatchConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cells and slots, and the rows and the time of one step."""

    context: Annotated[
        int,
        Meta(
            ge=0,
            le=2**24,
            description="cells (tokens) of all slots together; 0 is chosen at start: with per-slot KV the training "
            "context for each slot, at most 8,192 and a quarter of the free memory; with unified KV the training "
            "context",
            extra=flags("-c", "--ctx-size", env="LLAMA_ARG_CTX_SIZE"),
        ),
    ] = 0
    slots: Annotated[
        int,
        Meta(
            ge=1,
            le=256,
            description="slots: sequences that are decoded together",
            extra=flags("-np", "--parallel", env="LLAMA_ARG_N_PARALLEL"),
        ),
    ] = 16
    queue: Annotated[
        int,
        Meta(
            ge=0,
            le=100_000,
            description="requests that may be queued for a slot; one more gets 429 with Retry-After",
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
            description="context shift: a sequence that fills its context discards half of it and continues, instead "
            "of ending",
            extra=flags("--context-shift", env="LLAMA_ARG_CONTEXT_SHIFT"),
        ),
    ] = False
    keep: Annotated[
        int,
        Meta(
            ge=-1,
            le=2**24,
            description="tokens at the start of a prompt that a context shift keeps, at most half of the context; "
            "-1 is all",
            extra=flags("--keep"),
        ),
    ] = 0
    step_ms: Annotated[
        float,
        Meta(
            ge=0.0,
            le=60_000.0,
            description="milliseconds that a step with both prefill and decode rows may take; 0 is twice a step "
            "without prefill, so that decoding sequences keep half their speed, and more if more sequences are "
            "prefilled than decoded or a prompt has waited for seconds, up to --idle-step-ms, or twice that after 30 s",
            extra=flags("--step-ms"),
        ),
    ] = 0.0
    idle_step_ms: Annotated[
        float,
        Meta(
            ge=1.0,
            le=60_000.0,
            description="milliseconds that a step with prefill rows only may take",
            extra=flags("--idle-step-ms"),
        ),
    ] = 500.0
