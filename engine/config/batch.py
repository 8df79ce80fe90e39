"""Context, slots and batch sizes."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class BatchConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """KV cells and slots of the context, rows and milliseconds of one step."""

    context: Annotated[
        int,
        Meta(
            ge=0,
            le=2**24,
            description="KV cells (tokens) of all slots together; 0 is chosen at start: with per-slot KV the training "
            "context for each slot, at most 8,192 and a quarter of the free memory; with unified KV the training "
            "context",
        ),
    ] = 0
    slots: Annotated[int, Meta(ge=1, le=256, description="number of slots: sequences that are decoded together")] = 16
    queue: Annotated[
        int,
        Meta(
            ge=0,
            le=100_000,
            description="maximum number of requests queued for a slot; the next one gets 429 with Retry-After",
        ),
    ] = 256
    rows: Annotated[int, Meta(ge=32, le=2**16, description="maximum rows (tokens) of one decode")] = 2048
    ubatch: Annotated[
        int, Meta(ge=32, le=2**16, description="maximum rows (tokens) of one ubatch, a pass over the weights")
    ] = 512
    outputs: Annotated[
        int,
        Meta(
            ge=0,
            le=2**16,
            description="maximum rows of logits of one decode, which bounds the drafts of all slots together; 0 is the "
            "larger of 128 and 8 for each slot",
        ),
    ] = 0
    context_shift: Annotated[
        bool,
        Meta(
            description="context shift: a sequence that fills its context discards half of its tokens and continues, "
            "instead of ending"
        ),
    ] = False
    keep: Annotated[
        int,
        Meta(
            ge=-1,
            le=2**24,
            description="tokens at the start of the prompt that a context shift keeps, at most half of the context; "
            "-1 is the whole prompt",
        ),
    ] = 0
    step_ms: Annotated[
        float,
        Meta(
            ge=0.0,
            le=60_000.0,
            description="milliseconds that a step with both prefill and decode rows may take; 0 is twice a step "
            "without prefill, so that decoding sequences keep half their speed, and more if more sequences are "
            "prefilled than decoded or a request has no token after seconds, up to --idle-step-ms, or twice that "
            "after 30 s",
        ),
    ] = 0.0
    idle_step_ms: Annotated[
        float,
        Meta(ge=1.0, le=60_000.0, description="milliseconds that a step with prefill rows only may take"),
    ] = 500.0
