"""Ends reasoning that has become too long, by emitting what closes it."""

from __future__ import annotations

from collections.abc import Callable

from engine.contract import ReasoningBudget

_OPENING = 16
"""Tokens within which reasoning must begin to be bounded."""
_CHARACTER = 4
"""Tokens that may be needed to complete a character, whose middle is no place to stop."""


class Budget:
    """Where one text is in its reasoning: a function of the tokens it took, which are those that were emitted, so that
    neither drafts nor what is forgotten later count."""

    def __init__(self, budget: ReasoningBudget, piece: Callable[[int], bytes]) -> None:
        self._opens, self._closes = budget.opens.encode(), budget.closes.encode()
        self._closing = budget.closing
        self._piece = piece
        self._look = max(len(self._opens), len(self._closes), _CHARACTER)
        self._text = b""  # the end of it, in which a tag or a character may have begun
        self._opening = _OPENING if self._opens else 0
        self._left = budget.tokens
        self._due = budget.closing if not (self._opens or budget.tokens) else ()
        self._closed = False  # whether what was forced holds the tag
        self._over = False

    @property
    def forced(self) -> int | None:
        """The token that must follow; None if the model may pick."""
        return self._due[0] if self._due else None

    def take(self, token: int) -> None:
        """The text goes on with `token`, which is another than the forced one only if a grammar forbade that: then the
        end follows as soon as it may, but for what follows its tag."""
        if self._over:
            return
        text = self._text + self._piece(token)
        self._text = text[-self._look :]
        if token == self.forced:
            self._closed = self._closed or self._closes in text
            self._due = self._due[1:]
            self._over = not self._due
            return
        if self._closed:  # what was to follow the tag is forbidden
            self._over, self._due = True, ()
            return
        if not self._opening:
            self._left = (0 if self._due else self._left) - 1
        elif self._opens in text:
            self._opening = 0
        else:
            self._opening -= 1
            self._over = not self._opening
            return
        self._over = self._closes in text
        spent = self._left <= 0 and (_complete(text) or self._left <= -_CHARACTER)
        self._due = self._closing if spent and not self._over else ()


def _complete(text: bytes) -> bool:
    """Whether `text` does not end inside a character."""
    for back in range(1, min(3, len(text)) + 1):
        lead = text[-back]
        if lead >= 0xC0:
            return back >= (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4)
        if lead < 0x80:
            return True
    return True
