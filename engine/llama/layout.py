"""The choice between per-slot and unified KV, and the number of cells."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from engine.config.machine import memory_bytes

# The library rounds the number of cells of a stream up to a multiple of this.
PAD_CELLS = 256
# Minimum number of tokens per slot for per-slot KV by default. With fewer tokens, ordinary prompts do not fit a slot.
MIN_SLOT_TOKENS = 1024
# Maximum number of tokens per slot without -c, so that a long training context does not take all memory.
MAX_SLOT_TOKENS = 8192
# Fraction of the free memory that the cells of all slots may take without -c.
MEMORY_SHARE = 0.25


class KvLayout(NamedTuple):
    """The KV layout of a context, and the reason for it."""

    unified: bool
    cells: int
    """Cells of all sequences together, before the library's padding."""
    reason: str
    """One line for the log and `GET /props`, with the flag that changes the layout."""


class LayoutInputs(NamedTuple):
    """Settings and sizes that determine the layout."""

    unified: bool | None
    """Value of --kv-unified; None if neither it nor --no-kv-unified is given."""
    slots: int
    cells: int
    """Cells of all slots together; 0 if neither -c nor --fit determines a number."""
    trained_context: int
    """Tokens of the training context."""
    kind: str = ""
    """`sliding-window`, `recurrent` or `hybrid`; empty for a model whose layers all attend to the whole context."""
    fitted: bool = False
    """True if --fit determined `cells`, as an upper bound; False if -c did."""
    slots_given: bool = True
    """False if no flag gives the number of slots."""
    memory_cells: int = 0
    """Number of cells that fit `MEMORY_SHARE` of the free memory; used only if `cells` is 0."""


def choose_layout(inputs: LayoutInputs) -> KvLayout:
    """Returns the KV layout that the flags or the kind of the model determine. By default returns per-slot KV if each
    slot gets `MIN_SLOT_TOKENS`, or the training context if it is shorter, and unified KV otherwise. With -c but without
    -np, per-slot KV requires the training context for each slot."""
    slots, tokens, source = inputs.slots, *_slot_tokens(inputs)
    unified_cells = inputs.cells or inputs.trained_context
    if inputs.memory_cells and not inputs.cells:
        unified_cells = min(unified_cells, round_down(inputs.memory_cells))
    if inputs.unified:
        return KvLayout(True, unified_cells, "--kv-unified")
    per_slot = KvLayout(False, slots * _padded(tokens), "--no-kv-unified")
    if inputs.unified is not None:
        return per_slot
    if inputs.kind:
        reason = f"{inputs.kind} models have unified KV; --no-kv-unified gives each slot its own"
        return KvLayout(True, unified_cells, reason)
    needed = min(MIN_SLOT_TOKENS, inputs.trained_context)
    if tokens < needed:
        reason = f"{source} leaves {tokens} tokens for each of {slots} slots, less than {needed}"
        return KvLayout(
            True, unified_cells, f"{reason}; a larger -c, fewer slots (-np) or --no-kv-unified changes that"
        )
    if not inputs.slots_given and inputs.cells and not inputs.fitted and tokens < inputs.trained_context:
        # As in llama-server: a command line with -c alone expects that one request can use all of it.
        reason = f"{source} without -np is shared by {slots} slots"
        return KvLayout(True, unified_cells, f"{reason}; -np N or --no-kv-unified gives each slot its own part")
    reason = f"{source} gives each of {slots} slots {tokens} tokens"
    return per_slot._replace(reason=f"{reason}; --kv-unified shares the cells of all slots")


def _slot_tokens(inputs: LayoutInputs) -> tuple[int, str]:
    """Returns the number of tokens of each slot with per-slot KV, and the setting that determines it."""
    if inputs.cells and not inputs.fitted:
        return inputs.cells // inputs.slots, f"-c {inputs.cells}"
    if inputs.cells:
        fitting = inputs.cells // inputs.slots // PAD_CELLS * PAD_CELLS
        return min(fitting, inputs.trained_context), f"--fit with {inputs.cells} cells"
    limit = min(inputs.trained_context, MAX_SLOT_TOKENS)
    if (fitting := inputs.memory_cells // inputs.slots // PAD_CELLS * PAD_CELLS) < limit:
        return fitting, "a quarter of the free memory"
    return limit, "the training context" if limit == inputs.trained_context else f"the default of {MAX_SLOT_TOKENS}"


def round_down(cells: float) -> int:
    """Returns `cells` rounded down to a multiple of `PAD_CELLS`, at least `PAD_CELLS`."""
    return max(PAD_CELLS, int(cells) // PAD_CELLS * PAD_CELLS)


def _padded(tokens: int) -> int:
    return max(1, -(-tokens // PAD_CELLS)) * PAD_CELLS


def free_memory() -> int:
    """Returns the bytes of RAM that the process can still take without swapping, at most those that the limit of its
    control group leaves."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    free = memory_bytes() if found is None else found
    group = Path("/sys/fs/cgroup")
    limit, stat = group / "memory.max", group / "memory.stat"
    if limit.exists() and stat.exists() and (limit_bytes := limit.read_text().strip()).isdigit():
        used = next((int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("anon ")), 0)
        free = min(free, max(0, int(limit_bytes) - used))
    return free
