"""LoRA adapters and control vectors with random numbers for the real model of the tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

# SmolLM2: layers, width of a row, and width of the keys and values.
LAYERS, WIDTH, KV_WIDTH = 30, 576, 192
# A row of `lora_b` is then one block of Q8_0, whose kernels compute the same bits for a row in every batch.
RANK = 32


def adapter(
    path: Path,
    seed: int,
    *,
    alpha: float = 64.0,
    architecture: str = "llama",
    width: int = WIDTH,
    kv_width: int = KV_WIDTH,
    layers: Iterable[int] = range(0, LAYERS, 6),
) -> Path:
    """Writes an adapter of the queries and values of some layers, which changes most tokens."""
    writer, random = GGUFWriter(path, architecture), np.random.default_rng(seed)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for layer in layers:
        for name, rows in (("attn_q", width), ("attn_v", kv_width)):
            for part, shape in (("a", (RANK, width)), ("b", (rows, RANK))):
                numbers = random.standard_normal(shape).astype(np.float32) / 6
                packed = quantize(numbers, GGMLQuantizationType.Q8_0)
                tensor = f"blk.{layer}.{name}.weight.lora_{part}"
                writer.add_tensor(tensor, packed, raw_dtype=GGMLQuantizationType.Q8_0)
    return _written(writer, path)


def control_vector(path: Path, seed: int, *, size: float = 1.0, width: int = WIDTH) -> Path:
    """Writes a direction for every layer except the first one."""
    writer, random = GGUFWriter(path, "controlvector"), np.random.default_rng(seed)
    for layer in range(1, LAYERS):
        writer.add_tensor(f"direction.{layer}", size * random.standard_normal(width).astype(np.float32))
    return _written(writer, path)


def _written(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
