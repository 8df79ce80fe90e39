"""Fair queueing over owners: the order of the queue, and the running sequence that yields to a waiting one.

Slots are divided between the owners by their weights. Each owner has a virtual token counter (Sheng et al. 2024,
"Fairness in Serving Large Language Models"): the cost of the prompt tokens and of the output of its requests, divided
by its weight. The owner with the smallest counter is next where slots do not decide: among more owners than
slots, and in the prefill. In the queue and in the prefill, deadlines decide among the requests of one owner only,
because clients choose them. Pure functions of values, and the counters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import inf
from typing import NamedTuple

from msgspec import Struct

# Seconds of prefill for each second of decoding, while an owner without decoding sequences is prefilled beside others.
# With equal time a first token takes more than twice as long as alone, as each small chunk pays for a whole pass.
_FIRST_TOKEN_SHARE = 3.0
# Maximum number of owners without requests whose counters are kept.
_IDLE_OWNERS = 1024


class QueueEntry(NamedTuple):
    """The sort key of a waiting request among those of its owner; the smallest is first."""

    priority: int
    due: float
    """Time at which the request ends if it is not complete. Infinite without a deadline."""
    is_new: bool
    """False for a preempted request, which resumes before others of its owner, priority and deadline."""
    key: int
    """Keys ascend in the order of arrival."""


class Claim(Struct, frozen=True):
    """A running sequence, or the waiting one that could displace it."""

    key: int
    owner: str
    weight: float
    priority: int
    due: float = inf


Rank = tuple[int, float, float, int]


def rank(entry: QueueEntry, share: float, served: float) -> Rank:
    """Returns the place in the whole queue of an owner's first request; the least starts first.

    `share` is the number of the owner's running sequences divided by its weight. The counter `served` decides between
    equal shares, as when there are more owners than slots.
    """
    return entry.priority, share, served, entry.key


def displaced(candidate: Claim, running: Sequence[Claim]) -> int | None:
    """Returns the key of the sequence that is preempted so that `candidate` can start, or None if it has to wait.
    `running` is in the order of the starts.

    A sequence of lower priority always yields. Among equal priorities, sequences are divided by max-min fairness: one
    of an owner yields if that owner keeps at least as many for its weight as the candidate's then has. So no two owners
    displace each other in turn. Of several sequences, one without a deadline yields, else the one with the latest
    deadline; among equals, the one that started last.
    """
    lowest = max((claim.priority for claim in running), default=candidate.priority)
    if lowest > candidate.priority:
        return _least_urgent(claim for claim in running if claim.priority == lowest)
    counts = Counter(claim.owner for claim in running)
    kept = {
        claim.owner: (counts[claim.owner] - 1) / claim.weight
        for claim in running
        if claim.owner != candidate.owner and claim.priority == candidate.priority
    }
    max_kept = max(kept.values(), default=0.0)
    if not kept or max_kept < (counts[candidate.owner] + 1) / candidate.weight:
        return None
    return _least_urgent(
        claim for claim in running if claim.priority == candidate.priority and kept.get(claim.owner) == max_kept
    )


def _least_urgent(claims: Iterable[Claim]) -> int:
    """Returns the key of the claim with the latest deadline, or without one; among equals, the key of the last one."""
    return max(reversed([*claims]), key=lambda claim: claim.due).key


def prefill_share(prefilling: Mapping[str, float], decoding: Mapping[str, float]) -> float:
    """Returns the seconds of prefill for each second of decoding, so that owners get their first tokens in time; 0 if
    each owner with a prefilling sequence has a decoding one, or none has. The owners have their weights as values."""
    new = sum(weight for owner, weight in prefilling.items() if owner not in decoding)
    return _FIRST_TOKEN_SHARE * max(1.0, new / sum(decoding.values())) if new and decoding else 0.0


def has_place(owner: str, active: Collection[str], limit: int, reserved: int) -> bool:
    """Returns True if `owner` may add a request to those of the owners `active`, of which there may be `limit`. Further
    `reserved` places are for owners without other requests, so that no owner can fill the queue for all."""
    return len(active) < limit or (len(active) < limit + reserved and owner not in active)


class TokenCounters:
    """The virtual token counters of all owners. Belongs to the engine thread."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._requests: Counter[str] = Counter()  # running and waiting ones of each owner

    def __getitem__(self, owner: str) -> float:
        """The counter of `owner`: tokens divided by its weight."""
        return self._served.get(owner, 0.0)

    def join(self, owner: str) -> None:
        """Counts a new request of `owner`. If it is the only one, the counter rises to the smallest one of the owners
        with requests, so that time without requests gives no advantage later."""
        if not self._requests:
            self._served.clear()
        elif owner not in self._requests:
            self._served[owner] = max(self[owner], self._floor())
        self._requests[owner] += 1

    def leave(self, owner: str) -> None:
        """Counts the end of a request of `owner`."""
        self._requests[owner] -= 1
        if not self._requests[owner]:
            del self._requests[owner]
            self._served = _without_idle(self._served, self._requests)

    def charge(self, owner: str, tokens: float, weight: float = 1.0) -> None:
        """Adds the cost, in tokens of a prompt and divided by `weight`, of rows of a request of `owner`."""
        self._served[owner] = self._served.get(owner, 0.0) + tokens / weight

    def _floor(self) -> float:
        return min(self[owner] for owner in self._requests)


def _without_idle(served: dict[str, float], requests: Mapping[str, int]) -> dict[str, float]:
    """Returns `served` without the smallest counters of owners without requests, if these are too many. The smallest
    ones would rise the most at the next request."""
    if len(served) <= len(requests) + _IDLE_OWNERS:
        return served
    idle = sorted((owner for owner in served if owner not in requests), key=served.__getitem__)
    dropped = set(idle[: len(idle) // 2])
    return {owner: tokens for owner, tokens in served.items() if owner not in dropped}
