"""Writes models of random weights, so that no weights are downloaded: `python -m bench.gpu.models 8b:q4_0 0.1b:q8_0`.

The shapes are Llama's and the tokenizer is SmolLM2's. The output is noise, but a step costs as much as with real
weights, and the logits are about as peaked as a real model's, so that sampling costs as much too. Writing a file takes
about as long as the disk needs, because all tensors are views of one pool of random blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, ReaderField
from msgspec import Struct
from numpy.typing import NDArray

from bench.models import MODELS_FOLDER, SOURCES

Bytes = NDArray[np.uint8]
# A GGUF without tensors with SmolLM2's vocabulary, written by `bench.gpu.bundle`.
BUNDLED = MODELS_FOLDER.parent / ".gpu" / "tokenizer.gguf"
# Standard deviation of the logits: the likeliest of 49k tokens then has a probability of a few tenths.
LOGIT_DEVIATION = 8.0


class ModelShape(Struct, frozen=True):
    """The sizes of a model; a head has `width / heads` values."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    """Width of the feed-forward layer."""


# Shapes by name; the last two are those of Llama 3.
SHAPES = {
    "tiny": ModelShape(256, 4, 4, 2, 512),
    "0.1b": ModelShape(768, 12, 12, 4, 2048),
    "1b": ModelShape(2048, 16, 32, 8, 8192),
    "8b": ModelShape(4096, 32, 32, 8, 14336),
}


class WeightType(NamedTuple):
    """A type of weights: the number of values and of bytes in one block."""

    type: GGMLQuantizationType
    values: int
    bytes: int


WEIGHT_TYPES = {
    "q4_0": WeightType(GGMLQuantizationType.Q4_0, 32, 18),
    "q8_0": WeightType(GGMLQuantizationType.Q8_0, 32, 34),
    "f16": WeightType(GGMLQuantizationType.F16, 1, 2),
}
# Standard deviation of the values of a random block with scale 1; the values of F16 are sampled directly.
BLOCK_DEVIATION = {"q4_0": 4.63, "q8_0": 73.9}


class BlockPool:
    """Random blocks of one type with a standard deviation of `deviation`; tensors are views of the blocks."""

    def __init__(self, name: str, values: int, deviation: float, seed: int = 1) -> None:
        """`values` is the size of the largest tensor."""
        self.kind = WEIGHT_TYPES[name]
        self._random = np.random.default_rng(seed)
        blocks = values // self.kind.values
        self._spare = blocks // 8
        self._blocks = self._filled(name, blocks + self._spare, deviation)

    def _filled(self, name: str, blocks: int, deviation: float) -> Bytes:
        """Returns random blocks of shape [blocks, bytes of a block]."""
        if name == "f16":
            drawn = self._random.standard_normal(blocks, np.float32)
            drawn *= deviation
            return drawn.astype(np.float16).view(np.uint8).reshape(blocks, 2)
        filled = self._random.integers(0, 256, (blocks, self.kind.bytes), np.uint8)
        scale = np.float16(deviation / BLOCK_DEVIATION[name])
        signs = self._random.integers(0, 2, blocks, np.uint8)  # random signs, because 4-bit values are not centred at 0
        filled[:, :2] = np.where(signs[:, None], np.array([scale]).view(np.uint8), np.array([-scale]).view(np.uint8))
        return filled

    def take(self, rows: int, columns: int) -> NDArray[Any]:
        """Returns a matrix of `rows` by `columns` weights in the form that GGUFWriter expects."""
        count = rows * columns // self.kind.values
        start = int(self._random.integers(0, self._spare + 1)) if self._spare else 0
        taken = self._blocks[start : start + count].reshape(rows, -1)
        return taken.view(np.float16) if self.kind.values == 1 else taken


def weights(shape: ModelShape, vocabulary: int) -> Iterator[tuple[str, int, int]]:
    """Yields name, rows and columns of each matrix."""
    keys = shape.width // shape.heads * shape.kv_heads
    yield "token_embd", vocabulary, shape.width
    yield "output", vocabulary, shape.width
    for layer in range(shape.layers):
        yield f"blk.{layer}.attn_q", shape.width, shape.width
        yield f"blk.{layer}.attn_k", keys, shape.width
        yield f"blk.{layer}.attn_v", keys, shape.width
        yield f"blk.{layer}.attn_output", shape.width, shape.width
        yield f"blk.{layer}.ffn_gate", shape.hidden, shape.width
        yield f"blk.{layer}.ffn_up", shape.hidden, shape.width
        yield f"blk.{layer}.ffn_down", shape.width, shape.hidden


def write(path: Path, shape: ModelShape, kind: str, tokenizer: Path) -> Path:
    """Writes a model to `path` atomically, with the vocabulary of the GGUF `tokenizer`."""
    reader = GGUFReader(tokenizer)
    vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
    part = path.with_suffix(".part")
    writer = GGUFWriter(part, "llama")
    writer.add_name(path.stem)
    writer.add_context_length(131_072)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    copy_fields(reader, writer, "tokenizer.")
    needed = list(weights(shape, vocabulary))
    pool = BlockPool(kind, max(rows * columns for _, rows, columns in needed), 1 / sqrt(shape.width))
    for name, rows, columns in needed:
        writer.add_tensor(f"{name}.weight", pool.take(rows, columns), raw_dtype=pool.kind.type)
    for name in ("attn_norm", "ffn_norm"):
        for layer in range(shape.layers):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(shape.width, np.float32))
    writer.add_tensor("output_norm.weight", np.full(shape.width, LOGIT_DEVIATION, np.float32))
    _finish(writer)
    return part.replace(path)


def write_tokenizer(source: Path, target: Path) -> Path:
    """Writes a GGUF with only the vocabulary of `source` to `target`, atomically."""
    part = target.with_suffix(".part")
    writer = GGUFWriter(part, "llama")
    copy_fields(GGUFReader(source), writer, "tokenizer.")
    _finish(writer)
    return part.replace(target)


def copy_fields(reader: GGUFReader, writer: GGUFWriter, prefix: str) -> None:
    """Copies the metadata whose keys begin with `prefix`."""
    for name, field in reader.fields.items():
        if name.startswith(prefix):
            writer.add_key_value(name, *value_of(field))


def value_of(field: ReaderField) -> tuple[Any, GGUFValueType, GGUFValueType | None]:
    """Returns a metadata value, its type, and the type of its elements if the value is a list."""
    return field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def parse(model: str) -> tuple[ModelShape, str]:
    """Returns shape and type of weights of a model name such as 8b:q4_0. Raises SystemExit for an unknown name."""
    shape, _, kind = model.partition(":")
    if shape not in SHAPES or kind not in WEIGHT_TYPES:
        expected = f"one of {', '.join(SHAPES)}, a colon, and {' or '.join(WEIGHT_TYPES)}"
        raise SystemExit(f"unknown model {model!r}: expected {expected}")
    return SHAPES[shape], kind


def path_of(model: str, folder: Path) -> Path:
    """Returns the path of a model in `folder`."""
    return folder / f"random-{model.replace(':', '-')}.gguf"


def main() -> None:
    """Writes the requested models that are missing, and prints the paths of all requested models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", help=f"names: one of {', '.join(SHAPES)}, followed by :{' or :'.join(WEIGHT_TYPES)}"
    )
    parser.add_argument("-o", "--folder", type=Path, default=MODELS_FOLDER / "random", help="folder of the models")
    options = parser.parse_args()
    tokenizer = BUNDLED if BUNDLED.exists() else SOURCES["smollm2"].path
    options.folder.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        shape, kind = parse(model)
        path = path_of(model, options.folder)
        print(path if path.exists() else write(path, shape, kind, tokenizer), flush=True)


if __name__ == "__main__":
    main()
