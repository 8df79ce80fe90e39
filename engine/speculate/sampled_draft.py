"""History and draft of one sequence of a batched proposer that picks draft tokens from logits."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Container, Sequence

from engine.backend import Logits
from engine.sampling import BadLogits, argmax_token, peak_and_mass
from engine.speculate.proposer import Draft, DraftBounds

# Picks a token, given a row of logits, a history, and the number of tokens that context shifts discarded from it.
PickToken = Callable[[Logits, Sequence[int], int], int]


class SampledDraft:
    """History of one sequence, and its draft, whose tokens are picked from the logits of a model."""

    def __init__(
        self, bounds: DraftBounds, pick: PickToken | None = None, *, with_second_choices: bool = False
    ) -> None:
        """`pick` picks the tokens of drafts. `None` means the most likely tokens. With `with_second_choices` drafts
        have a second choice at the place at which they are most likely to end."""
        self.bounds = bounds
        self._pick = pick
        self._with_second_choices = with_second_choices
        self._discarded = 0
        self.history = array("i")
        self.tokens: list[int] = []
        """The draft."""
        self.chances: list[float] = []
        """The model's probability of each token of the draft."""
        self.joint_chance = 1.0
        """Product of `chances`."""
        self.second_choices: list[int] = []
        """For each token of the draft the second choice; -1 if there is none. Empty without second choices."""
        self._end_chance = 0.0  # chance that the draft ends at the place of the last second choice

    def begin(self, tokens: Sequence[int]) -> None:
        """Sets the history. No token is computed before a draft is requested."""
        self.history.extend(tokens)

    def propose(self, limit: int) -> Draft:
        """Returns at most `limit` tokens of the draft, within the bounds."""
        draft = Draft(tuple(self.tokens), tuple(self.chances), tuple(self.second_choices))
        return self.bounds.trim(draft.cut(limit))

    def clear_draft(self) -> None:
        """Drops the draft."""
        self.tokens, self.chances, self.joint_chance = [], [], 1.0
        self.second_choices, self._end_chance = [], 0.0

    def pick(self, row: Logits) -> int:
        """Returns the next token after history and draft, picked from the model's `row`. Raises BadLogits."""
        if self._pick is None:
            return argmax_token(row)
        drafted = len(self.tokens)
        self.history.extend(self.tokens)
        try:
            return self._pick(row, self.history, self._discarded)
        finally:
            del self.history[len(self.history) - drafted :]

    def extend(self, row: Logits, limit: int, floor: float, ends: Container[int]) -> bool:
        """Adds the token picked from `row` to the draft, if it is likely enough. Returns True if the draft continues:
        it has fewer than `limit` tokens, a joint chance of at least `floor`, and no token of `ends`."""
        try:
            token, (peak, mass) = self.pick(row), peak_and_mass(row)
        except BadLogits:
            return False
        chance = math.exp(float(row[token]) - peak) / mass
        if chance < self.bounds.p_min:
            return False
        if self._with_second_choices:
            self.second_choices.append(self._second_choice(row, token, self.joint_chance * (1.0 - chance)))
        self.tokens.append(token)
        self.chances.append(chance)
        self.joint_chance *= chance
        return len(self.tokens) < limit and self.joint_chance >= floor and token not in ends

    def _second_choice(self, row: Logits, token: int, end_chance: float) -> int:
        """Returns the token that would be picked from `row` without `token`. -1 if there is none, or if an earlier end
        of the draft is more likely, by the chance `end_chance` that it ends with `token`."""
        if end_chance <= self._end_chance:
            return -1
        self._end_chance, logit = end_chance, row[token]
        row[token] = -math.inf
        try:
            return self.pick(row)
        except BadLogits:
            return -1
        finally:
            row[token] = logit
