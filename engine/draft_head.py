"""The protocol of a context that also predicts further tokens of its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from engine.backend import Logits


@runtime_checkable
class DraftHead(Protocol):
    """A context with layers that predict the token after the next one from the last hidden states (llama.cpp: NextN,
    MTP). Only the engine thread may call the methods."""

    max_draft: int | None
    """Maximum number of calls of `draft` since `rewind`; None is no limit."""

    def length(self, seq: int) -> int:
        """Returns the number of positions of `seq`, without draft tokens."""

    def draft(self, tokens: Sequence[tuple[int, int]]) -> Logits:
        """Appends one draft token to each sequence, and returns the logits of the token after it, in the same order.

        `tokens` has pairs of a sequence id and a token, in ascending order of ids. The token follows those of earlier
        calls since `rewind`, whose number is the same for all of these sequences. The logits are valid until the next
        call.

        Raises NoFreeCells, Aborted or NativeFault.
        """

    def rewind(self) -> None:
        """Drops the tokens of all calls of `draft`. Called before the next decode."""
