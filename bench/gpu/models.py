"""Models of any size without weights to bring: `python -m bench.gpu.models 8b:q4_0 0.1b:q8_0`.

Shapes are Llama's, weights are random, the tokenizer is SmolLM2's. What such a model says is noise, but a step costs
what it would cost with real weights, and its logits are about as peaked as a real model's, so that sampling has as much
to do. A file is written about as fast as the disk takes it: all tensors are views of one pool of random blocks.
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

from bench.models import FOLDER, SOURCES

Bytes = NDArray[np.uint8]
BUNDLED = FOLDER.parent / ".gpu" / "tokenizer.gguf"
"""A GGUF without tensors that has SmolLM2's vocabulary, as `bench.gpu.bundle` brings it."""
PEAKED = 8.0
"""Standard deviation of the logits: of 49k tokens the likeliest has then a few tenths of the mass."""


class Shape(Struct, frozen=True):
    """A model's sizes. Heads have `width / heads` values."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    """Of the feed-forward part."""


SHAPES = {
    "tiny": Shape(256, 4, 4, 2, 512),
    "0.1b": Shape(768, 12, 12, 4, 2048),
    "1b": Shape(2048, 16, 32, 8, 8192),
    "8b": Shape(4096, 32, 32, 8, 14336),
}
"""By name; the last two are those of Llama 3."""


class Kind(NamedTuple):
    """A type of weights, which lie in blocks."""

    type: GGMLQuantizationType
    values: int
    bytes: int


KINDS = {
    "q4_0": Kind(GGMLQuantizationType.Q4_0, 32, 18),
    "q8_0": Kind(GGMLQuantizationType.Q8_0, 32, 34),
    "f16": Kind(GGMLQuantizationType.F16, 1, 2),
}
SPREAD = {"q4_0": 4.63, "q8_0": 73.9}
"""Standard deviation of a random block's values by its scale; for F16 the values themselves are drawn."""


class Pool:
    """Random blocks of one type, of which tensors are views: weights with a standard deviation of `deviation`."""

    def __init__(self, name: str, values: int, deviation: float, seed: int = 1) -> None:
        """At least `values` weights can be taken at once."""
        self.kind = KINDS[name]
        self._random = np.random.default_rng(seed)
        blocks = values // self.kind.values
        self._spare = blocks // 8
        self._blocks = self._filled(name, blocks + self._spare, deviation)

    def _filled(self, name: str, blocks: int, deviation: float) -> Bytes:
        """The blocks, [blocks, bytes of one]."""
        if name == "f16":
            drawn = self._random.standard_normal(blocks, np.float32)
            drawn *= deviation
            return drawn.astype(np.float16).view(np.uint8).reshape(blocks, 2)
        filled = self._random.integers(0, 256, (blocks, self.kind.bytes), np.uint8)
        scale = np.float16(deviation / SPREAD[name])
        signs = self._random.integers(0, 2, blocks, np.uint8)  # as 4-bit values are not centred at 0
        filled[:, :2] = np.where(signs[:, None], np.array([scale]).view(np.uint8), np.array([-scale]).view(np.uint8))
        return filled

    def take(self, rows: int, columns: int) -> NDArray[Any]:
        """A weight that makes `rows` values of `columns`, as the writer takes it."""
        count = rows * columns // self.kind.values
        start = int(self._random.integers(0, self._spare + 1)) if self._spare else 0
        taken = self._blocks[start : start + count].reshape(rows, -1)
        return taken.view(np.float16) if self.kind.values == 1 else taken


def weights(shape: Shape, vocabulary: int) -> Iterator[tuple[str, int, int]]:
    """Names, rows and columns of all matrices."""
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


def write(path: Path, shape: Shape, kind: str, tokenizer: Path) -> Path:
    """Writes a model to `path`, whole or not at all, with the vocabulary of the GGUF `tokenizer`."""
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
    pool = Pool(kind, max(rows * columns for _, rows, columns in needed), 1 / sqrt(shape.width))
    for name, rows, columns in needed:
        writer.add_tensor(f"{name}.weight", pool.take(rows, columns), raw_dtype=pool.kind.type)
    for name in ("attn_norm", "ffn_norm"):
        for layer in range(shape.layers):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(shape.width, np.float32))
    writer.add_tensor("output_norm.weight", np.full(shape.width, PEAKED, np.float32))
    _finish(writer)
    return part.replace(path)


def write_tokenizer(source: Path, target: Path) -> Path:
    """Writes the vocabulary of the GGUF `source`, and nothing else of it, to `target`, whole or not at all."""
    part = target.with_suffix(".part")
    writer = GGUFWriter(part, "llama")
    copy_fields(GGUFReader(source), writer, "tokenizer.")
    _finish(writer)
    return part.replace(target)


def copy_fields(reader: GGUFReader, writer: GGUFWriter, prefix: str) -> None:
    """Gives `writer` the metadata of `reader` whose keys begin so."""
    for name, field in reader.fields.items():
        if name.startswith(prefix):
            writer.add_key_value(name, *value_of(field))


def value_of(field: ReaderField) -> tuple[Any, GGUFValueType, GGUFValueType | None]:
    """A value of the metadata with its type, and that of its elements if it is a list, as a writer takes them."""
    return field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def parse(model: str) -> tuple[Shape, str]:
    """The shape and the type of weights that `model`, such as 8b:q4_0, means. Raises SystemExit."""
    shape, _, kind = model.partition(":")
    if shape not in SHAPES or kind not in KINDS:
        raise SystemExit(f"there is no {model!r}: a model is one of {', '.join(SHAPES)}, a colon, {' or '.join(KINDS)}")
    return SHAPES[shape], kind


def path_of(model: str, folder: Path) -> Path:
    """The file of a model in `folder`."""
    return folder / f"random-{model.replace(':', '-')}.gguf"


def main() -> None:
    """Writes those models that are not there yet, and prints their paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help=f"of {', '.join(SHAPES)}, each with :{', :'.join(KINDS)}")
    parser.add_argument("-o", "--folder", type=Path, default=FOLDER / "random")
    options = parser.parse_args()
    tokenizer = BUNDLED if BUNDLED.exists() else SOURCES["smollm2"].path
    options.folder.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        shape, kind = parse(model)
        path = path_of(model, options.folder)
        print(path if path.exists() else write(path, shape, kind, tokenizer), flush=True)


if __name__ == "__main__":
    main()
