"""`prediction`: drafts from the output that the client predicts (OpenAI's `prediction`), mostly a file to be edited.

The proposer follows the output through the predicted tokens; the tokens after the current position are the draft. Where
the output differs, it may have replaced, inserted or left out tokens: the last output tokens give the new position.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from engine.speculate.proposer import NO_DRAFT, Draft

# More equal tokens than this do not make a position more certain.
MAX_SYNC_TOKENS = 8
# One equal token is found everywhere; three are found a step later than two and hardly more surely.
MIN_SYNC_TOKENS = 2
# Bounds the index: a long prediction must not delay a step.
MAX_SKIP_TOKENS = 4096
# Bounds the cost of a miss: candidate positions before the old position, and as many after it.
MAX_CANDIDATES_PER_SIDE = 8


class PredictionProposer:
    """Drafts the tokens of `predicted` after the position that the request's output has reached.

    Tokens after the first `prompt_length` are output. The *position* is the number of predicted tokens that the output
    has passed, 0 at first. For each output token:

    - If it equals the predicted token at the position, the position moves past that token.
    - Otherwise it is a miss. If the last `MIN_SYNC_TOKENS` output tokens stand in `predicted`, the position moves past
      them, and the misses end. Candidates are the `MAX_CANDIDATES_PER_SIDE` last positions before the old one and the
      first as many at it or up to `MAX_SKIP_TOKENS` after it. The best candidate has the longest agreement with the
      output's end, of at most `MAX_SYNC_TOKENS`; of equals one at or after the old position; of these the nearest.
    - Otherwise, if the token before was no miss, the position moves by one, as if the token had replaced the predicted
      one.

    The draft is the predicted tokens from the position on, at most `n_max`. After two misses in a row there is none.
    Prompt tokens that `truncate` or `shift` removes reduce `prompt_length`.
    """

    def __init__(self, predicted: Sequence[int], prompt_length: int, *, n_max: int = 64) -> None:
        self._predicted = list(predicted)
        self._prompt_length = prompt_length
        self._n_max = n_max
        self._ends: dict[tuple[int, ...], list[int]] = {}
        """The ends of each run of `MIN_SYNC_TOKENS` tokens among the first `_indexed` predicted ones, ascending."""
        self._indexed = MIN_SYNC_TOKENS - 1
        self._prompt_seen = 0
        """Tokens of the history that belong to the prompt."""
        self._replay([])

    def begin(self, tokens: Sequence[int]) -> None:
        self.observe(tokens)

    def propose(self, limit: int) -> Draft:
        if self._misses > 1:
            return NO_DRAFT
        tokens = self._predicted[self._position : self._position + min(limit, self._n_max)]
        return Draft(tokens) if tokens else NO_DRAFT

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        prompt = min(len(emitted), self._prompt_length - self._prompt_seen)
        self._prompt_seen += prompt
        for token in emitted[prompt:]:
            self._advance(token)

    def truncate(self, length: int) -> None:
        self.shift(length, self._prompt_seen + len(self._output) - length)

    def shift(self, keep: int, discard: int) -> None:
        if discard <= 0:
            return
        prompt, end = self._prompt_seen, keep + discard
        self._prompt_seen -= max(0, min(end, prompt) - keep)
        self._prompt_length -= max(0, min(end, self._prompt_length) - keep)
        self._replay(self._output[: max(0, keep - prompt)] + self._output[max(0, end - prompt) :])

    def end(self) -> None:
        pass

    def _replay(self, output: Sequence[int]) -> None:
        """Follows a whole output from the beginning of the prediction."""
        self._output: list[int] = []
        self._position = 0
        self._misses = 0
        for token in output:
            self._advance(token)

    def _advance(self, token: int) -> None:
        self._output.append(token)
        if self._position < len(self._predicted) and self._predicted[self._position] == token:
            self._position += 1
            self._misses = 0
            # Token by token, as a miss after a long agreement would otherwise index all of it in one step.
            self._extend_index(self._position)
            return
        self._misses += 1
        position = self._resync()
        if position is not None:
            self._position, self._misses = position, 0
        elif self._misses == 1:
            self._position += 1

    def _resync(self) -> int | None:
        """Returns the best candidate position, or None if there is no candidate."""
        self._extend_index(self._position + MAX_SKIP_TOKENS)
        ends = self._ends.get(tuple(self._output[-MIN_SYNC_TOKENS:]), [])
        later, last = bisect_left(ends, self._position), bisect_right(ends, self._position + MAX_SKIP_TOKENS)
        candidates = ends[max(0, later - MAX_CANDIDATES_PER_SIDE) : min(later + MAX_CANDIDATES_PER_SIDE, last)]
        return max(candidates, key=self._preference, default=None)

    def _preference(self, end: int) -> tuple[int, bool, int]:
        return self._agreement(end), end >= self._position, -abs(end - self._position)

    def _extend_index(self, length: int) -> None:
        """Indexes at least the first `length` predicted tokens."""
        first, last = self._indexed + 1, min(length, len(self._predicted))
        for end in range(first, last + 1):
            self._ends.setdefault(tuple(self._predicted[end - MIN_SYNC_TOKENS : end]), []).append(end)
        self._indexed = max(self._indexed, last)

    def _agreement(self, end: int) -> int:
        """Returns how many predicted tokens before `end` equal the output's last ones, at most `MAX_SYNC_TOKENS`."""
        most = min(end, len(self._output), MAX_SYNC_TOKENS)
        for back in range(MIN_SYNC_TOKENS + 1, most + 1):
            if self._predicted[end - back] != self._output[-back]:
                return back - 1
        return most
