"""`prediction`: the text that the client expects, sent as OpenAI's `prediction`, mostly a file that is to be edited.

The output is followed in it, and what comes next there is the draft. Where the output says something else, it may
have replaced a token, put some in or left some out: the place is found again by what was generated last.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from engine.speculate.base import NO_DRAFT, Draft

SYNC_LONG = 8
"""Tokens that are compared at most: more of them equal say no more about the place."""
SYNC_SHORT = 2
"""Tokens that must be equal. One would be found everywhere, three are found a step later and hardly more surely."""
AHEAD = 4096
"""Places at most so far after the old one: the index need not know more, and a long prediction holds nobody up."""
NEAR = 8
"""Places that are compared before the old one and after it, so that a miss has a bounded cost in any text."""


class Prediction:
    """The `prediction` proposer of a request whose prompt has `prompt_length` tokens; what follows is its output.

    The *place* is how many tokens of `predicted` the output has come past, 0 at first. For each token of the output:

    - If it stands at the place, the place moves behind it.
    - Else it is a miss. If the last `SYNC_SHORT` tokens of the output stand in `predicted`, the place is behind them,
      and the misses are over. Of several such places, `NEAR` before the old one and `NEAR` at or up to `AHEAD`
      after it count; first, the output's last tokens, up to `SYNC_LONG`, agree there for longest; then it is at or
      after the old one; then it is nearest.
    - Else, if the token before was no miss, the place moves on by one, as if the token had replaced the one there.

    What stands from the place on is the draft, at most `n_max` tokens; after two misses in a row there is none.
    Prompt tokens that are edited away make the prompt shorter.
    """

    def __init__(self, predicted: Sequence[int], prompt_length: int, *, n_max: int = 64) -> None:
        self._predicted = list(predicted)
        self._prompt_length = prompt_length
        self._n_max = n_max
        self._ends: dict[tuple[int, ...], list[int]] = {}
        """For each run of `SYNC_SHORT` tokens of the prediction's first `_indexed` where it ends, in order."""
        self._indexed = SYNC_SHORT - 1
        self._prompt = 0
        """Tokens of the prompt that are in the history."""
        self._follow([])

    def begin(self, tokens: Sequence[int]) -> None:
        self.observe(tokens)

    def propose(self, limit: int) -> Draft:
        if self._misses > 1:
            return NO_DRAFT
        tokens = self._predicted[self._place : self._place + min(limit, self._n_max)]
        return Draft(tokens) if tokens else NO_DRAFT

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        prompt = min(len(emitted), self._prompt_length - self._prompt)
        self._prompt += prompt
        for token in emitted[prompt:]:
            self._step(token)

    def truncate(self, length: int) -> None:
        self.shift(length, self._prompt + len(self._output) - length)

    def shift(self, keep: int, discard: int) -> None:
        if discard <= 0:
            return
        prompt, end = self._prompt, keep + discard
        self._prompt -= max(0, min(end, prompt) - keep)
        self._prompt_length -= max(0, min(end, self._prompt_length) - keep)
        self._follow(self._output[: max(0, keep - prompt)] + self._output[max(0, end - prompt) :])

    def end(self) -> None:
        pass

    def _follow(self, output: Sequence[int]) -> None:
        """Reads a whole output from its beginning."""
        self._output: list[int] = []
        self._place = 0
        self._misses = 0
        for token in output:
            self._step(token)

    def _step(self, token: int) -> None:
        self._output.append(token)
        if self._place < len(self._predicted) and self._predicted[self._place] == token:
            self._place += 1
            self._misses = 0
            self._index(self._place)  # now, as a miss after a long way would have to do it at once
            return
        self._misses += 1
        place = self._found()
        if place is not None:
            self._place, self._misses = place, 0
        elif self._misses == 1:
            self._place += 1

    def _found(self) -> int | None:
        """Where in the prediction the last tokens of the output end, if they are there."""
        self._index(self._place + AHEAD)
        ends = self._ends.get(tuple(self._output[-SYNC_SHORT:]), [])
        later, last = bisect_left(ends, self._place), bisect_right(ends, self._place + AHEAD)
        near = ends[max(0, later - NEAR) : min(later + NEAR, last)]
        return max(near, key=lambda end: (self._agreed(end), end >= self._place, -abs(end - self._place)), default=None)

    def _index(self, length: int) -> None:
        """Knows where the runs of the first `length` tokens end, and perhaps of more."""
        first, last = self._indexed + 1, min(length, len(self._predicted))
        for end in range(first, last + 1):
            self._ends.setdefault(tuple(self._predicted[end - SYNC_SHORT : end]), []).append(end)
        self._indexed = max(self._indexed, last)

    def _agreed(self, end: int) -> int:
        """How many tokens before `end` are the output's last, up to `SYNC_LONG`."""
        most = min(end, len(self._output), SYNC_LONG)
        for back in range(SYNC_SHORT + 1, most + 1):
            if self._predicted[end - back] != self._output[-back]:
                return back - 1
        return most
