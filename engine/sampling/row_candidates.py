"""Picks the tokens of rows of which only the most likely tokens, selected by the backend, are known.

The picks are those of `pick_rows` from all logits. A row is undecided if a token that is not known could be picked: if
ties reach the least likely known token, or too many known tokens may not be picked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.backend_sampling import SelectedTokens
from engine.sampling.candidates import lowest_within
from engine.sampling.row_picks import UNPICKED, ParamColumns, PickParams, TopTokens, draw_tokens, ordered_bits

# Stands for the token of a row that can only be picked from all logits.
UNDECIDED = -2


class RowCandidates:
    """The known tokens of rows, most likely first."""

    def __init__(self, selected: SelectedTokens, known: NDArray[np.bool_], banned: NDArray[np.bool_]) -> None:
        """`known`, [rows, count], is True for the defined elements of `selected`, and `banned` for tokens that may not
        be picked."""
        self.lowest: NDArray[np.float32] = np.where(known, selected.logits, np.inf).min(axis=1)
        """The lowest known logit of each row; unknown logits are not higher. NaN if a known logit is NaN."""
        eligible = known & ~banned
        ids, logits = np.where(eligible, selected.ids, 0), np.where(eligible, selected.logits, -np.inf)
        self.top = _by_logit(ids, logits)


def _by_logit(ids: NDArray[np.int32], logits: NDArray[np.float32]) -> TopTokens:
    """Returns each row in the order of descending logits; among equal logits, the lowest id comes first.

    The order is that of one integer per token, with the bits of the negative logit above those of the id. Sorting these
    takes a tenth of the time of `np.lexsort`.
    """
    keys = ordered_bits(0.0 - logits) << 32 | ids  # 0.0 also for a logit of -0.0
    keys.sort(axis=1)
    bits = keys >> 32
    negative = (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int32).view(np.float32)
    return TopTokens((keys & 0xFFFFFFFF).astype(np.intp), 0.0 - negative.astype(np.float64))


def pick_candidates(candidates: RowCandidates, params: Sequence[PickParams], positions: Sequence[int]) -> list[int]:
    """Returns the token of each row, given its parameters and the number of tokens before it.

    The token is `UNDECIDED` for a row that needs all logits, and `UNPICKED` if a known logit is NaN or the maximum is
    infinite.
    """
    ids, logits = candidates.top
    second = np.maximum(logits[:, 1], candidates.lowest)
    tokens, rows = [UNDECIDED] * len(params), list[int]()  # `rows` are drawn together
    bounds = zip(ids[:, 0].tolist(), logits[:, 0].tolist(), second.tolist(), candidates.lowest.tolist(), strict=True)
    for row, (token, highest, runner_up, lowest) in enumerate(bounds):
        if math.isnan(lowest) or highest == math.inf:
            tokens[row] = UNPICKED
        elif highest > lowest and runner_up < highest + params[row].dominance:
            tokens[row] = token
        elif highest > lowest and params[row].top_k:
            rows.append(row)
    if rows:
        drawn = _draw(candidates, rows, [params[row] for row in rows], [positions[row] for row in rows])
        for row, drawn_token in zip(rows, drawn, strict=True):
            tokens[row] = drawn_token
    return tokens


def _draw(
    candidates: RowCandidates, rows: Sequence[int], params: Sequence[PickParams], positions: Sequence[int]
) -> list[int]:
    columns = ParamColumns.of(params)
    count = min(max(each.top_k for each in params), candidates.top.ids.shape[1])
    ids, logits = (part[rows, :count] for part in candidates.top)
    floors = lowest_within(logits[:, :1], columns.reaches)
    is_kept = (logits >= floors) & (np.arange(count) < columns.top_ks)
    # The logit of the last token in the top k. -inf for a row with fewer known tokens.
    at = np.minimum(np.array([each.top_k for each in params]), count) - 1
    is_complete = np.array([each.top_k <= count for each in params])
    last = np.where(is_complete, logits[np.arange(len(rows)), at], -np.inf)
    decided = np.maximum(last, np.broadcast_to(floors, (len(rows), 1))[:, 0]) > candidates.lowest[rows]
    found = TopTokens(np.where(is_kept, ids, 0), np.where(is_kept, logits, -np.inf))
    width = int(is_kept.sum(axis=1).max())
    found = TopTokens(found.ids[:, :width], found.logits[:, :width])
    drawn = draw_tokens(found, columns, params, positions)
    return [token if is_decided else UNDECIDED for token, is_decided in zip(drawn, decided.tolist(), strict=True)]
