"""`prediction`: drafts from the output that the client predicts (OpenAI's `prediction`), often a file to be edited.

The proposer tracks the position of the output in the predicted tokens; the draft is the tokens after that position.
Where the output differs from the prediction, tokens may have been replaced, inserted or left out. The last output
tokens are then searched in the prediction to find the new position.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from engine.speculate.proposer import NO_DRAFT, Draft

# Maximum number of equal tokens that are compared: more of them do not make a position more certain.
MAX_SYNC_TOKENS = 8
# Equal tokens that give a new position. A single token occurs in many places; three give the position one step later
# than two and are hardly more reliable.
MIN_SYNC_TOKENS = 2
# Maximum distance from the old position to a later new one. It bounds the part of a long prediction that one step
# indexes.
MAX_SKIP_TOKENS = 4096
# Maximum number of candidate positions before the old position, and of those after it. It bounds the cost of a miss.
MAX_CANDIDATES_PER_SIDE = 8


class PredictionProposer:
    """Drafts the tokens of `predicted` after the position that the request's output has reached.

    Tokens after the first `prompt_length` are output. The *position* is the number of predicted tokens that the output
    has passed, 0 at first. For each output token:

    - If it equals the predicted token at the position, the position moves past that token.
    - Otherwise the token is a miss. If the last `MIN_SYNC_TOKENS` output tokens occur in `predicted`, the position
    moves
      to the end of one occurrence, and the run of misses ends. Candidates are the last `MAX_CANDIDATES_PER_SIDE`
      occurrences that end before the old position, and the first `MAX_CANDIDATES_PER_SIDE` that end at it or up to
      `MAX_SKIP_TOKENS` after it. The best candidate is the one with the most equal tokens before it, up to
      `MAX_SYNC_TOKENS`. Between equal candidates, one at or after the old position is preferred, then the nearest.
    - If the tokens of a first miss do not occur, the position moves by one, as if the token had replaced the predicted
      one. At later misses of the same run the position stays.

    The draft is at most `n_max` predicted tokens from the position on. After two misses in a row there is no draft.
    `truncate` and `shift` reduce `prompt_length` by the number of prompt tokens that they remove.
    """

    def __init__(self, predicted: Sequence[int], prompt_length: int, *, n_max: int = 64) -> None:
        self._predicted = list(predicted)
        self._prompt_length = prompt_length
        self._n_max = n_max
        self._ends: dict[tuple[int, ...], list[int]] = {}
        """For each n-gram of `MIN_SYNC_TOKENS` tokens in the first `_indexed` predicted tokens, the ends of its
        occurrences, ascending."""
        self._indexed = MIN_SYNC_TOKENS - 1
        self._prompt_seen = 0
        """Number of tokens of the history that belong to the prompt."""
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
        """Computes the position of a whole output, starting at the beginning of the prediction."""
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
            # The index grows token by token; otherwise a miss after a long match would index the whole match in one
            # step.
            self._extend_index(self._position)
            return
        self._misses += 1
        position = self._resync()
        if position is not None:
            self._position, self._misses = position, 0
        elif self._misses == 1:
            self._position += 1

    def _resync(self) -> int | None:
        """Returns the best candidate position. None if there is no candidate."""
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
        """Returns how many predicted tokens before `end` equal the last output tokens, at most `MAX_SYNC_TOKENS`."""
        max_equal = min(end, len(self._output), MAX_SYNC_TOKENS)
        for back in range(MIN_SYNC_TOKENS + 1, max_equal + 1):
            if self._predicted[end - back] != self._output[-back]:
                return back - 1
        return max_equal
