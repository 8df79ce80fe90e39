"""Chooses between per-slot and unified KV, and how many cells the context gets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

# The library pads the cells of a stream to a multiple of this.
PAD_CELLS = 256
# Per-slot KV is the default from so many tokens a slot on: with fewer, ordinary prompts do not fit a slot.
SLOT_TOKENS = 1024
# A slot gets no more without -c, so that a long training context does not take all memory.
SLOT_TOKENS_MAX = 8192
# Share of the free memory that the cells of all slots may take without -c.
MEMORY_SHARE = 0.25


class KvLayout(NamedTuple):
    """The KV layout of a context."""

    unified: bool
    cells: int
    """Cells of all sequences together, as requested of the library."""
    reason: str


class Wanted(NamedTuple):
    """Settings and sizes that the choice depends on."""

    unified: bool | None
    """Value of --kv-unified; None if neither it nor --no-kv-unified is given."""
    slots: int
    cells: int
    """Cells of all slots together; 0 if no number is given."""
    trained: int
    """Tokens of the training context."""
    kind: str = ""
    """One of sliding-window, recurrent and hybrid; empty for a model whose layers all attend to the whole context."""
    fitted: bool = False
    """True if `cells` were found by --fit and must not be exceeded; False if they were given with -c."""
    room: int = 0
    """Cells that fit `MEMORY_SHARE` of the free memory; only used without `cells`."""


def choose(wanted: Wanted) -> KvLayout:
    """The layout: per-slot KV where each slot gets `SLOT_TOKENS`, or the training context if that is less."""
    slots, tokens, source = wanted.slots, *_slot_tokens(wanted)
    unified = wanted.cells or wanted.trained
    if wanted.room and not wanted.cells:
        unified = min(unified, max(PAD_CELLS, wanted.room // PAD_CELLS * PAD_CELLS))
    if wanted.unified:
        return KvLayout(True, unified, "--kv-unified")
    per_slot = KvLayout(False, slots * _padded(tokens), "--no-kv-unified")
    if wanted.unified is not None:
        return per_slot
    if wanted.kind:
        return KvLayout(True, unified, f"{wanted.kind} models have unified KV; --no-kv-unified gives each slot its own")
    needed = min(SLOT_TOKENS, wanted.trained)
    if tokens < needed:
        reason = f"{source} leaves {tokens} tokens for each of {slots} slots, less than {needed}"
        return KvLayout(True, unified, f"{reason}; a larger -c, fewer slots (-np) or --no-kv-unified changes that")
    reason = f"{source} gives each of {slots} slots {tokens} tokens"
    return per_slot._replace(reason=f"{reason}; --kv-unified shares the cells of all slots")


def _slot_tokens(wanted: Wanted) -> tuple[int, str]:
    """Tokens of each slot with per-slot KV, and the setting that determines them."""
    if wanted.cells and not wanted.fitted:
        return wanted.cells // wanted.slots, f"-c {wanted.cells}"
    if wanted.cells:
        fitting = wanted.cells // wanted.slots // PAD_CELLS * PAD_CELLS
        return min(fitting, wanted.trained), f"--fit with {wanted.cells} cells"
    most = min(wanted.trained, SLOT_TOKENS_MAX)
    if (fitting := wanted.room // wanted.slots // PAD_CELLS * PAD_CELLS) < most:
        return fitting, "a quarter of the free memory"
    return most, "the training context" if most == wanted.trained else f"the default of {SLOT_TOKENS_MAX}"


def _padded(tokens: int) -> int:
    return max(1, -(-tokens // PAD_CELLS)) * PAD_CELLS


def free_memory() -> int:
    """Bytes of RAM that a process can take without swapping, within the limit of its control group if it has one."""
    about = Path("/proc/meminfo")
    lines = about.read_text().splitlines() if about.exists() else []
    found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if found is None else found
    group = Path("/sys/fs/cgroup")
    limit, stat = group / "memory.max", group / "memory.stat"
    if limit.exists() and stat.exists() and (most := limit.read_text().strip()).isdigit():
        used = next((int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("anon ")), 0)
        free = min(free, max(0, int(most) - used))
    return free
