"""The sequence that runs in each slot, and what each slot ran last."""

from __future__ import annotations

from array import array
from heapq import heappop, heappush
from typing import NamedTuple

from msgspec import Struct, structs

from engine.contract import Drafts, RequestRefused, SamplingParams
from engine.sequence import Sequence


class Text(NamedTuple):
    """Tokens of one namespace; never changed."""

    tokens: array[int]
    salt: str


NOTHING = Text(array("i"), "")


class Ran(Struct, frozen=True):
    """A snapshot of a request, in tokens, without its text."""

    key: int
    """The engine's number of the request."""
    prompt: int
    cached: int
    """Tokens of the prompt that needed no computing."""
    processed: int
    """Tokens of the prompt that were computed so far."""
    emitted: int
    most: int | None
    """Tokens that it may emit; None if it may fill its context."""
    sampling: SamplingParams
    """The request's parameters, with the seed in use."""
    min_tokens: int
    ignore_eos: bool
    guessers: tuple[str, ...]
    """The types of its proposers."""
    draft: int
    """Length of the draft that the next step verifies."""
    drafts: tuple[Drafts, ...]
    """Counts of earlier drafts, by type."""

    @classmethod
    def of(cls, sequence: Sequence) -> Ran:
        """The snapshot of a running sequence."""
        request, length = sequence.request, sequence.computed
        read = sequence.prompt_length if sequence.first_token is not None else min(length, sequence.prompt_length)
        return cls(
            sequence.key,
            sequence.prompt_length,
            sequence.found,
            max(0, read - sequence.found),
            sequence.emitted,
            request.max_tokens,
            structs.replace(request.sampling, seed=sequence.seed, logit_bias=()),
            request.min_tokens,
            request.ignore_eos,
            tuple(sequence.drafter.types),
            len(sequence.draft),
            sequence.drafter.drafts,
        )


class SlotState(Struct, frozen=True):
    """A snapshot of a slot."""

    number: int
    busy: bool
    tokens: int
    """Tokens in cells of the running request, or of the last one."""
    ran: Ran | None
    """The running request, or the last one; None if there was none."""


class Slot:
    """A slot, with what it ran last."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.sequence: Sequence | None = None
        """The running sequence."""
        self.last = NOTHING
        """The computed tokens of the last sequence."""
        self._ran: Ran | None = None

    @property
    def text(self) -> Text:
        """The computed tokens of the running sequence, or of the last one."""
        if self.sequence is None:
            return self.last
        return Text(self.sequence.tokens[: self.sequence.computed], self.sequence.request.salt)

    @property
    def state(self) -> SlotState:
        """The snapshot as of now."""
        if self.sequence is not None:
            return SlotState(self.number, True, self.sequence.computed, Ran.of(self.sequence))
        return SlotState(self.number, False, len(self.last.tokens), self._ran)

    def leave(self) -> None:
        """Its sequence, which still has its allocation, leaves the slot."""
        assert self.sequence is not None, "a sequence runs"
        self.last, self._ran = self.text, structs.replace(Ran.of(self.sequence), draft=0)
        self.sequence = None


class Slots:
    """The slots of one engine. Belongs to the engine thread."""

    def __init__(self, count: int) -> None:
        self._slots = [Slot(number) for number in range(count)]
        self._free = list(range(count))
        self._taken: dict[int, Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def take(self, sequence: Sequence) -> None:
        """Gives `sequence`, which has just got its allocation, the lowest free slot. There is one."""
        slot = self._taken[sequence.key] = self._slots[heappop(self._free)]
        slot.sequence = sequence

    def leave(self, sequence: Sequence) -> None:
        """Frees the slot of `sequence`, which still has its allocation; a waiting one has none."""
        slot = self._taken.pop(sequence.key, None)
        if slot is not None:
            slot.leave()
            heappush(self._free, slot.number)

    def states(self) -> tuple[SlotState, ...]:
        """Snapshots of all slots."""
        return tuple(slot.state for slot in self._slots)

    def text(self, number: int) -> Text:
        """The computed tokens of what the slot runs or ran last. Raises RequestRefused if there are none."""
        text = self._slot(number).text
        if not text.tokens:
            raise RequestRefused(f"Slot {number} has run nothing yet, or what it ran was erased.", field="id_slot")
        return text

    def idle(self, number: int) -> Slot:
        """The slot. Raises RequestRefused if a sequence runs there."""
        slot = self._slot(number)
        if slot.sequence is not None:
            raise RequestRefused(f"Slot {number} is busy: try again when its request has ended.", field="id_slot")
        return slot

    def remember(self, number: int, text: Text) -> None:
        """`text` counts as what the slot ran last, unless a sequence runs there by now."""
        self._slot(number).last = text

    def _slot(self, number: int) -> Slot:
        if not 0 <= number < len(self._slots):
            raise RequestRefused(f"There is no slot {number}, only 0 to {len(self._slots) - 1}.", field="id_slot")
        return self._slots[number]
