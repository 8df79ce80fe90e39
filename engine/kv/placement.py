"""The choice of a slot for a sequence with per-slot KV, and of moves between slots. Pure policy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from msgspec import Struct

# Expected duration of a request: a gap among the running ids costs a pass in each of its steps.
_REQUEST_STEPS = 64
# Assumed ratio of the seconds to compute and to move a token, until measured: 2,000 with a small model on two cores.
COMPUTE_FACTOR = 1000
# The chance that a later prompt needs the content of a slot just used, and the steps after which it is halved.
REUSE_CHANCE, HALF_LIFE_STEPS = 0.5, 512


class Costs(Struct, frozen=True):
    """Measured costs in seconds; 0 where nothing was measured."""

    compute: float = 0.0
    """Computing a token of a prompt."""
    move: float = 5e-6
    """Saving or loading a cell."""
    resident: float = 0.0
    """Lengthening of a step by one resident cell, with unified KV."""
    extra_pass: float = 0.0
    """One more pass over the weights in a step, with per-slot KV."""

    @property
    def recompute(self) -> float:
        """`compute`, or an estimate if it was not measured."""
        return self.compute or COMPUTE_FACTOR * self.move


class SlotOption(Struct, frozen=True):
    """A slot without a running request, from the point of view of one prompt."""

    seq: int
    kept: int
    """Tokens of the prompt that it holds already."""
    lost: int
    """Tokens of other prompts that the slot loses."""
    unsaved: int
    """Of these, the tokens that have to be saved first."""
    age: int
    """Steps since its last use."""


def choose(
    options: Sequence[SlotOption], source: int, running: Collection[int], costs: Costs, *, offloads: bool
) -> SlotOption:
    """Returns the slot of least cost, in seconds of prefill, displaced content and extra passes. `options` is not
    empty.

    `source` is the length of the longest prefix that can be copied into a slot. A slot that holds less gets the copy
    if that is cheaper than computing. Of equal slots the lowest id is chosen.
    """
    longest = max(source, *(option.kept for option in options))

    def cost(option: SlotOption) -> tuple[float, int]:
        seconds = displacement(option, costs, offloads=offloads)
        seconds += _REQUEST_STEPS * costs.extra_pass * gaps(option.seq, running)
        if worth_copying(source, option.kept, costs):
            seconds += costs.move * source
        else:
            seconds += costs.recompute * (longest - option.kept)
        return seconds, option.seq

    return min(options, key=cost)


def displacement(option: SlotOption, costs: Costs, *, offloads: bool) -> float:
    """Returns the expected seconds to save the displaced content of a slot and to restore it later, or to recompute it
    where nothing is offloaded. Content is less likely to be needed the longer it is unused."""
    restore = costs.move if offloads else costs.recompute
    chance = REUSE_CHANCE / (1 + option.age / HALF_LIFE_STEPS)
    return costs.move * option.unsaved + restore * option.lost * chance


def worth_copying(source: int, kept: int, costs: Costs) -> bool:
    """True if copying a prefix of `source` tokens is cheaper than computing those beyond `kept`."""
    return costs.move * source < costs.recompute * (source - kept)


def gaps(seq: int, running: Collection[int]) -> int:
    """Returns by how many passes a step grows if `seq` joins `running`: 0 next to one neighbour, -1 between two, else
    1; 0 if nothing runs. Rows of consecutive ids share a pass."""
    return 1 - (seq - 1 in running) - (seq + 1 in running) if running else 0


def move_target(running: Collection[int]) -> tuple[int, int] | None:
    """Returns a running id, and the free id to which it can be moved so that a step takes fewer passes.

    None if no single move does that: there is neither a single id between gaps nor a gap of a single id.
    """
    runs: list[list[int]] = []
    for seq in sorted(running):
        if runs and runs[-1][-1] == seq - 1:
            runs[-1].append(seq)
        else:
            runs.append([seq])
    holes = [run[-1] + 1 for run, above in pairwise(runs) if above[0] == run[-1] + 2]
    alone = next((index for index in reversed(range(len(runs))) if len(runs[index]) == 1), None)
    if len(runs) < 2 or (alone is None and not holes):
        return None
    source = runs[-1][-1] if alone is None else runs[alone][0]
    if holes:
        return source, holes[0]
    return source, runs[alone - 1][-1] + 1 if alone else runs[1][0] - 1
