"""Picks the tokens of all rows of a step in one pass of array operations, for the most common parameters.

The picks are those of the stages in `engine.sampling.stages`, to the bit: the same operations in the same order on each
row. Sums over the candidates of a row are cumulative, so they do not depend on the other rows. One or two rows are
picked by scalar operations, which take less time, unless their rounding errors could change the pick.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.sampling.candidates import lowest_within
from engine.sampling.noise import gumbel_few, gumbel_rows, seed_key
from engine.sampling.row_maxima import RowMaxima
from engine.sampling.stages import only_min_p, reach_of
from engine.sampling.temperature import MIN_TEMPERATURE
from engine.sampling_params import SamplerStage, SamplingParams

# The stages of common parameters, which have no other order.
_COMMON_STAGES: tuple[SamplerStage, ...] = ("top_k", "top_p", "min_p", "temperature")
# Common parameters have at most this `top_k`, so that few columns contain two of the top tokens.
_MAX_TOP_K = 256
# One value for all rows, or [rows, 1].
_Column = Any

# Up to this number of rows are drawn one by one, which is then faster.
_MAX_SINGLE_ROWS = 2
# Stands for the token of a row from which `pick_rows` picks none.
UNPICKED = -1
# Stands for the token of a row if rounding errors or tokens that were not considered could change the pick.
_CLOSE = -3
# Exceeds the rounding errors of scores and the relative ones of sums, by scalar and by array operations.
_MARGIN = 1e-9
# Mass of `top_k` tokens that are just likely enough to be considered at first, where the most likely token has 1.
_FAR_MASS = 0.03
# Up to `top_k` times this many tokens are sorted; for more, a closer bound takes less time.
_NEAR_TOKENS_FACTOR = 4


class PickParams(NamedTuple):
    """Parameters of a pick that depends only on the row, the seed and the position."""

    dominance: float
    """Tokens with logits below the maximum plus this are not picked, except the most likely one: log(min_p), infinite
    for a greedy pick, or -inf."""
    top_k: int
    """0 if only a dominant token can be picked."""
    top_p: float
    """Infinite without this stage."""
    temperature: float
    reach: float
    """Tokens with a logit further than this below the maximum do not affect the pick."""
    key: int
    """`seed_key` of the seed."""

    @property
    def is_complete(self) -> bool:
        """True if a token is picked from every row with a finite maximum."""
        return bool(self.top_k) or self.dominance == math.inf


_GREEDY = PickParams(math.inf, 0, 1.0, 1.0, 0.0, 0)


def pick_params(params: SamplingParams, stages: Sequence[SamplerStage], seed: int, *, greedy: bool) -> PickParams:
    """Returns the parameters for `pick_rows`, given the active stages, or those of a greedy pick."""
    if greedy:
        return _GREEDY
    dominance = only_min_p(params, stages)
    if not _is_common(params, stages):
        return _GREEDY._replace(dominance=dominance)
    return PickParams(
        dominance,
        params.top_k,
        params.top_p if "top_p" in stages else math.inf,
        max(params.temperature, MIN_TEMPERATURE) if "temperature" in stages else 1.0,
        reach_of(params, stages),
        seed_key(seed),
    )


def _is_common(params: SamplingParams, stages: Sequence[SamplerStage]) -> bool:
    in_order = tuple(stage for stage in _COMMON_STAGES if stage in stages) == tuple(stages)
    is_plain = params.min_keep <= 1 and params.dynatemp_range <= 0.0
    return in_order and is_plain and stages[:1] == ("top_k",) and 0 < params.top_k <= _MAX_TOP_K


def pick_rows(maxima: RowMaxima, params: Sequence[PickParams | None], positions: Sequence[int]) -> list[int]:
    """Returns the token of each row, given its parameters and the number of tokens before it.

    The token is `UNPICKED` for a row without parameters, for one whose maximum is NaN or infinite, and without `top_k`
    for one without a dominant token.
    """
    if len(params) <= _MAX_SINGLE_ROWS:
        singles = [_pick_single(maxima, row, params[row], positions[row]) for row in range(len(params))]
        if _CLOSE not in singles:
            return singles
    most_likely, highest, second = maxima.peaks
    is_finite = np.isfinite(highest)
    dominance = np.array([-math.inf if each is None else each.dominance for each in params])
    dominated = second < np.where(is_finite, highest, 0.0) + dominance
    tokens: list[int] = np.where(is_finite & dominated, most_likely, UNPICKED).tolist()
    others = (is_finite & ~dominated).nonzero()[0].tolist()
    if rows := [row for row in others if (each := params[row]) is not None and each.top_k]:
        drawn_params = [each for row in rows if (each := params[row])]
        columns = ParamColumns.of(drawn_params)
        found = _top_tokens(maxima, rows, columns.top_ks, columns.reaches)
        drawn = draw_tokens(found, columns, drawn_params, [positions[row] for row in rows])
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def _pick_single(maxima: RowMaxima, row: int, params: PickParams | None, position: int) -> int:
    """Returns the token of one row, or `_CLOSE`, by few calls of numpy. These take most of the time for few rows, as a
    decode displaces numpy's code from the CPU's caches."""
    if params is None:
        return UNPICKED
    logits = maxima.logits[row]
    token = int(logits.argmax())
    highest = logits.item(token)
    if not math.isfinite(highest):
        return UNPICKED
    if params.dominance == math.inf:
        return token
    if not params.top_k:
        return token if maxima.peaks.second.item(row) < highest + params.dominance else UNPICKED
    near = math.log(params.top_k / _FAR_MASS)
    if params.dominance >= -near:
        ids = (logits >= lowest_within(highest, near)).nonzero()[0]
        if len(ids) <= _NEAR_TOKENS_FACTOR * params.top_k:
            far_mass = max(0.0, 1.0 - len(ids) / params.top_k) * _FAR_MASS
            if (token := _draw_single(params, position, ids, logits[ids].tolist(), far_mass)) != _CLOSE:
                return token
    ids = (logits >= max(lowest_within(highest, params.reach), maxima.bound(row, params.top_k))).nonzero()[0]
    return _draw_single(params, position, ids, logits[ids].tolist(), 0.0)


def _draw_single(
    params: PickParams, position: int, ids: NDArray[np.intp], logits: Sequence[float], far_mass: float
) -> int:
    """Returns the token drawn from `ids`, ordered by id, or `_CLOSE`. Other tokens of the top k have together at most
    `far_mass`, where the most likely token has 1."""
    highest = max(logits)
    likely = min(sum([logit >= highest + params.dominance for logit in logits]), params.top_k)
    if likely == 1:
        return ids.item(logits.index(highest))
    order = sorted(range(len(logits)), key=logits.__getitem__, reverse=True)[: params.top_k]
    weights = [math.exp(logits[at] - highest) for at in order]
    total, kept, mass = sum(weights), 1, 1.0
    while kept < likely and mass < params.top_p * total * (1.0 - _MARGIN):
        mass += weights[kept]
        kept += 1
    if kept < likely and mass < params.top_p * (total + far_mass) * (1.0 + _MARGIN):
        return _CLOSE
    candidates = [ids.item(at) for at in order[:kept]]
    noise = gumbel_few(params.key, position, candidates)
    scores = [(logits[at] - highest) / params.temperature + each for at, each in zip(order, noise, strict=False)]
    best = max(scores)
    return candidates[scores.index(best)] if sum([score > best - _MARGIN for score in scores]) == 1 else _CLOSE


class TopTokens(NamedTuple):
    """The most likely tokens of each row, most likely first."""

    ids: NDArray[np.intp]
    """[rows, maximum count]; 0 after the last token of a row."""
    logits: NDArray[np.float64]
    """[rows, maximum count]; -inf after the last token of a row."""


class ParamColumns(NamedTuple):
    """The parameters of rows, each as a scalar if all rows have the same value, else as a column."""

    dominances: _Column
    top_ks: _Column
    top_ps: _Column
    temperatures: _Column
    reaches: _Column

    @classmethod
    def of(cls, params: Sequence[PickParams]) -> ParamColumns:
        """Returns the columns of the parameters of rows."""
        columns = zip(*(each[:-1] for each in params), strict=True)
        return cls(*(np.array(column)[:, None] if len(set(column)) > 1 else column[0] for column in columns))


def draw_tokens(
    found: TopTokens, columns: ParamColumns, params: Sequence[PickParams], positions: Sequence[int]
) -> list[int]:
    """Returns a token of each row of `found`, drawn with the noise of the row's seed and position.

    `found` has no tokens beyond the row's `top_k` and `reach`. `columns` are those of `params`.
    """
    distances = found.logits - found.logits[:, :1]
    held = np.exp(distances).cumsum(axis=1)
    counts = (held < columns.top_ps * held[:, -1:]).sum(axis=1) + 1
    counts = np.minimum(counts, (found.logits >= found.logits[:, :1] + columns.dominances).sum(axis=1))
    max_count = int(counts.max())
    ids, scores = found.ids[:, :max_count], distances[:, :max_count] / columns.temperatures
    scores += gumbel_rows([each.key for each in params], positions, ids)
    if len(counts) > 1:
        scores[np.arange(max_count) >= counts[:, None]] = -np.inf
    return [row[at] for row, at in zip(ids.tolist(), scores.argmax(axis=1).tolist(), strict=True)]


def _top_tokens(maxima: RowMaxima, rows: Sequence[int], ks: _Column, reaches: _Column) -> TopTokens:
    """Returns the `ks` most likely tokens of each of `rows`, without those further below the maximum than `reaches`."""
    columns = maxima.columns if len(rows) == len(maxima.columns) else maxima.columns[rows]
    within = lowest_within(maxima.peaks.highest[rows, None], reaches)
    lowest = np.maximum(within, _kth_largest(columns, ks)).astype(np.float32)
    parts, searched = np.divmod((columns >= lowest).ravel().nonzero()[0], columns.shape[1])
    numbers = np.array(rows)
    logits = maxima.columns_at(numbers[parts], searched)
    # Methods of flat arrays take half of the time of those of matrices.
    at, line = np.divmod((logits >= lowest[parts]).ravel().nonzero()[0], logits.shape[1])
    found = line * maxima.width + searched[at]
    parts, ids = _by_logit(parts[at], logits[at, line], found, maxima.logits.shape[1])
    ranks = np.arange(len(ids)) - parts.searchsorted(np.arange(len(rows)))[parts]
    kept = (ranks < (ks if isinstance(ks, int) else ks[parts, 0])).nonzero()[0]
    parts, ranks, ids = parts[kept], ranks[kept], ids[kept]
    shape = len(rows), int(ranks.max()) + 1
    padded = TopTokens(np.zeros(shape, np.intp), np.full(shape, -np.inf))
    padded.ids[parts, ranks], padded.logits[parts, ranks] = ids, maxima.logits[numbers[parts], ids]
    return padded


def _by_logit(
    parts: NDArray[np.intp], logits: NDArray[np.float32], ids: NDArray[np.intp], vocabulary: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Returns parts and ids by ascending part, descending logit and ascending id.

    One integer per token is sorted, with the bits of the part above those of the negative logit and the id, in a tenth
    of the time of `np.lexsort`.
    """
    id_bits = vocabulary.bit_length()
    keys = (parts << 32) + ordered_bits(0.0 - logits) << id_bits | ids
    keys.sort()
    return (keys + (1 << 31 + id_bits)) >> 32 + id_bits, keys & (1 << id_bits) - 1


def ordered_bits(numbers: NDArray[np.float32]) -> NDArray[np.int64]:
    """Returns integers of 32 bits with a sign, in the order of numbers that are not NaN. 0.0 comes after -0.0."""
    bits = numbers.view(np.int32).astype(np.int64)
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _kth_largest(columns: NDArray[np.float32], ks: _Column) -> _Column:
    """Returns the k-th largest number of each row of `columns`; -inf if there are no more than k columns."""
    width = columns.shape[1]
    if isinstance(ks, int):
        return np.partition(columns, width - ks, axis=1)[:, width - ks, None] if ks < width else -math.inf
    found = np.full(ks.shape, -np.inf)
    for k in {each for each in ks[:, 0].tolist() if each < width}:
        same = (ks[:, 0] == k).nonzero()[0]
        found[same] = np.partition(columns[same], width - k, axis=1)[:, width - k, None]
    return found
