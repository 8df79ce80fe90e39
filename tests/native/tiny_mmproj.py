"""Projectors for images, with random weights, and PNG files of random pixels. Each projector has less than 1 MB."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGUFWriter

# Sizes of the projector's layers.
WIDTH, HIDDEN, LAYERS, HEADS = 32, 64, 2, 2
# Sides in pixels.
IMAGE_SIZE, PATCH_SIZE = 32, 8

ProjectorKind = Literal["janus_pro", "gemma3", "qwen2vl_merger"]


def _add_metadata(writer: GGUFWriter, width: int, kind: ProjectorKind, image_size: int) -> None:
    writer.add_string("clip.projector_type", kind)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    for name, size in (
        ("embedding_length", WIDTH),
        ("feed_forward_length", HIDDEN),
        ("block_count", LAYERS),
        ("attention.head_count", HEADS),
        ("projection_dim", width),
        ("image_size", image_size),
        ("patch_size", PATCH_SIZE),
        ("projector.scale_factor", 2),
    ):
        writer.add_uint32(f"clip.vision.{name}", size)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])


def projector(path: Path, width: int, kind: ProjectorKind = "janus_pro", image_size: int = IMAGE_SIZE) -> Path:
    """Writes a projector for a model of `width`, and returns the path.

    With the default `image_size`, `janus_pro` makes 16 embeddings of an image, with causal attention, and `gemma3`
    makes 4, each of which attends to all. `qwen2vl_merger` makes a grid with one embedding for each 16 by 16 pixels.
    """
    writer, random = GGUFWriter(path, "clip"), np.random.default_rng(1)
    _add_metadata(writer, width, kind, image_size)

    def add(name: str, *shape: int, scale: float = 1.0) -> None:
        weight = random.standard_normal(shape, np.float32) * np.float32(scale / shape[-1] ** 0.5)
        writer.add_tensor(name, weight)

    def ones(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(WIDTH, np.float32))

    add("v.patch_embd.weight", WIDTH, 3, PATCH_SIZE, PATCH_SIZE)
    if kind == "qwen2vl_merger":
        add("v.patch_embd.weight.1", WIDTH, 3, PATCH_SIZE, PATCH_SIZE)
    else:
        add("v.position_embd.weight", (image_size // PATCH_SIZE) ** 2, WIDTH)
    for layer in range(LAYERS):
        block = f"v.blk.{layer}"
        for norm in ("ln1", "ln2"):
            ones(f"{block}.{norm}")
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            add(f"{block}.{part}.weight", WIDTH, WIDTH)
            writer.add_tensor(f"{block}.{part}.bias", np.zeros(WIDTH, np.float32))
        add(f"{block}.ffn_up.weight", HIDDEN, WIDTH)
        add(f"{block}.ffn_down.weight", WIDTH, HIDDEN)
    ones("v.post_ln")
    if kind == "gemma3":
        add("mm.input_projection.weight", WIDTH, width, scale=(width / WIDTH) ** 0.5)
        writer.add_tensor("mm.soft_emb_norm.weight", np.ones(WIDTH, np.float32))
    else:
        inputs, last = (4 * WIDTH, "mm.2") if kind == "qwen2vl_merger" else (WIDTH, "mm.1")
        add("mm.0.weight", HIDDEN, inputs)
        writer.add_tensor("mm.0.bias", np.zeros(HIDDEN, np.float32))
        add(f"{last}.weight", width, HIDDEN)
        writer.add_tensor(f"{last}.bias", np.zeros(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def png(width: int = 40, height: int = 24, seed: int = 0) -> bytes:
    """Returns a PNG of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return png_of(width, height, b"".join(b"\0" + row.tobytes() for row in pixels))


def png_of(width: int, height: int, rows: bytes) -> bytes:
    """Returns a PNG of 8-bit colours with the given sizes in the header and `rows` as data, which may be invalid."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
