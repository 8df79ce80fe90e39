"""The protocol of a context that computes two tokens at one position of a sequence."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from engine.backend import Context

# Maximum alternatives in a batch. In a step of more sequences an alternative takes more time than it saves.
MAX_ALTERNATIVES = 8


@runtime_checkable
class BranchingContext(Context, Protocol):
    """A context with unified KV that decodes `Batch.alternatives`. Only the engine thread may call the methods."""

    @property
    def alternatives(self) -> int:
        """Maximum number of alternatives in a batch, at most one of each sequence. 0 if there can be none."""

    def adopt(self, seq: int, length: int) -> None:
        """Replaces the positions of `seq` from `length` on by its alternative of the last decode, which has the
        position `length`. The cell of an alternative that is not adopted is freed by the next `cut` of `seq`."""


def max_alternatives(context: Context) -> int:
    """Returns the maximum number of alternatives in a batch of `context`."""
    return context.alternatives if isinstance(context, BranchingContext) else 0
