"""Compares the memory of the KV cells with the free memory before the library allocates them."""

from __future__ import annotations

from typing import Any

from engine.config import ModelConfig
from engine.contract import ModelError
from engine.llama import layout, library
from engine.llama.layout import PAD_CELLS
from engine.llama.params import metadata

# Lower bounds of the share of `bytes_per_cell` that a cell takes: with sliding windows, where few layers store all
# cells, and with latent attention, which stores no values.
SLIDING_WINDOW_SHARE, LATENT_SHARE = 0.125, 0.5
# Share of the free memory in the context that an error proposes; the rest is for buffers.
_PROPOSED_SHARE = 0.9


def check_cells(config: ModelConfig, model: Any, cells: int, kind: str, bytes_per_cell: int, *, gpu: bool) -> None:
    """Raises ModelError, which names a context that fits, if the cells certainly exceed the free memory.
    `bytes_per_cell` is an upper bound.

    The allocation itself would succeed, and the kernel would end the process when the cells are written.
    """
    free = layout.free_memory() + (sum(library.free_gpu_memory().values()) if gpu else 0)
    family = metadata(model, "general.architecture")
    latent = bool(metadata(model, f"{family}.attention.kv_lora_rank"))
    share = LATENT_SHARE if latent else 1.0
    if kind == "sliding-window" and not config.swa_full:
        share *= SLIDING_WINDOW_SHARE
    if problem := too_many_cells(cells, share * bytes_per_cell, free):
        raise ModelError(f"the KV cache of {config.path} is too large: {problem}")


def too_many_cells(cells: int, bytes_per_cell: float, free_bytes: int) -> str:
    """Returns a clause with the number of cells that fit; empty if all `cells` fit."""
    if cells * bytes_per_cell <= free_bytes:
        return ""
    fitting = int(_PROPOSED_SHARE * free_bytes / bytes_per_cell) // PAD_CELLS * PAD_CELLS
    return (
        f"{cells} tokens need {cells * bytes_per_cell / 1e9:.1f} GB, and {free_bytes / 1e9:.1f} GB are free; "
        f"-c {fitting} would fit (-cd for a draft model)"
    )
