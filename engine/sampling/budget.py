"""Ends reasoning that has become too long, by emitting what closes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.contract import ReasoningBudget

_OPENING = 16
"""Tokens within which reasoning must begin to be bounded."""
_CHARACTER = 4
"""Tokens that may be needed to complete a character, whose middle is no place to stop."""


class Budget:
    """Which tokens are not the model's to pick. Has no state, so that drafts are verified and repeated as they were."""

    def __init__(self, budget: ReasoningBudget, piece: Callable[[int], bytes]) -> None:
        self._budget = budget
        self._opens, self._closes = budget.opens.encode(), budget.closes.encode()
        self._piece = piece

    def forced(self, history: Sequence[int], start: int) -> int | None:
        """The token that must follow `history`, whose own text begins at `start`; None if the model may pick."""
        budget, count = self._budget, len(history) - start
        latest = budget.tokens + _CHARACTER + (_OPENING if self._opens else 0)
        if not budget.tokens <= count < latest + len(budget.closing):
            return None
        begun = self._begun(history[start : start + _OPENING])
        spent = None if begun is None else self._spent(history, start, begun + budget.tokens)
        if spent is None or not spent <= count < spent + len(budget.closing):
            return None
        return budget.closing[count - spent]

    def _begun(self, tokens: Sequence[int]) -> int | None:
        """After how many tokens reasoning begins; None if it does not."""
        text, count = b"", 0
        while self._opens not in text:
            if count == len(tokens):
                return None
            text += self._piece(tokens[count])
            count += 1
        return count

    def _spent(self, history: Sequence[int], start: int, count: int) -> int | None:
        """After how many tokens the budget is spent and a character complete; None if reasoning ended before."""
        for size in range(count, count + _CHARACTER):
            if start + size > len(history):
                return None
            text = b"".join(map(self._piece, history[start : start + size]))
            if self._closes in text:
                return None
            if _complete(text):
                return size
        return count + _CHARACTER


def _complete(text: bytes) -> bool:
    """Whether `text` does not end inside a character."""
    for back in range(1, min(3, len(text)) + 1):
        lead = text[-back]
        if lead >= 0xC0:
            return back >= (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4)
        if lead < 0x80:
            return True
    return True
