"""Sets of LoRA adapters: the values in requests, the namespaces of their KV, and the turns that sets take in steps."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from msgspec import Struct

# The library applies one set to a whole decode, and a change of the set lengthens the next decode, because the graph
# is reserved anew. So a set keeps its turn for several steps while others wait, but not for longer than these seconds.
TURN_STEPS, TURN_SECONDS = 8, 0.5


class AdapterScale(NamedTuple):
    """An adapter that is applied, and the factor of its effect."""

    id: int
    """Number of the adapter, from 0, in the order of loading."""
    scale: float
    digest: str = ""
    """Digest of the adapter's file. The engine sets it."""


# The adapters that are applied to a sequence, by ascending id, without those of scale 0.
AdapterSet = tuple[AdapterScale, ...]


class AdapterInfo(Struct, frozen=True, kw_only=True):
    """A loaded LoRA adapter."""

    id: int
    path: str
    scale: float
    """The scale in requests that name no adapters; 0 if the adapter is not applied to them."""
    digest: str = ""
    """Digest of the file's content."""
    task_name: str = ""
    """The task, from the file's metadata; empty if the file names none."""
    prompt_prefix: str = ""
    """Text with which prompts should begin, from the file's metadata; empty if the file has none."""


def default_set(adapters: Iterable[AdapterInfo]) -> AdapterSet:
    """Returns the set of the adapters with their default scales."""
    return tuple(AdapterScale(each.id, each.scale, each.digest) for each in adapters if each.scale)


def namespace(salt: str, adapters: AdapterSet) -> str:
    """Returns the namespace of prefixes and drafts of a salt and a set of adapters. Different arguments have different
    namespaces. Without adapters the namespace is the salt, or the salt after two zero characters if the salt begins
    with one.

    Adapters are identified by their digests, so that states on disk are not used with another adapter of the same
    number.
    """
    if not adapters:
        return f"\0\0{salt}" if salt.startswith("\0") else salt
    applied = ";".join(f"{each.digest or each.id}:{each.scale!r}" for each in adapters)
    return f"\0lora {applied}\0{salt}"


def uncached_namespace(key: int) -> str:
    """Returns the KV cache's namespace for a request that shares its prefix with no other, given its key."""
    return f"\0{key}"


def is_uncached(name: str) -> bool:
    """Returns True for a result of `uncached_namespace`."""
    return name[:1] == "\0" and name[1:2].isdigit()


def split_namespace(name: str) -> tuple[str, str]:
    """Returns the parts of a result of `namespace`: the salt, and the text of the adapters' digests and scales."""
    if name.startswith("\0lora "):
        applied, _, salt = name.removeprefix("\0lora ").partition("\0")
        return salt, applied
    return name.removeprefix("\0\0"), ""


class AdapterTurns:
    """Chooses the set of adapters of the next step: the sets of running sequences take turns. Uses no clock.

    A turn ends after `TURN_STEPS` steps or `TURN_SECONDS`, whichever is first, if another set has rows. The least
    recently served set is next, so that a set waits for at most one turn of each other set.
    """

    def __init__(self) -> None:
        self._waiting: dict[AdapterSet, None] = {}  # sets with rows, the least recently served first
        self._current: AdapterSet = ()
        self._steps, self._seconds = 0, 0.0  # of the current turn

    def choose(self, sets: Collection[AdapterSet]) -> AdapterSet:
        """Returns one of `sets`, the sets that have rows. Without sets, returns the set of the last step.

        Repeated calls between two steps return the same set as long as that set has rows.
        """
        self._waiting = dict.fromkeys([*(each for each in self._waiting if each in sets), *sets])
        turn_is_over = self._steps >= TURN_STEPS or self._seconds >= TURN_SECONDS
        if sets and (self._current not in sets or (turn_is_over and len(sets) > 1)):
            self._current = next(each for each in self._waiting if each != self._current)
            self._waiting[self._current] = self._waiting.pop(self._current)
            self._steps, self._seconds = 0, 0.0
        return self._current

    def count_step(self, seconds: float) -> None:
        """Counts a step of the current set."""
        self._steps += 1
        self._seconds += seconds
