"""What a speculator is. A guess never changes the text: the runner emits what the model would have anyway."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

from engine.contract import Request


class Speculator(Protocol):
    """Guesses at how one request goes on. Called on the engine thread only."""

    def begin(self, tokens: array[int]) -> None:
        """The request starts, or starts again after it was retracted, with these tokens."""

    def propose(self, tokens: array[int], limit: int) -> Sequence[int]:
        """At most `limit` tokens that may follow `tokens`; none is a valid answer."""

    def observe(self, drafted: int, accepted: int) -> None:
        """Of the last proposal, `drafted` tokens were verified and the first `accepted` of them right."""

    def end(self) -> None:
        """The request has ended."""


Speculate = Callable[[Request], Speculator]
"""Makes the speculator of a request."""


class Silent:
    """Never guesses."""

    def begin(self, tokens: array[int]) -> None:
        """Nothing to learn."""

    def propose(self, tokens: array[int], limit: int) -> Sequence[int]:
        """No tokens."""
        return ()

    def observe(self, drafted: int, accepted: int) -> None:
        """Nothing was proposed."""

    def end(self) -> None:
        """Nothing to forget."""
