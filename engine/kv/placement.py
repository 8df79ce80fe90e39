"""Policy for per-slot KV: the choice of a slot for a prompt, and of moves between slots. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from msgspec import Struct

# Expected steps of a request. A gap among the running ids costs one more pass in each of them.
_REQUEST_STEPS = 64
# Assumed seconds to compute a token divided by those to move it, until measured. A small model on two cores has 2,000.
COMPUTE_FACTOR = 1000
# Probability that a later prompt needs the content of a slot directly after its last use, and the steps that halve it.
REUSE_CHANCE, HALF_LIFE_STEPS = 0.5, 512


class Costs(Struct, frozen=True):
    """Measured costs in seconds; 0 for a cost that was not measured."""

    compute: float = 0.0
    """Seconds to compute a token of a prompt."""
    move: float = 5e-6
    """Seconds to save or to load a cell."""
    resident: float = 0.0
    """Unified KV: seconds by which one resident cell lengthens a step."""
    extra_pass: float = 0.0
    """Per-slot KV: seconds of one more pass over the weights in a step."""

    @property
    def recompute(self) -> float:
        """`compute`, or an estimate in seconds if it was not measured."""
        return self.compute or COMPUTE_FACTOR * self.move


class SlotOption(Struct, frozen=True):
    """A slot without a running request, and what its use for a prompt would change."""

    seq: int
    kept: int
    """Number of tokens at the start of the prompt that the slot holds already."""
    lost: int
    """Number of tokens of other prompts that the slot would lose."""
    unsaved: int
    """Number of the lost tokens that must be saved first."""
    age: int
    """Number of steps since the last use of the slot."""


def choose_slot(
    options: Sequence[SlotOption],
    copyable: int,
    running: Collection[int],
    costs: Costs,
    *,
    offloads: bool,
    preferred: int | None = None,
) -> SlotOption:
    """Returns the slot of least cost: the seconds of prefill, displaced content and extra passes. Among equal costs,
    returns the id `preferred` or else the lowest id. `options` is not empty.

    The content of `preferred` costs nothing: its client replaces it with the prompt.

    `copyable` is the length in tokens of the longest prefix that can be copied into a slot. A copy is assumed where it
    is cheaper than computing the tokens that the slot lacks.
    """
    longest = max(copyable, *(option.kept for option in options))

    def cost(option: SlotOption) -> tuple[float, bool, int]:
        others = option.seq != preferred
        seconds = displacement(option, costs, offloads=offloads) if others else 0.0
        seconds += _REQUEST_STEPS * costs.extra_pass * added_passes(option.seq, running)
        if worth_copying(copyable, option.kept, costs):
            seconds += costs.move * copyable
        else:
            seconds += costs.recompute * (longest - option.kept)
        return seconds, others, option.seq

    return min(options, key=cost)


def displacement(option: SlotOption, costs: Costs, *, offloads: bool) -> float:
    """Returns the expected seconds to save the lost tokens of a slot and to restore them later, or to recompute them
    if `offloads` is False. The older the last use, the lower the probability that they are needed."""
    restore = costs.move if offloads else costs.recompute
    chance = REUSE_CHANCE / (1 + option.age / HALF_LIFE_STEPS)
    return costs.move * option.unsaved + restore * option.lost * chance


def worth_copying(copyable: int, kept: int, costs: Costs) -> bool:
    """Returns True if copying a prefix of `copyable` tokens is cheaper than computing those from `kept` on."""
    return costs.move * copyable < costs.recompute * (copyable - kept)


def added_passes(seq: int, running: Collection[int]) -> int:
    """Returns the number of passes that a step gains if `seq` joins the ids in `running`: 1 without a running
    neighbour, 0 with one, -1 with two, and 0 if nothing runs. Rows of consecutive ids share a pass."""
    return 1 - (seq - 1 in running) - (seq + 1 in running) if running else 0


def move_target(running: Collection[int]) -> tuple[int, int] | None:
    """Returns a running id, and the free id to which its sequence can be moved so that a step takes fewer passes.

    Returns None if no single move reduces the passes. A move can do so if some running id has no running neighbour, or
    if some gap consists of one free id.
    """
    if not running or max(running) - min(running) < len(running):  # one run, as in most steps
        return None
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
