"""Ends reasoning that exceeds its budget, by forcing the closing tokens. llama.cpp: common/reasoning-budget.cpp."""

from __future__ import annotations

from engine.contract import ReasoningBudget
from engine.text import TokenBytes

# Reasoning that does not open within the first tokens has no budget.
_MAX_OPENING_TOKENS = 16
# Tokens that may be needed to complete a UTF-8 character; the closing tokens must not cut one.
_MAX_CHARACTER_TOKENS = 4


class ReasoningLimiter:
    """The state of one sequence's reasoning: a function of the emitted tokens.

    Neither drafts nor a context shift change the state.
    """

    def __init__(self, budget: ReasoningBudget, token_bytes: TokenBytes) -> None:
        self._opens, self._closes = budget.opens.encode(), budget.closes.encode()
        self._closing = budget.closing
        self._token_bytes = token_bytes
        self._tail_bytes = max(len(self._opens), len(self._closes), _MAX_CHARACTER_TOKENS)
        # The end of the output, in which a tag or a character may be incomplete.
        self._tail = b""
        self._opening_left = _MAX_OPENING_TOKENS if self._opens else 0
        self._left = budget.tokens
        self._forced = budget.closing if not (self._opens or budget.tokens) else ()
        # True once the forced tokens completed the closing tag.
        self._closed = False
        self._done = False

    @property
    def forced(self) -> int | None:
        """The token that must be emitted next; None if the sampler may pick any token."""
        return self._forced[0] if self._forced else None

    def take(self, token: int) -> None:
        """Advances by an emitted token.

        `token` differs from the forced token only if a grammar forbids the forced one. The closing tokens are then
        forced again as soon as possible; after the complete closing tag nothing more is forced.
        """
        if self._done:
            return
        text = self._tail + self._token_bytes(token)
        self._tail = text[-self._tail_bytes :]
        if token == self.forced:
            self._closed = self._closed or self._closes in text
            self._forced = self._forced[1:]
            self._done = not self._forced
            return
        if self._closed:
            self._done, self._forced = True, ()
            return
        if not self._opening_left:
            self._left = (0 if self._forced else self._left) - 1
        elif self._opens in text:
            self._opening_left = 0
        else:
            self._opening_left -= 1
            self._done = not self._opening_left
            return
        self._done = self._closes in text
        spent = self._left <= 0 and (_ends_character(text) or self._left <= -_MAX_CHARACTER_TOKENS)
        self._forced = self._closing if spent and not self._done else ()


def _ends_character(text: bytes) -> bool:
    """Returns True if `text` does not end inside a UTF-8 character."""
    for back in range(1, min(3, len(text)) + 1):
        lead = text[-back]
        if lead >= 0xC0:
            return back >= (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4)
        if lead < 0x80:
            return True
    return True
