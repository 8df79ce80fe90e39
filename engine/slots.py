"""The sequence running in each slot, and the tokens of the slot's last sequence."""

from __future__ import annotations

from array import array
from bisect import insort
from typing import NamedTuple

from msgspec import Struct, structs

from engine.contract import DraftStats, RequestRefused, SamplingParams
from engine.sequence import Sequence


class SlotContent(NamedTuple):
    """The computed tokens of a sequence, and their namespace. Immutable by convention."""

    tokens: array[int]
    salt: str


NO_CONTENT = SlotContent(array("i"), "")


class RequestState(Struct, frozen=True):
    """A snapshot of a request: its parameters, and counts in tokens. It contains no text."""

    key: int
    """The engine's number for the request."""
    prompt: int
    cached: int
    """Prompt tokens that were loaded or shared."""
    processed: int
    """Prompt tokens computed so far."""
    emitted: int
    max_tokens: int | None
    """The request's limit of emitted tokens. None if only the context limits the output."""
    sampling: SamplingParams
    """The request's parameters, with the seed in use."""
    min_tokens: int
    ignore_eos: bool
    proposers: tuple[str, ...]
    """Types of the request's proposers."""
    draft: int
    """Length of the draft that the next step verifies."""
    drafts: tuple[DraftStats, ...]
    """Statistics of earlier drafts, by type."""

    @classmethod
    def of(cls, sequence: Sequence) -> RequestState:
        """Returns the snapshot of a running sequence."""
        request, length = sequence.request, sequence.computed
        known = sequence.prompt_length if sequence.first_token is not None else min(length, sequence.prompt_length)
        return cls(
            sequence.key,
            sequence.prompt_length,
            sequence.cached_so_far,
            max(0, known - sequence.cached_so_far),
            sequence.emitted,
            request.max_tokens,
            structs.replace(request.sampling, seed=sequence.seed, logit_bias=()),
            request.min_tokens,
            request.ignore_eos,
            sequence.proposers.types,
            len(sequence.draft),
            sequence.proposers.draft_stats,
        )


class SlotState(Struct, frozen=True):
    """A snapshot of a slot."""

    number: int
    busy: bool
    tokens: int
    """Computed tokens of the running request, or of the last one if the slot is idle."""
    request: RequestState | None
    """The running request, or the last one if the slot is idle. None if the slot never ran a request."""


class Slot:
    """A slot, its running sequence, and the content of its last sequence."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.sequence: Sequence | None = None
        """The running sequence. None if the slot is idle."""
        self.last_content = NO_CONTENT
        """Content of the last sequence that left the slot, or that was restored into it."""
        self.last_seq = number
        """Id in the KV cache of the last sequence that left the slot."""
        self._last_request: RequestState | None = None

    @property
    def content(self) -> SlotContent:
        """The content of the running sequence, or of the last one if the slot is idle. An uncached sequence has no
        content."""
        if self.sequence is None:
            return self.last_content
        if not self.sequence.request.cache:
            return NO_CONTENT
        return SlotContent(self.sequence.tokens[: self.sequence.computed], self.sequence.salt)

    @property
    def state(self) -> SlotState:
        """A snapshot of the current state."""
        if self.sequence is not None:
            return SlotState(self.number, True, self.sequence.computed, RequestState.of(self.sequence))
        return SlotState(self.number, False, len(self.last_content.tokens), self._last_request)

    def leave(self) -> None:
        """Frees the slot. The running sequence must still have its allocation."""
        assert self.sequence is not None, "a sequence runs"
        self.last_content = self.content
        self.last_seq = self.sequence.seq
        self._last_request = structs.replace(RequestState.of(self.sequence), draft=0)
        self.sequence = None


class Slots:
    """All slots of an engine. Belongs to the engine thread."""

    def __init__(self, count: int) -> None:
        self._slots = [Slot(number) for number in range(count)]
        self._free = list(range(count))  # ascending
        self._taken: dict[int, Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def take(self, sequence: Sequence) -> None:
        """Puts `sequence`, which has an allocation, into the slot that its request prefers if that slot is free,
        otherwise into the lowest free slot. Requires a free slot."""
        preferred = sequence.request.slot
        sequence.slot = preferred if preferred in self._free else self._free[0]
        self._free.remove(sequence.slot)
        slot = self._taken[sequence.key] = self._slots[sequence.slot]
        slot.sequence = sequence

    def preferred_seq(self, sequence: Sequence) -> int | None:
        """Returns the id in the KV cache of the last sequence in the slot that the request prefers. None if the request
        prefers no slot, or if the slot is taken."""
        number = sequence.request.slot
        return self._slots[number].last_seq if number in self._free else None

    def leave(self, sequence: Sequence) -> None:
        """Frees the slot of `sequence`, which still has its allocation. No effect on a waiting sequence."""
        slot = self._taken.pop(sequence.key, None)
        if slot is not None:
            slot.leave()
            insort(self._free, slot.number)

    def states(self) -> tuple[SlotState, ...]:
        """Returns snapshots of all slots, by number."""
        return tuple(slot.state for slot in self._slots)

    def content(self, number: int) -> SlotContent:
        """Returns the content of a slot's running or last sequence. Raises RequestRefused if the content is empty."""
        content = self._slot(number).content
        if not content.tokens:
            raise RequestRefused(f"Slot {number} is empty: it has not run a request, or was erased.", field="id_slot")
        return content

    def idle(self, number: int) -> Slot:
        """Returns the idle slot `number`. Raises RequestRefused if a sequence runs in the slot."""
        slot = self._slot(number)
        if slot.sequence is not None:
            raise RequestRefused(f"Slot {number} is busy: try again when its request has ended.", field="id_slot")
        return slot

    def set_last_content(self, number: int, content: SlotContent) -> None:
        """Sets the content that the slot has while no sequence runs in it."""
        self._slot(number).last_content = content

    def _slot(self, number: int) -> Slot:
        if not 0 <= number < len(self._slots):
            raise RequestRefused(f"There is no slot {number}, only 0 to {len(self._slots) - 1}.", field="id_slot")
        return self._slots[number]
