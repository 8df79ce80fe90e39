"""Penalties on what would repeat recent tokens, as llama.cpp's samplers define them.

All change a row of logits in place, and look back on the prompt and what was emitted after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from engine.contract import SamplingParams
from engine.sampling.candidates import Row

_HIGHEST = math.log(1e30)  # of a penalty: float32 ends soon after


def recent(history: Sequence[int], last_n: int) -> Sequence[int]:
    """The `last_n` most recent tokens, oldest first; -1 is all of them."""
    return history if last_n < 0 else history[max(0, len(history) - last_n) :]


def penalise_seen(row: Row, history: Sequence[int], params: SamplingParams) -> None:
    """The repeat, frequency and presence penalties on each token seen among the `repeat_last_n` most recent ones.

    The first divides a logit if that is positive and multiplies it if not; the second is subtracted as often as
    the token was seen, the third once.
    """
    seen = np.array(recent(history, params.repeat_last_n), np.intp)
    tokens, counts = np.unique(seen, return_counts=True)
    logits = row[tokens].astype(np.float64)
    repeat = params.repeat_penalty
    logits = np.where(logits > 0.0, logits / repeat, logits * repeat)
    row[tokens] = logits - counts * params.frequency_penalty - params.presence_penalty


class Dry:
    """DRY ("don't repeat yourself", p-e-w 2024): a penalty on each token that would prolong a verbatim repeat.

    If the last n tokens also occur earlier, the token that followed them there loses
    `multiplier * base ** (n - allowed_length)`, once n is at least `allowed_length`; the longest repeat counts. A
    repeat does not reach back over a sequence breaker, and breakers are never penalised. A token is a breaker if
    its bytes contain one of the breaker texts; unlike in llama.cpp, a text that spans several tokens, or is that
    of a control token, is not recognised.
    """

    def __init__(self, params: SamplingParams, piece: Callable[[int], bytes]) -> None:
        self._params = params
        self._piece = piece
        self._texts = tuple(text.encode() for text in params.dry_sequence_breakers if text)
        self._breaks: dict[int, bool] = {}

    def penalise(self, row: Row, history: Sequence[int]) -> None:
        """Subtracts the penalties; costs a time linear in the tokens that it looks back on."""
        shortest = self._params.dry_allowed_length
        tokens = list(recent(history, self._params.dry_penalty_last_n))[::-1]
        repeats = prolonging(tokens, shortest)
        limit = self._unbroken(tokens[: max(repeats.values(), default=0)])
        for token, size in repeats.items():
            if min(size, limit) >= shortest and not self._is_breaker(token):
                row[token] -= self._penalty(min(size, limit))

    def _penalty(self, size: int) -> float:
        params = self._params
        growth = (size - params.dry_allowed_length) * math.log(params.dry_base)
        return math.exp(min(math.log(params.dry_multiplier) + growth, _HIGHEST))

    def _unbroken(self, tokens: Sequence[int]) -> int:
        """How many tokens, from the most recent one on, come before a breaker."""
        return next((at for at, token in enumerate(tokens) if self._is_breaker(token)), len(tokens))

    def _is_breaker(self, token: int) -> bool:
        known = self._breaks.get(token)
        if known is None:
            piece = self._piece(token)
            known = self._breaks[token] = any(text in piece for text in self._texts)
        return known


def prolonging(tokens: Sequence[int], shortest: int) -> dict[int, int]:
    """For each token that would prolong a repeat of the most recent tokens, the length of the longest such repeat.

    `tokens` are the most recent first. Lengths do not count the token itself; those below `shortest` are left out.
    Linear time by the Z-algorithm (Gusfield 1997, section 1.4), like DRY in koboldcpp and llama.cpp.

    >>> prolonging("cbaycbccba", 1)
    {'y': 2, 'b': 1, 'c': 3}
    """
    longest: dict[int, int] = {} if shortest else dict.fromkeys(tokens[:-1], 0)
    total = len(tokens)
    lengths = [0] * total  # of the common beginning of tokens and tokens[at:]
    left = right = 0  # tokens[left:right] begins like tokens itself, and no box before it ends later
    for at in range(1, total):
        if tokens[at] != tokens[0]:
            continue
        length = min(lengths[at - left], right - at) if at < right else 0
        if at + length >= right:
            while at + length < total and tokens[length] == tokens[at + length]:
                length += 1
            left, right = at, at + length
        lengths[at] = length
        if length >= shortest:
            longest[tokens[at - 1]] = max(length, longest.get(tokens[at - 1], 0))
    return longest
