"""The outputs of one step for all sequences, delivered in a single call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.contract import Failed, Finished, Logprob, PrefillProgress


class SlotTaken(NamedTuple):
    """The event of a sequence that starts, or starts again, in a slot."""

    number: int


class StepOutput(NamedTuple):
    """New tokens of one sequence, or an event: its slot, its prefill progress or its terminal update."""

    key: int
    ids: Sequence[int]
    logprobs: Sequence[Logprob]
    event: Finished | Failed | PrefillProgress | SlotTaken | None
    origins: Sequence[str] = ()


class Outbox:
    """Collects step outputs on the engine thread. `deliver` is called there, once for each flush."""

    def __init__(self, deliver: Callable[[list[StepOutput]], None]) -> None:
        self._deliver = deliver
        self._outputs: list[StepOutput] = []

    def tokens(self, key: int, ids: Sequence[int], logprobs: Sequence[Logprob], origins: Sequence[str] = ()) -> None:
        """Adds tokens of a sequence."""
        self._outputs.append(StepOutput(key, ids, logprobs, None, origins))

    def slot_taken(self, key: int, number: int) -> None:
        """Adds the slot in which a sequence starts."""
        self._outputs.append(StepOutput(key, (), (), SlotTaken(number)))

    def prefill_progress(self, key: int, progress: PrefillProgress) -> None:
        """Adds the progress of a sequence's prefill."""
        self._outputs.append(StepOutput(key, (), (), progress))

    def end(self, key: int, end: Finished | Failed) -> None:
        """Adds the terminal update of a request."""
        self._outputs.append(StepOutput(key, (), (), end))

    def flush(self) -> None:
        """Delivers the collected outputs. No effect without outputs."""
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._deliver(outputs)
