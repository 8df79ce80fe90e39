"""Chooses between per-slot and unified KV, and the number of cells."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

# The library pads the cells of a stream to a multiple of this.
PAD_CELLS = 256
# Minimum of tokens per slot for per-slot KV by default: with fewer, ordinary prompts do not fit a slot.
MIN_SLOT_TOKENS = 1024
# Maximum of tokens per slot without -c, so that a long training context does not take all memory.
MAX_SLOT_TOKENS = 8192
# Share of the free memory for the cells of all slots without -c.
MEMORY_SHARE = 0.25


class KvLayout(NamedTuple):
    """The KV layout of a context."""

    unified: bool
    cells: int
    """Cells of all sequences together, before the library's padding."""
    reason: str


class LayoutInputs(NamedTuple):
    """Settings and sizes that determine the layout."""

    unified: bool | None
    """Value of --kv-unified; None if neither it nor --no-kv-unified is given."""
    slots: int
    cells: int
    """Cells of all slots together; 0 if not given."""
    trained: int
    """Tokens of the training context."""
    kind: str = ""
    """`sliding-window`, `recurrent` or `hybrid`; empty for a model whose layers all attend to the whole context."""
    fitted: bool = False
    """True if --fit determined `cells`, as an upper bound; False if -c did."""
    room: int = 0
    """Cells that fit `MEMORY_SHARE` of the free memory; used only if `cells` is 0."""


def choose_layout(inputs: LayoutInputs) -> KvLayout:
    """Returns per-slot KV if each slot gets `MIN_SLOT_TOKENS`, or the training context if that is less, and unified KV
    if not. A flag or the kind of the model can determine another layout."""
    slots, tokens, source = inputs.slots, *_slot_tokens(inputs)
    unified = inputs.cells or inputs.trained
    if inputs.room and not inputs.cells:
        unified = min(unified, max(PAD_CELLS, inputs.room // PAD_CELLS * PAD_CELLS))
    if inputs.unified:
        return KvLayout(True, unified, "--kv-unified")
    per_slot = KvLayout(False, slots * _padded(tokens), "--no-kv-unified")
    if inputs.unified is not None:
        return per_slot
    if inputs.kind:
        return KvLayout(True, unified, f"{inputs.kind} models have unified KV; --no-kv-unified gives each slot its own")
    needed = min(MIN_SLOT_TOKENS, inputs.trained)
    if tokens < needed:
        reason = f"{source} leaves {tokens} tokens for each of {slots} slots, less than {needed}"
        return KvLayout(True, unified, f"{reason}; a larger -c, fewer slots (-np) or --no-kv-unified changes that")
    reason = f"{source} gives each of {slots} slots {tokens} tokens"
    return per_slot._replace(reason=f"{reason}; --kv-unified shares the cells of all slots")


def _slot_tokens(inputs: LayoutInputs) -> tuple[int, str]:
    """Returns the tokens of each slot with per-slot KV, and the setting that determines them."""
    if inputs.cells and not inputs.fitted:
        return inputs.cells // inputs.slots, f"-c {inputs.cells}"
    if inputs.cells:
        fitting = inputs.cells // inputs.slots // PAD_CELLS * PAD_CELLS
        return min(fitting, inputs.trained), f"--fit with {inputs.cells} cells"
    most = min(inputs.trained, MAX_SLOT_TOKENS)
    if (fitting := inputs.room // inputs.slots // PAD_CELLS * PAD_CELLS) < most:
        return fitting, "a quarter of the free memory"
    return most, "the training context" if most == inputs.trained else f"the default of {MAX_SLOT_TOKENS}"


def _padded(tokens: int) -> int:
    return max(1, -(-tokens // PAD_CELLS)) * PAD_CELLS


def free_memory() -> int:
    """Returns the bytes of RAM that the process can take without swapping, within the limit of its control group."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if found is None else found
    group = Path("/sys/fs/cgroup")
    limit, stat = group / "memory.max", group / "memory.stat"
    if limit.exists() and stat.exists() and (most := limit.read_text().strip()).isdigit():
        used = next((int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("anon ")), 0)
        free = min(free, max(0, int(most) - used))
    return free
