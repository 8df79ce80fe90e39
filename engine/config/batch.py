"""Settings of the context, the slots and the batches."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

# Number of slots if the configuration gives none.
DEFAULT_SLOTS = 16


class BatchConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Numbers of KV cells and slots, and limits of rows and milliseconds for one step."""

    context: Annotated[
        int,
        Meta(
            ge=0,
            le=2**24,
            description="KV cells (tokens) of all slots together; 0 is as many as fit a quarter of the free memory, at "
            "most the training context and 8,192 for each slot with per-slot KV, or the training context in all with "
            "unified KV",
        ),
    ] = 0
    slots: Annotated[
        int,
        Meta(
            ge=0,
            le=256,
            description=f"number of slots: sequences that are decoded together; 0 is {DEFAULT_SLOTS}, with unified KV "
            "if --ctx-size gives each slot less than the training context",
        ),
    ] = 0
    slot_context: Annotated[
        int,
        Meta(
            ge=0,
            le=2**24,
            description="maximum tokens of one request with unified KV; without --ctx-size the pool has so many cells "
            "for each slot; 0 is no limit besides the pool",
        ),
    ] = 0
    queue: Annotated[
        int,
        Meta(
            ge=0,
            le=100_000,
            description="maximum number of requests queued for a slot; further requests get 429 with Retry-After",
        ),
    ] = 256
    queue_timeout: Annotated[
        float,
        Meta(
            ge=0.0,
            le=86_400.0,
            description="maximum seconds in the queue before a request starts, after which it gets 503 with "
            "Retry-After; 0 is no maximum",
        ),
    ] = 0.0
    stall_timeout: Annotated[
        float,
        Meta(
            ge=0.0,
            le=86_400.0,
            description="seconds of one step after which the engine counts as stalled: /health and requests get 503, "
            "and the log has the stacks of all threads; at least 20 mean steps; 0 is off",
        ),
    ] = 120.0
    rows: Annotated[int, Meta(ge=1, le=2**16, description="maximum rows (tokens) of one decode")] = 2048
    ubatch: Annotated[
        int, Meta(ge=32, le=2**16, description="maximum rows (tokens) of one ubatch, a pass over the weights")
    ] = 512
    outputs: Annotated[
        int,
        Meta(
            ge=0,
            le=2**16,
            description="maximum rows of logits of one decode, which limits the drafts of all slots together; 0 is 8 "
            "for each slot, and at least 128",
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
            description="maximum milliseconds of a step with prefill and decode rows; 0 is twice the time of a step "
            "without prefill rows, so that decoding sequences keep half of their speed; the maximum grows up to "
            "--idle-step-ms if more sequences are prefilled than decoded, or if a request has had no token for 3 s and "
            "for the time of its own prefill; after ten times that long it grows up to twice --idle-step-ms",
        ),
    ] = 0.0
    idle_step_ms: Annotated[
        float,
        Meta(ge=1.0, le=60_000.0, description="maximum milliseconds of a step with prefill rows only"),
    ] = 500.0

    @property
    def num_slots(self) -> int:
        """Number of slots."""
        return self.slots or DEFAULT_SLOTS
