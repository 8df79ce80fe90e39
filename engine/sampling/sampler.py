"""The sampler of one request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from engine.contract import Request, SamplingParams
from engine.sampling.candidates import Candidates, Row, argmax_token
from engine.sampling.noise import derive_seed, gumbel, uniform
from engine.sampling.penalties import DryPenalty, apply_penalties
from engine.sampling.truncate import truncate
from engine.text import TokenBytes

# Minimum divisor of logits. Division by a lower temperature would overflow, and would give the same picks.
_MIN_TEMPERATURE = 1e-300
# Index of the choice whose seed an independent sampler has. No request has so many choices.
_INDEPENDENT_CHOICE = 2**32
# Maximum absolute bias; a larger one could overflow float32.
_MAX_BIAS = 1e30
_BANNED = np.float32(-np.inf)


class Sampler:
    """Picks the tokens of one request.

    A sampler has no mutable state: a pick depends only on the parameters, the seed, the row and the history, not on
    earlier picks or drafts.
    """

    def __init__(self, request: Request, seed: int, ends: frozenset[int], token_bytes: TokenBytes) -> None:
        """`ends` are the model's end tokens. The token ids in the request must be below the size of the vocabulary."""
        params = request.sampling
        self._params = params
        self._seed = seed
        self._bias = _LogitBias(params.logit_bias) if params.logit_bias else None
        self._dry = DryPenalty(params, token_bytes) if _has_dry(params) else None
        self._has_penalties = _has_penalties(params)
        self._min_tokens = request.min_tokens
        self._banned = ends if request.ignore_eos else frozenset()
        self._banned_early = ends.union(request.stop_tokens)
        self._banned_ids, self._banned_early_ids = _ids(self._banned), _ids(self._banned_early)
        self._has_weights = bool(self._bias or self._dry or self._has_penalties)
        self._min_p_log = _only_min_p(params)

    def independent(self) -> Sampler:
        """Returns a sampler with the same parameters and independent noise."""
        other = copy(self)
        other._seed = derive_seed(self._seed, _INDEPENDENT_CHOICE)
        return other

    def pick(
        self,
        row: Row,
        history: Sequence[int],
        prompt_length: int,
        discarded: int = 0,
        permitted: NDArray[np.bool_] | None = None,
    ) -> int:
        """Returns the next token. `history` is the prompt and the emitted tokens, without the `discarded` tokens that
        context shifts removed.

        Does not change `row`. All stages treat tokens outside of the mask `permitted`, [vocabulary], as banned. Bias,
        penalties and bans are ignored if they would leave no permitted token. Raises BadLogits if the row contains NaN,
        if its maximum is infinite, or if every token is banned.
        """
        position = len(history) + discarded
        emitted = position - prompt_length
        if permitted is not None:
            row = mask_row(row, permitted)
        if not self._has_weights and (token := self._dominant(row, emitted)) is not None:
            return token
        row = self._weighted(row, history, emitted, masked=permitted is not None)
        if self._params.temperature <= 0.0:
            return argmax_token(row)
        return self._draw(truncate(row, self._params, self._applies_xtc(position)), position)

    def candidates(
        self,
        row: Row,
        history: Sequence[int],
        prompt_length: int,
        discarded: int = 0,
        permitted: NDArray[np.bool_] | None = None,
    ) -> Candidates:
        """Returns the tokens that `pick` draws from with the same arguments. Their logits are divided by the
        temperature, so that their softmax is the distribution. Raises BadLogits."""
        position = len(history) + discarded
        if permitted is not None:
            row = mask_row(row, permitted)
        row = self._weighted(row, history, position - prompt_length, masked=permitted is not None)
        if self._params.temperature <= 0.0:
            return Candidates(np.array([argmax_token(row)]), np.zeros(1))
        found = truncate(row, self._params, self._applies_xtc(position))
        return Candidates(found.ids, self._scores(found))

    def _dominant(self, row: Row, emitted: int) -> int | None:
        """Returns the most likely token if it is certainly picked: at temperature 0, or if min_p drops all other
        tokens.

        Returns None if the token is banned or the stages must decide. Most rows of most outputs have a dominant token,
        which takes a fraction of the time of all stages.
        """
        token = int(row.argmax())
        peak = row[token]
        banned = self._banned_early if emitted < self._min_tokens else self._banned
        if token in banned or not math.isfinite(peak):
            return None
        if self._params.temperature <= 0.0:
            return token
        if self._min_p_log is None:
            return None
        return token if _second_highest(row, token) < float(peak) + self._min_p_log else None

    def _draw(self, found: Candidates, position: int) -> int:
        """Returns the token that the formula in `engine.sampling.noise` picks."""
        if len(found.ids) == 1:
            return int(found.ids[0])
        scores = self._scores(found)
        scores += gumbel(self._seed, position, found.ids)
        return int(found.ids[scores.argmax()])

    def _scores(self, found: Candidates) -> NDArray[np.float64]:
        """Returns the logits less their maximum, divided by the temperature."""
        scores: NDArray[np.float64] = found.logits - found.logits.max()
        scores /= max(self._params.temperature, _MIN_TEMPERATURE)
        return scores

    def _applies_xtc(self, position: int) -> bool:
        chance = self._params.xtc_probability
        return chance > 0.0 and uniform(self._seed, position) < chance

    def _adjusts(self, emitted: int) -> bool:
        banned = self._banned_early if emitted < self._min_tokens else self._banned
        return self._has_weights or bool(banned)

    def _weighted(self, row: Row, history: Sequence[int], emitted: int, *, masked: bool) -> Row:
        """Returns the row with bias, penalties and bans applied, unless these leave no token of a `masked` row."""
        if not self._adjusts(emitted):
            return row
        adjusted = self._adjusted(row, history, emitted)
        return adjusted if not masked or adjusted.max() > -np.inf else row

    def _adjusted(self, row: Row, history: Sequence[int], emitted: int) -> Row:
        """Returns a copy of the row with bias, penalties and bans applied."""
        row = row.copy()
        if self._bias is not None:
            self._bias.add(row)
        if self._has_penalties:
            apply_penalties(row, history, self._params)
        if self._dry is not None:
            self._dry.apply(row, history)
        row[self._banned_early_ids if emitted < self._min_tokens else self._banned_ids] = _BANNED
        return row


def mask_row(row: Row, permitted: NDArray[np.bool_]) -> Row:
    """Returns a copy of the row in which all tokens except the `permitted` ones are banned.

    Writes either the permitted or the other tokens, whichever are fewer: `np.where` over all takes two to three times
    as long.
    """
    if 2 * np.count_nonzero(permitted) > len(row):
        masked = row.copy()
        masked[(~permitted).nonzero()[0]] = _BANNED
        return masked
    masked = np.full_like(row, _BANNED)
    ids = permitted.nonzero()[0]
    masked[ids] = row[ids]
    return masked


class _LogitBias:
    """The `logit_bias` of a request: values that are added to logits. Several values of one token add up, and -inf bans
    the token."""

    def __init__(self, pairs: Iterable[tuple[int, float]]) -> None:
        sums: dict[int, float] = {}
        for token, value in pairs:
            sums[token] = sums.get(token, 0.0) + value
        self._tokens = _ids(sums)
        values = np.array(list(sums.values()))
        self._values = np.where(np.isneginf(values), values, values.clip(-_MAX_BIAS, _MAX_BIAS))
        assert self._tokens.min() >= 0, "requests with token ids outside the vocabulary are refused earlier"

    def add(self, row: Row) -> None:
        row[self._tokens] = row[self._tokens] + self._values


def _ids(tokens: Iterable[int]) -> NDArray[np.intp]:
    return np.array(list(tokens), np.intp)


def _second_highest(row: Row, token: int) -> float:
    """Returns the highest logit of all tokens except `token`; -inf if there is no other token."""
    if 0 < token < len(row) - 1:
        before, _, after = np.maximum.reduceat(row, (0, token, token + 1)).tolist()
        return float(max(before, after))
    return float(max(row[:token].max(initial=-np.inf), row[token + 1 :].max(initial=-np.inf)))


def _only_min_p(params: SamplingParams) -> float | None:
    """Returns log(min_p): min_p drops the tokens whose logit is below the maximum plus this value.

    Returns None if min_p is off, or if another stage can drop the most likely token.
    """
    if params.min_p <= 0.0 or params.typical_p < 1.0 or params.xtc_probability > 0.0:
        return None
    return math.log(params.min_p)


def _has_penalties(params: SamplingParams) -> bool:
    neutral = params.repeat_penalty == 1.0 and not params.presence_penalty and not params.frequency_penalty
    return params.repeat_last_n != 0 and not neutral


def _has_dry(params: SamplingParams) -> bool:
    return params.dry_multiplier > 0.0 and params.dry_penalty_last_n != 0
