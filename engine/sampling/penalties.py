"""Penalties on tokens that would repeat recent tokens, as llama.cpp's samplers define them.

The functions change a row of logits in place. The history consists of the prompt and the emitted tokens, as in
llama-server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from engine.contract import SamplingParams
from engine.sampling.candidates import Row
from engine.text import TokenBytes

# Logarithm of the maximum penalty; float32 overflows at 3e38.
_MAX_LOG_PENALTY = math.log(1e30)


def last_tokens(history: Sequence[int], last_n: int) -> Sequence[int]:
    """Returns the `last_n` most recent tokens of `history`, oldest first. -1 means all tokens."""
    return history if last_n < 0 else history[max(0, len(history) - last_n) :]


def apply_penalties(row: Row, history: Sequence[int], params: SamplingParams) -> None:
    """Applies the repeat, frequency and presence penalties to the tokens among the `repeat_last_n` most recent ones.

    A positive logit is divided by the repeat penalty, any other logit is multiplied by it. The frequency penalty is
    subtracted once for each occurrence of the token, the presence penalty once.
    """
    seen = np.array(last_tokens(history, params.repeat_last_n), np.intp)
    tokens, counts = np.unique(seen, return_counts=True)
    logits = row[tokens].astype(np.float64)
    repeat = params.repeat_penalty
    logits = np.where(logits > 0.0, logits / repeat, logits * repeat)
    row[tokens] = logits - counts * params.frequency_penalty - params.presence_penalty


class DryPenalty:
    """DRY ("don't repeat yourself", p-e-w 2024): a penalty on each token that would extend a verbatim repeat.

    If the last n tokens also occur earlier, and n is at least `allowed_length`, then
    `multiplier * base ** (n - allowed_length)` is subtracted from the logit of the token that followed them there. For
    each token the longest repeat counts. A repeat ends at a sequence breaker, and breakers are never penalised.

    A token is a breaker if its bytes contain one of the breaker texts. Unlike in llama.cpp, a breaker text is not
    recognised if it spans several tokens or is the text of a control token.
    """

    def __init__(self, params: SamplingParams, token_bytes: TokenBytes) -> None:
        self._params = params
        self._token_bytes = token_bytes
        self._texts = tuple(text.encode() for text in params.dry_sequence_breakers if text)
        self._breakers: dict[int, bool] = {}

    def apply(self, row: Row, history: Sequence[int]) -> None:
        """Subtracts the penalties from `row`, in time linear in `dry_penalty_last_n`."""
        shortest = self._params.dry_allowed_length
        tokens = list(last_tokens(history, self._params.dry_penalty_last_n))[::-1]
        repeats = repeat_lengths(tokens, shortest)
        limit = self._unbroken(tokens[: max(repeats.values(), default=0)])
        for token, size in repeats.items():
            if min(size, limit) >= shortest and not self._is_breaker(token):
                row[token] -= self._penalty(min(size, limit))

    def _penalty(self, size: int) -> float:
        params = self._params
        growth = (size - params.dry_allowed_length) * math.log(params.dry_base)
        return math.exp(min(math.log(params.dry_multiplier) + growth, _MAX_LOG_PENALTY))

    def _unbroken(self, tokens: Sequence[int]) -> int:
        """Returns the number of tokens before the first breaker. `tokens` are ordered from the most recent one."""
        return next((at for at, token in enumerate(tokens) if self._is_breaker(token)), len(tokens))

    def _is_breaker(self, token: int) -> bool:
        known = self._breakers.get(token)
        if known is None:
            content = self._token_bytes(token)
            known = self._breakers[token] = any(text in content for text in self._texts)
        return known


def repeat_lengths(tokens: Sequence[int], shortest: int) -> dict[int, int]:
    """Returns, for each token that would extend a repeat of the most recent tokens, the length of the longest repeat.

    `tokens` are ordered from the most recent one. A length does not include the extending token. Lengths below
    `shortest` are left out. The Z-algorithm (Gusfield 1997, section 1.4) takes linear time; koboldcpp and llama.cpp use
    it for DRY too.

    >>> repeat_lengths("cbaycbccba", 1)
    {'y': 2, 'b': 1, 'c': 3}
    """
    longest: dict[int, int] = {} if shortest else dict.fromkeys(tokens[:-1], 0)
    total = len(tokens)
    # lengths[at] is the length of the common prefix of tokens and tokens[at:].
    lengths = [0] * total
    # tokens[left:right] is the match with a prefix of tokens, among those found so far, that ends last.
    left = right = 0
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
