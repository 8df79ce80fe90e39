"""State of one output in its grammar."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llguidance import LLMatcher

from engine.grammar.spec import GrammarError

# Each recovery feeds all accepted tokens to a new native matcher. After so many the output gets no more drafts.
MAX_RECOVERIES = 4


class Matcher:
    """The grammar state of one output: a function of its accepted tokens, so nothing is ever rolled back.

    Belongs to the engine thread.
    """

    def __init__(self, start: LLMatcher, ends: frozenset[int], failed: Callable[[], None]) -> None:
        """`start` is the state of an empty output and is only copied. `ends` are the end tokens. `failed` is called
        when the grammar is too complex to be followed further."""
        self.native = start.deep_copy()
        self._start = start
        self._tokens: list[int] = []
        self._recoveries = 0
        self._ends = ends
        self._failed = failed

    def accept_token(self, token: int) -> None:
        """Advances by `token`, which a mask permitted and which is not an end token.

        Raises GrammarError if the grammar cannot be followed further.
        """
        if not self.native.consume_token(token):
            self.check()
            raise GrammarError(f"the grammar does not permit token {token}")
        self._tokens.append(token)

    def recover(self) -> bool:
        """Restores the state after the last accepted token if the native matcher failed since. Returns True if it had.

        A native matcher never leaves its error state. A wrong draft can cause the error: by a token after which none
        can follow, or by a rule with `max_tokens` or `stop`, which the library cannot roll back.
        """
        if not self.native.is_error():
            return False
        self._recoveries += 1
        self.native = self._start.deep_copy()
        self.native.consume_tokens(self._tokens)
        return True

    def check(self) -> None:
        """Raises GrammarError if the native matcher failed, as when the grammar is too complex."""
        if self.native.is_error():
            self._failed()
            raise GrammarError(self.native.get_error().partition("\n")[0])

    @property
    def complete(self) -> bool:
        """True if the output matches the grammar and no token can follow."""
        return self.native.is_stopped()

    def validate_tokens(self, draft: Sequence[int]) -> int:
        """Returns the length of the longest prefix of `draft` that the grammar permits. Changes no state.

        The prefix ends before an end token, as no row after that would be used. 0 after `MAX_RECOVERIES`.
        """
        if self._recoveries >= MAX_RECOVERIES:
            return 0
        tokens = [*draft]
        end = next((index for index, token in enumerate(tokens) if token in self._ends), len(tokens))
        return self.native.validate_tokens(tokens[:end])

    def forced_tokens(self, limit: int) -> list[int]:
        """Returns at most `limit` next tokens to which the grammar has no alternative.

        Where text is forced, masks permit only the tokens of its usual tokenization.
        """
        tokens = self.native.compute_ff_tokens()[:limit]
        return tokens[: self.validate_tokens(tokens)]
