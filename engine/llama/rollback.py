"""Snapshots of recurrent states (llama.cpp: `n_rs_seq`): their number, their memory and a probe of rollbacks.

A recurrent layer has one state for each sequence id. With snapshots the library also keeps the states before the last
rows of a sequence, so that rejected draft tokens can be dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from llama_cpp import llama_cpp as native

from engine.backend import Context, Logits
from engine.config import EngineConfig
from engine.llama.library import native_log
from engine.llama.params import metadata

# Maximum snapshots of a sequence: longer drafts rarely gain, and each snapshot takes as much memory as the state.
MAX_SNAPSHOTS = 8
# Maximum share of the free memory that states and snapshots may take together.
STATES_SHARE = 0.125
# The library splits a batch so that the rows with snapshots stay in one pass, which must have more rows than these.
_MIN_OTHER_ROWS = 2
# Maximum difference of two logits vectors, relative to their spread, that different numbers of rows in a pass cause.
_MAX_DIFFERENCE = 0.05
_FLOAT_BYTES = 4


class Snapshots(NamedTuple):
    """Number of snapshots of each sequence, and the reason if it is 0."""

    kept: int
    reason: str = ""


def choose_snapshots(state_bytes: int, sequences: int, ubatch: int, free_bytes: float, *, drafts: bool) -> Snapshots:
    """Returns the number of snapshots of each of `sequences` sequence ids that fit `STATES_SHARE` of `free_bytes`.

    Without `drafts`, which means that no drafts are configured, there are none.
    """
    if not drafts:
        return Snapshots(0, "the model has recurrent states, of which --spec-type none keeps no snapshots")
    one = max(1, state_bytes * sequences)
    count = min(MAX_SNAPSHOTS, ubatch - _MIN_OTHER_ROWS, int(STATES_SHARE * free_bytes / one) - 1)
    if count > 0:
        return Snapshots(count)
    return Snapshots(
        0,
        f"two recurrent states of each of {sequences} sequence ids need {2 * one / 1e9:.1f} GB, more than "
        f"{STATES_SHARE:.1%} of the free memory; fewer --parallel slots need less",
    )


def snapshots_of(config: EngineConfig, model: Any, params: Any, free_bytes: float) -> Snapshots:
    """Returns the number of snapshots for a context of a recurrent or hybrid model with `params`."""
    drafts = bool(config.speculation.default_types)
    return choose_snapshots(state_bytes(model), params.n_seq_max, params.n_ubatch, free_bytes, drafts=drafts)


def state_bytes(model: Any) -> int:
    """Returns the bytes of the recurrent states of one sequence, computed from the metadata. The result is an upper
    bound, as it counts a state for each layer."""
    family = metadata(model, "general.architecture")

    def number(key: str) -> int:
        found = metadata(model, f"{family}.{key}")
        return int(found) if found.isdigit() else 0

    width, heads = native.llama_model_n_embd(model), native.llama_model_n_head(model)
    kept_rows = max(0, number("ssm.conv_kernel") - 1)
    if window := number("shortconv.l_cache"):
        values = width * (window - 1)
    elif head := number("kda.head_dim"):
        values = head * heads * (head + 3 * (kept_rows or 3))
    else:
        inner, state = number("ssm.inner_size"), number("ssm.state_size")
        values = state * inner + kept_rows * (inner + 2 * number("ssm.group_count") * state)
    return int(_FLOAT_BYTES * values * native.llama_model_n_layer(model))


def verified_rollback(context: Context, tokens: Sequence[int], snapshots: int) -> int:
    """Returns `snapshots`; 0, with a warning, if rollbacks do not work with this model.

    They work if a sequence after a rollback, and a copy of it, continue as one that never had the dropped rows.
    `tokens` are two or more. The cells are empty afterwards.
    """
    count = min(snapshots, len(tokens) - 1)
    first, others, copy = [*tokens[:1]], [*tokens[1 : 1 + count]], context.sequences - 1
    try:
        _decode(context, 0, 0, first)
        expected = _decode(context, 0, 1, others)
        context.clear()
        _decode(context, 0, 0, first * (1 + count))
        if context.cut(0, 1) and (not copy or context.copy(0, copy, 1)):
            found = [_decode(context, seq, 1, others) for seq in {copy, 0}]
            limit = _MAX_DIFFERENCE * float(np.ptp(expected))
            if all(float(np.abs(each - expected).max()) <= limit for each in found):
                return snapshots
        native_log.warning("drafts are off: the library does not roll back this model's recurrent states correctly")
        return 0
    finally:
        context.batch.clear()
        context.clear()


def _decode(context: Context, seq: int, start: int, tokens: Sequence[int]) -> Logits:
    """Returns a copy of the logits of the last of `tokens`."""
    context.batch.clear()
    context.batch.add(seq, start, tokens, 1)
    logits: Logits = context.decode()[0].copy()
    return logits
