"""Ends reasoning that exceeds its budget by forcing the closing tokens, as llama.cpp (common/reasoning-budget.cpp)."""

from __future__ import annotations

from engine.contract import ReasoningBudget
from engine.text import TokenBytes

# If the opening tag is not complete within this many tokens, the output has no reasoning budget.
_MAX_OPENING_TOKENS = 16
# A UTF-8 character can consist of this many tokens. The closing tokens must not be forced inside a character.
_MAX_CHARACTER_TOKENS = 4


class ReasoningLimiter:
    """The state of one sequence's reasoning. It depends only on the emitted tokens, not on drafts or context shifts."""

    def __init__(self, budget: ReasoningBudget, token_bytes: TokenBytes) -> None:
        self._opening_tag, self._closing_tag = budget.opens.encode(), budget.closes.encode()
        self._closing_tokens = budget.closing
        self._token_bytes = token_bytes
        self._tail_bytes = max(len(self._opening_tag), len(self._closing_tag), _MAX_CHARACTER_TOKENS)
        # The last bytes of the output, which can contain the start of a tag or of a character.
        self._tail = b""
        self._opening_tokens_left = _MAX_OPENING_TOKENS if self._opening_tag else 0
        self._tokens_left = budget.tokens
        self._forced = budget.closing if not (self._opening_tag or budget.tokens) else ()
        # True once forced tokens have completed the closing tag.
        self._closed = False
        self._done = False

    @property
    def forced(self) -> int | None:
        """The token that must be emitted next; None if the sampler may pick any token."""
        return self._forced[0] if self._forced else None

    def take(self, token: int) -> None:
        """Advances the state by an emitted token.

        `token` differs from the forced token only if a grammar forbids the forced token. If the closing tag is not
        complete, the closing tokens are then forced again from the first one; otherwise no further token is forced.
        """
        if self._done:
            return
        text = self._tail + self._token_bytes(token)
        self._tail = text[-self._tail_bytes :]
        if token == self.forced:
            self._closed = self._closed or self._closing_tag in text
            self._forced = self._forced[1:]
            self._done = not self._forced
            return
        if self._closed:
            self._done, self._forced = True, ()
            return
        if not self._opening_tokens_left:
            self._tokens_left = (0 if self._forced else self._tokens_left) - 1
        elif self._opening_tag in text:
            self._opening_tokens_left = 0
        else:
            self._opening_tokens_left -= 1
            self._done = not self._opening_tokens_left
            return
        self._done = self._closing_tag in text
        spent = self._tokens_left <= 0 and (_ends_character(text) or self._tokens_left <= -_MAX_CHARACTER_TOKENS)
        self._forced = self._closing_tokens if spent and not self._done else ()


def _ends_character(text: bytes) -> bool:
    """Returns True if `text` ends with a complete UTF-8 character."""
    for back in range(1, min(3, len(text)) + 1):
        lead = text[-back]
        if lead >= 0xC0:
            return back >= (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4)
        if lead < 0x80:
            return True
    return True
