"""Picks the tokens of one request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from engine.contract import Request, SamplingParams
from engine.sampling.candidates import Candidates, Row, likeliest
from engine.sampling.noise import derive, gumbel, uniform
from engine.sampling.penalties import Dry, penalise_seen
from engine.sampling.truncate import survivors

_COLDEST = 1e-300  # a temperature below would overflow the quotient, and picks no differently
APART = 2**32  # no request has so many choices
_LARGEST = 1e30  # bias: more would overflow float32
_NEVER = np.float32(-np.inf)


class Sampler:
    """The law by which one request's tokens are picked, without any state: a pick depends on the parameters, the
    seed, the row and the history alone, so nothing that was picked before, or was drafted, can change it.

    `ends` are the model's end tokens; `piece` gives the bytes of a token. Token ids in the request are within the
    vocabulary.
    """

    def __init__(self, request: Request, seed: int, ends: frozenset[int], piece: Callable[[int], bytes]) -> None:
        params = request.sampling
        self._params = params
        self._seed = seed
        self._bias = _Bias(params.logit_bias) if params.logit_bias else None
        self._dry = Dry(params, piece) if _dries(params) else None
        self._penalises = _penalises(params)
        self._min_tokens = request.min_tokens
        self._never = ends if request.ignore_eos else frozenset()
        self._not_yet = ends.union(request.stop_tokens)
        self._banned, self._banned_early = _ids(self._never), _ids(self._not_yet)
        self._weighs = bool(self._bias or self._dry or self._penalises)
        self._adjusts = self._weighs or bool(self._never)
        self._apart = _apart(params)

    def apart(self) -> Sampler:
        """The same law with noise that has nothing to do with this one's."""
        other = copy(self)
        other._seed = derive(self._seed, APART)
        return other

    def pick(
        self,
        row: Row,
        history: Sequence[int],
        prompt_length: int,
        forgotten: int = 0,
        permitted: NDArray[np.bool_] | None = None,
    ) -> int:
        """The token after `history`, the prompt and then what was emitted, of which `forgotten` tokens are left out.
        Leaves the row as it was.

        Only one of those `permitted` is picked, [vocabulary]: to all stages there are no others. Bans, and biases that
        come to one, do not count where they would leave none of them.

        Raises BadLogits if the row holds NaN or its maximum is infinite, or if every token is banned.
        """
        position = len(history) + forgotten
        emitted = position - prompt_length
        if permitted is not None:
            row = permitted_of(row, permitted)
        if not self._weighs and (token := self._obvious(row, emitted)) is not None:
            return token
        if self._changes(emitted):
            changed = self._changed(row, history, emitted)
            if permitted is None or changed.max() > -np.inf:
                row = changed
        if self._params.temperature <= 0.0:
            return likeliest(row)
        return self._drawn(survivors(row, self._params, self._excludes(position)), position)

    def _obvious(self, row: Row, emitted: int) -> int | None:
        """What all stages would come to, if it is the likeliest token because no other comes near it; None if that
        takes a closer look. Most rows of most texts are so, and this takes a fraction of the time."""
        token = int(row.argmax())
        peak = row[token]
        if token in (self._not_yet if emitted < self._min_tokens else self._never) or not math.isfinite(peak):
            return None
        if self._params.temperature <= 0.0:
            return token
        if self._apart is None:
            return None
        return token if _second(row, token) < float(peak) + self._apart else None

    def _drawn(self, found: Candidates, position: int) -> int:
        """The law of `engine.sampling.noise`."""
        if len(found.ids) == 1:
            return int(found.ids[0])
        scores = found.logits - found.logits.max()
        scores /= max(self._params.temperature, _COLDEST)
        scores += gumbel(self._seed, position, found.ids)
        return int(found.ids[scores.argmax()])

    def _excludes(self, position: int) -> bool:
        chance = self._params.xtc_probability
        return chance > 0.0 and uniform(self._seed, position) < chance

    def _changes(self, emitted: int) -> bool:
        return self._adjusts or (emitted < self._min_tokens and len(self._banned_early) > 0)

    def _changed(self, row: Row, history: Sequence[int], emitted: int) -> Row:
        """A copy of the row, with bias, penalties and bans."""
        row = row.copy()
        if self._bias is not None:
            self._bias.add(row)
        if self._penalises:
            penalise_seen(row, history, self._params)
        if self._dry is not None:
            self._dry.penalise(row, history)
        row[self._banned_early if emitted < self._min_tokens else self._banned] = -np.inf
        return row


def permitted_of(row: Row, permitted: NDArray[np.bool_]) -> Row:
    """A copy of the row in which all tokens but those `permitted` are banned: few are written, as `np.where` over all
    takes two to three times as long."""
    if 2 * np.count_nonzero(permitted) > len(row):
        made = row.copy()
        made[(~permitted).nonzero()[0]] = _NEVER
        return made
    made = np.full_like(row, _NEVER)
    few = permitted.nonzero()[0]
    made[few] = row[few]
    return made


class _Bias:
    """What is added to the logits of some tokens; what a token is given twice adds up. -inf is a ban."""

    def __init__(self, pairs: Iterable[tuple[int, float]]) -> None:
        sums: dict[int, float] = {}
        for token, value in pairs:
            sums[token] = sums.get(token, 0.0) + value
        self._tokens = _ids(sums)
        values = np.array(list(sums.values()))
        self._values = np.where(np.isneginf(values), values, values.clip(-_LARGEST, _LARGEST))
        assert self._tokens.min() >= 0, "the caller refuses token ids outside the vocabulary"

    def add(self, row: Row) -> None:
        row[self._tokens] = row[self._tokens] + self._values


def _ids(tokens: Iterable[int]) -> NDArray[np.intp]:
    return np.array(list(tokens), np.intp)


def _second(row: Row, token: int) -> float:
    """The highest logit of all tokens but one; -inf if there is no other."""
    if 0 < token < len(row) - 1:
        before, _, after = np.maximum.reduceat(row, (0, token, token + 1)).tolist()
        return float(max(before, after))
    return float(max(row[:token].max(initial=-np.inf), row[token + 1 :].max(initial=-np.inf)))


def _apart(params: SamplingParams) -> float | None:
    """How far below the likeliest token's logit min_p drops all others, if it does and nothing drops the likeliest."""
    if params.min_p <= 0.0 or params.typical_p < 1.0 or params.xtc_probability > 0.0:
        return None
    return math.log(params.min_p)


def _penalises(params: SamplingParams) -> bool:
    neutral = params.repeat_penalty == 1.0 and not params.presence_penalty and not params.frequency_penalty
    return params.repeat_last_n != 0 and not neutral


def _dries(params: SamplingParams) -> bool:
    return params.dry_multiplier > 0.0 and params.dry_penalty_last_n != 0
