"""The state of one output in its grammar."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llguidance import LLMatcher

from engine.grammar.spec import GrammarError

# Number of recoveries after which an output gets no more drafts. A recovery feeds all accepted tokens to a new matcher.
MAX_RECOVERIES = 4


class Matcher:
    """The grammar state of one output. It depends only on the accepted tokens, so it is never rolled back.

    Belongs to the engine thread.
    """

    def __init__(self, start: LLMatcher, ends: frozenset[int], on_failure: Callable[[], None]) -> None:
        """`start` is the native matcher of an empty output; it is copied and not changed. `ends` are the end tokens.
        `on_failure` is called when the grammar cannot be followed further, for example because it is too complex."""
        self.native = start.deep_copy()
        self._start = start
        self._tokens: list[int] = []
        self._recoveries = 0
        self._ends = ends
        self._on_failure = on_failure

    def accept_token(self, token: int) -> None:
        """Advances by `token`, which a mask permitted and which is not an end token.

        Raises GrammarError if the grammar cannot be followed further.
        """
        if not self.native.consume_token(token):
            self.check()
            raise GrammarError(f"the grammar does not permit token {token}")
        self._tokens.append(token)

    def recover(self) -> bool:
        """Replaces the native matcher if it failed since the last accepted token. Returns True if it was replaced.

        A native matcher never leaves its error state. A wrong draft can cause the error in two ways: no token can
        follow a draft token, or the draft enters a rule with `max_tokens` or `stop`, which the library cannot roll
        back.
        """
        if not self.native.is_error():
            return False
        self._recoveries += 1
        self.native = self._start.deep_copy()
        self.native.consume_tokens(self._tokens)
        return True

    def check(self) -> None:
        """Raises GrammarError if the native matcher failed, for example because the grammar is too complex."""
        if self.native.is_error():
            self._on_failure()
            raise GrammarError(self.native.get_error().partition("\n")[0])

    @property
    def complete(self) -> bool:
        """True if the output matches the grammar and no token can follow."""
        return self.native.is_stopped()

    def validate_tokens(self, draft: Sequence[int]) -> int:
        """Returns the length of the longest prefix of `draft` that the grammar permits. Changes no state.

        The prefix ends before the first end token, as the rows after an end token would not be used. Returns 0 after
        `MAX_RECOVERIES` recoveries.
        """
        if self._recoveries >= MAX_RECOVERIES:
            return 0
        tokens = [*draft]
        end = next((index for index, token in enumerate(tokens) if token in self._ends), len(tokens))
        return self.native.validate_tokens(tokens[:end])

    def forced_tokens(self, limit: int) -> list[int]:
        """Returns up to `limit` next tokens that the grammar forces.

        If the grammar forces a text, the masks permit only the tokens of its usual tokenization.
        """
        tokens = self.native.compute_ff_tokens()[:limit]
        return tokens[: self.validate_tokens(tokens)]
