"""The sampler of one request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.contract import Request, SamplingParams
from engine.sampling.candidates import Candidates, Row, argmax_token
from engine.sampling.feedback import AdaptiveP, Mirostat
from engine.sampling.infill import infill
from engine.sampling.noise import derive_seed, gumbel, uniform
from engine.sampling.penalties import DryPenalty, apply_penalties
from engine.sampling.row_maxima import RowMaxima
from engine.sampling.row_picks import UNPICKED, PickParams, pick_params, pick_rows
from engine.sampling.stages import WEIGHING_STAGES, active_stages, has_adaptive_p, run_stages
from engine.sampling.temperature import softmax
from engine.sampling_params import SamplerStage
from engine.text import TokenBytes

# Index of the choice whose seed an independent sampler has. No request has so many choices.
_INDEPENDENT_CHOICE = 2**32
# Maximum absolute bias; a larger one could overflow float32.
_MAX_BIAS = 1e30
# Logit of a token that may not be picked.
_BANNED = np.float32(-np.inf)


class Sampler:
    """Picks the tokens of one request.

    A pick depends only on the parameters, the seed, the row, the history and, with Mirostat or adaptive-p, the
    probabilities of the tokens that `sample` returned. It does not depend on drafts.
    """

    def __init__(self, request: Request, seed: int, ends: frozenset[int], token_bytes: TokenBytes) -> None:
        """`ends` are the model's end tokens. The token ids in the request must be below the size of the vocabulary."""
        params = request.sampling
        self._params = params
        self._seed = seed
        self._token_bytes = token_bytes
        self._end_ids = _token_ids(ends)
        self._bias = _LogitBias(params.logit_bias) if params.logit_bias else None
        stages = active_stages(params)
        self._dry = DryPenalty(params, token_bytes) if "dry" in stages else None
        # Stages that change logits of the whole row, before the first one that selects candidates.
        leading = next((at for at, stage in enumerate(stages) if stage not in WEIGHING_STAGES), len(stages))
        self._leading, self._stages = stages[:leading], stages[leading:]
        self._min_tokens = request.min_tokens
        self._banned_ids = _token_ids(ends if request.ignore_eos else frozenset())
        self._banned_early_ids = _token_ids(ends.union(request.stop_tokens))
        self._has_weights = bool(self._bias or self._leading)
        self.adjusts = self._has_weights or bool(self._min_tokens) or len(self._banned_ids) > 0
        """True if `adjust` may change rows."""
        adjusts_alone = self._has_weights or self._min_tokens or not self.adjusts
        self.only_bans = None if adjusts_alone else self._banned_ids
        """The banned tokens, if `adjust` does the same to all rows. Samplers with the same bans have one object."""
        self._is_greedy = _is_greedy(params, self._stages)
        self._mirostat = Mirostat(params) if params.mirostat and not self._is_greedy else None
        self._adaptive = AdaptiveP(params) if has_adaptive_p(params) and not self._is_greedy else None
        self._feedback = self._mirostat or self._adaptive
        self._pick_params = self._params_of_seed(seed)

    def _params_of_seed(self, seed: int) -> PickParams | None:
        """Returns the parameters of picks that need neither history nor state. None with Mirostat or adaptive-p."""
        if self._feedback is not None:
            return None
        return pick_params(self._params, self._stages, seed, greedy=self._is_greedy)

    def for_drafts(self, *, independent: bool) -> Sampler:
        """Returns a sampler for the draft model, with the same parameters and state, and with the same or independent
        noise."""
        other = copy(self)
        other._dry = None if self._dry is None else self._dry.fork()
        if independent:
            other._seed = derive_seed(self._seed, _INDEPENDENT_CHOICE)
            other._pick_params = self._params_of_seed(other._seed)
        return other

    @property
    def row_params(self) -> PickParams | None:
        """The parameters of `pick_rows` for rows that `adjust` has changed. None if `sample` must pick, from unchanged
        rows."""
        params = self._pick_params
        if params is None or self._dry is not None or (self.adjusts and not params.is_complete):
            return None
        return params

    @property
    def num_candidates(self) -> int:
        """Number of most likely tokens that determine the pick, unless there are ties; 0 if a pick needs all logits."""
        params = self.row_params
        if params is None or self._has_weights or not (params.top_k or self._is_greedy):
            return 0
        bans = max(len(self._banned_ids), len(self._banned_early_ids) if self._min_tokens else 0)
        return max(1, params.top_k) + bans + 1

    def adjust(self, row: Row, history: Sequence[int], emitted: int) -> None:
        """Applies bias, penalties and bans to a row in place, for a pick after `history` with `emitted` tokens."""
        if self._bias is not None:
            self._bias.add(row)
        for stage in self._leading:
            self._weigh(stage, row, history)
        row[self.bans(emitted)] = _BANNED

    def bans(self, emitted: int) -> NDArray[np.intp]:
        """Returns the tokens that may not follow `emitted` tokens."""
        return self._banned_early_ids if emitted < self._min_tokens else self._banned_ids

    def sample(
        self,
        row: Row,
        history: Sequence[int],
        prompt_length: int,
        discarded: int = 0,
        permitted: NDArray[np.bool_] | None = None,
    ) -> int:
        """Returns `pick` of the arguments, and advances the state of Mirostat or adaptive-p by the token."""
        token, probability = self._pick(row, history, prompt_length, discarded, permitted)
        if self._feedback is not None:
            self._feedback.advance(probability)
        return token

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
        return self._pick(row, history, prompt_length, discarded, permitted)[0]

    def candidates(
        self,
        row: Row,
        history: Sequence[int],
        prompt_length: int,
        discarded: int = 0,
        permitted: NDArray[np.bool_] | None = None,
    ) -> Candidates:
        """Returns the tokens that `pick` draws from with the same arguments. The softmax of their logits is the
        distribution. Raises BadLogits."""
        position = len(history) + discarded
        if permitted is not None:
            row = mask_row(row, permitted)
        row = self._weighted(row, history, position - prompt_length, masked=permitted is not None)
        if self._is_greedy:
            return Candidates(np.array([argmax_token(row)]), np.zeros(1))
        return self._distribution(row, history, position)

    def _pick(
        self,
        row: Row,
        history: Sequence[int],
        prompt_length: int,
        discarded: int,
        permitted: NDArray[np.bool_] | None,
    ) -> tuple[int, float]:
        """Returns the next token, and the probability by which the state of Mirostat or adaptive-p advances."""
        position = len(history) + discarded
        if permitted is not None:
            row = mask_row(row, permitted)
        row = self._weighted(row, history, position - prompt_length, masked=permitted is not None)
        if self._pick_params is not None:
            token = pick_rows(RowMaxima(row[None]), [self._pick_params], [position])[0]
            if token != UNPICKED:
                return token, 1.0
        if self._is_greedy:
            return argmax_token(row), 1.0
        found = self._distribution(row, history, position)
        at = self._draw(found, position)
        return int(found.ids[at]), self._probability(found, at)

    def _distribution(self, row: Row, history: Sequence[int], position: int) -> Candidates:
        """Returns the candidates of a weighted row after all stages, with logits less their maximum."""
        if self._mirostat is not None:
            return self._mirostat.select(row)

        def run_other(stage: SamplerStage, found: Candidates) -> Candidates:
            if stage == "infill":
                return infill(found, row, self._end_ids, self._token_bytes)
            weighed = np.full(len(row), _BANNED)
            weighed[found.ids] = found.logits
            self._weigh(stage, weighed, history)
            return Candidates(found.ids, weighed[found.ids].astype(np.float64))

        stages = self._stages
        if "xtc" in stages and uniform(self._seed, position) >= self._params.xtc_probability:
            stages = tuple(stage for stage in stages if stage != "xtc")
        found = run_stages(row, self._params, stages, run_other)
        if self._adaptive is not None:
            found = self._adaptive.reshape(found)
        return found._replace(logits=found.logits - found.logits.max())

    def _draw(self, found: Candidates, position: int) -> int:
        """Returns the index of the candidate that the formula in `engine.sampling.noise` picks."""
        if len(found.ids) == 1:
            return 0
        return int((found.logits + gumbel(self._seed, position, found.ids)).argmax())

    def _probability(self, found: Candidates, at: int) -> float:
        if self._feedback is None:
            return 1.0
        return float((softmax(found.logits) if found.probabilities is None else found.probabilities)[at])

    def _weighted(self, row: Row, history: Sequence[int], emitted: int, *, masked: bool) -> Row:
        """Returns the row with bias, penalties and bans applied, unless these leave no token of a `masked` row."""
        if not self._has_weights and not len(self.bans(emitted)):
            return row
        adjusted = row.copy()
        self.adjust(adjusted, history, emitted)
        return adjusted if not masked or adjusted.max() > -np.inf else row

    def _weigh(self, stage: SamplerStage, row: Row, history: Sequence[int]) -> None:
        """Applies the penalties or DRY to the row in place."""
        if stage == "penalties":
            apply_penalties(row, history, self._params)
        elif self._dry is not None:
            self._dry.apply(row, history)


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
        self._tokens = np.array(list(sums), np.intp)
        values = np.array(list(sums.values()))
        self._values = np.where(np.isneginf(values), values, values.clip(-_MAX_BIAS, _MAX_BIAS))
        assert self._tokens.min() >= 0, "requests with token ids outside the vocabulary are refused earlier"

    def add(self, row: Row) -> None:
        row[self._tokens] = row[self._tokens] + self._values


@lru_cache(64)
def _token_ids(tokens: frozenset[int]) -> NDArray[np.intp]:
    return np.array(list(tokens), np.intp)


def _is_greedy(params: SamplingParams, stages: Sequence[SamplerStage]) -> bool:
    """Returns True if the temperature leaves only the most likely token of a weighted row."""
    if params.temperature > 0.0:
        return False
    has_stage = "temperature" in stages and params.dynatemp_range <= 0.0 and WEIGHING_STAGES.isdisjoint(stages)
    return has_stage or bool(params.mirostat)
