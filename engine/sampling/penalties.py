"""Penalties on tokens that would repeat recent tokens, as llama.cpp's samplers define them.

The functions change a row of logits in place. The history consists of the prompt and the emitted tokens, as in
llama-server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.contract import SamplingParams
from engine.sampling.candidates import Row
from engine.sampling.repeats import RepeatLengths, last_tokens
from engine.text import TokenBytes

# Logarithm of the maximum penalty; float32 overflows at 3e38.
_MAX_LOG_PENALTY = math.log(1e30)


def apply_penalties(row: Row, history: Sequence[int], params: SamplingParams) -> None:
    """Applies the repeat, frequency and presence penalties to the tokens among the `repeat_last_n` most recent ones.

    A positive logit is divided by the repeat penalty, any other logit is multiplied by it. The frequency penalty is
    subtracted once for each occurrence of the token, the presence penalty once.
    """
    seen = np.array(last_tokens(history, params.repeat_last_n), np.intp)
    occurrences = np.bincount(seen, minlength=1)
    tokens = occurrences.nonzero()[0]
    logits = row[tokens].astype(np.float64)
    repeat = params.repeat_penalty
    logits = np.where(logits > 0.0, logits / repeat, logits * repeat)
    row[tokens] = logits - occurrences[tokens] * params.frequency_penalty - params.presence_penalty


class DryPenalty:
    """DRY ("don't repeat yourself", p-e-w 2024): a penalty on each token that would extend a verbatim repeat.

    If the last n tokens also occur earlier, and n is at least `allowed_length`, then
    `multiplier * base ** (n - allowed_length)` is subtracted from the logit of the token that followed them there. For
    each token the longest repeat counts. A repeat ends at a sequence breaker, and breakers are never penalised.

    A token is a breaker if its bytes contain one of the breaker texts. Unlike in llama.cpp, a breaker text is not
    recognised if it spans several tokens or is the text of a control token.
    """

    def __init__(self, params: SamplingParams, token_bytes: TokenBytes, origin: DryPenalty | None = None) -> None:
        self._params = params
        self._token_bytes = token_bytes
        self._texts = tuple(text.encode() for text in params.dry_sequence_breakers if text)
        self._breakers: dict[int, bool] = {} if origin is None else origin._breakers
        # Scratch space: index of the longest repeat by token.
        self._winners = np.zeros(0, np.intp)
        known: RepeatLengths | None = None if origin is None else origin._repeats
        self._repeats: RepeatLengths = RepeatLengths(params.dry_penalty_last_n, self._is_breaker, known)

    def fork(self) -> DryPenalty:
        """Returns a penalty with the same parameters, for histories that continue the history of this one."""
        return DryPenalty(self._params, self._token_bytes, self)

    def apply(self, row: Row, history: Sequence[int]) -> None:
        """Subtracts the penalties from `row`.

        If `history` continues that of the last call, the time is a few vectorised passes over `dry_penalty_last_n`.
        """
        self._repeats.update(history)
        shortest, limit = self._params.dry_allowed_length, self._repeats.unbroken
        if limit < shortest:
            return
        tokens, lengths = self._longest(*self._repeats.continuations(shortest), len(row))
        penalised = ~np.array([self._is_breaker(token) for token in tokens.tolist()], np.bool_)
        tokens = tokens[penalised]
        row[tokens] = row[tokens] - self._penalties(np.minimum(lengths[penalised], limit))

    def _longest(
        self, tokens: NDArray[np.int32], lengths: NDArray[np.int32], vocabulary: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns each token once, with its greatest length."""
        if len(self._winners) != vocabulary:
            self._winners = np.zeros(vocabulary, np.intp)
        order = lengths.argsort(kind="stable")
        self._winners[tokens[order]] = order  # of several values for one index the last is kept
        wins = self._winners[tokens] == np.arange(len(tokens))
        return tokens[wins], lengths[wins]

    def _penalties(self, sizes: NDArray[np.int32]) -> NDArray[np.float64]:
        params = self._params
        growth = (sizes - params.dry_allowed_length) * math.log(params.dry_base)
        penalties: NDArray[np.float64] = np.exp(np.minimum(math.log(params.dry_multiplier) + growth, _MAX_LOG_PENALTY))
        return penalties

    def _is_breaker(self, token: int) -> bool:
        known = self._breakers.get(token)
        if known is None:
            content = self._token_bytes(token)
            known = self._breakers[token] = any(text in content for text in self._texts)
        return known
