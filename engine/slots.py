"""Who runs in which slot, and what each slot ran last."""

from __future__ import annotations

from array import array
from heapq import heappop, heappush
from typing import NamedTuple

from msgspec import Struct, structs

from engine.contract import Drafts, RequestRefused, SamplingParams
from engine.streams import Stream


class Text(NamedTuple):
    """Tokens of one namespace. Nobody changes them."""

    tokens: array[int]
    salt: str


NOTHING = Text(array("i"), "")


class Ran(Struct, frozen=True):
    """A request as of a moment, in tokens; nothing of its text."""

    key: int
    """The engine's number of it."""
    prompt: int
    cached: int
    """Of the prompt, those that needed no computing."""
    processed: int
    """Of the prompt, those that were computed so far."""
    emitted: int
    most: int | None
    """How many it may emit; None if it may fill its context."""
    sampling: SamplingParams
    """What was asked for, with the seed that is used."""
    min_tokens: int
    ignore_eos: bool
    guessers: tuple[str, ...]
    """The types that guess for it."""
    draft: int
    """The draft that the next step verifies."""
    drafts: tuple[Drafts, ...]
    """What became of earlier ones, by type."""

    @classmethod
    def of(cls, stream: Stream) -> Ran:
        """The request of `stream`, which runs."""
        request, length = stream.request, stream.held.length
        read = stream.prompt_length if stream.first_token is not None else min(length, stream.prompt_length)
        return cls(
            stream.key,
            stream.prompt_length,
            stream.found,
            max(0, read - stream.found),
            stream.emitted,
            request.max_tokens,
            structs.replace(request.sampling, seed=stream.seed, logit_bias=()),
            request.min_tokens,
            request.ignore_eos,
            tuple(stream.drafter.types),
            len(stream.draft),
            stream.drafter.drafts,
        )


class SlotState(Struct, frozen=True):
    """A slot as of a moment."""

    number: int
    busy: bool
    tokens: int
    """Computed tokens of the request that runs, or of what the slot ran last."""
    ran: Ran | None
    """The request that runs, or the last one; None if there was none."""


class Slot:
    """A place to run. It knows what ran there last."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.stream: Stream | None = None
        """Who runs there."""
        self.last = NOTHING
        """What was computed of the last one."""
        self._ran: Ran | None = None

    @property
    def text(self) -> Text:
        """What is computed of the request that runs, or was of the last one."""
        if self.stream is None:
            return self.last
        return Text(self.stream.tokens[: self.stream.held.length], self.stream.request.salt)

    @property
    def state(self) -> SlotState:
        """As of now."""
        if self.stream is not None:
            return SlotState(self.number, True, self.stream.held.length, Ran.of(self.stream))
        return SlotState(self.number, False, len(self.last.tokens), self._ran)

    def leave(self) -> None:
        """Its stream, which still has its lease, runs no more."""
        assert self.stream is not None, "somebody runs"
        self.last, self._ran = self.text, structs.replace(Ran.of(self.stream), draft=0)
        self.stream = None


class Slots:
    """The slots of one engine. Belongs to the engine thread."""

    def __init__(self, count: int) -> None:
        self._slots = [Slot(number) for number in range(count)]
        self._free = list(range(count))
        self._taken: dict[int, Slot] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def take(self, stream: Stream) -> None:
        """Gives `stream`, which has just got its lease, the lowest free slot. There is one."""
        slot = self._taken[stream.key] = self._slots[heappop(self._free)]
        slot.stream = stream

    def leave(self, stream: Stream) -> None:
        """Frees the slot of `stream`, which still has its lease; one that waits has none."""
        slot = self._taken.pop(stream.key, None)
        if slot is not None:
            slot.leave()
            heappush(self._free, slot.number)

    def states(self) -> tuple[SlotState, ...]:
        """All, as of now."""
        return tuple(slot.state for slot in self._slots)

    def text(self, number: int) -> Text:
        """What is computed of what the slot runs or ran last. Raises RequestRefused if that is nothing."""
        text = self._slot(number).text
        if not text.tokens:
            raise RequestRefused(f"Slot {number} has run nothing yet, or what it ran was erased.", field="id_slot")
        return text

    def idle(self, number: int) -> Slot:
        """The slot. Raises RequestRefused if somebody runs there."""
        slot = self._slot(number)
        if slot.stream is not None:
            raise RequestRefused(f"Slot {number} is busy: try again when its request has ended.", field="id_slot")
        return slot

    def remember(self, number: int, text: Text) -> None:
        """`text` counts as what the slot ran last, unless somebody runs there by now."""
        self._slot(number).last = text

    def _slot(self, number: int) -> Slot:
        if not 0 <= number < len(self._slots):
            raise RequestRefused(f"There is no slot {number}, only 0 to {len(self._slots) - 1}.", field="id_slot")
        return self._slots[number]
