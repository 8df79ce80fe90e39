"""Tiny GGUFs with random weights, in place of the models that llama-server's test suite loads from a hub.

A test passes with them if it checks shapes, statuses, counts and equalities, and fails if it checks what a trained
model writes. The text models have a vocabulary of 512 tokens, as the suite's own models, so that its prompts fit the
contexts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, PoolingType, TokenType

WIDTH, LAYERS, HEADS = 64, 2, 2
VOCABULARY_TOKENS = 512
TRAINED_CONTEXT = 2048
# The tokens of an SPM vocabulary before its pieces: three special ones and all bytes.
SPECIAL = ("<unk>", "<s>", "</s>")
FIM = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
# Logit, about, of a token that is never sampled. The logits of all other tokens have a standard deviation of about 3.
_NEVER = -60.0

# Called with the path of the file to write and the folder of llama.cpp's sources.
ModelWriter = Callable[[Path, Path], None]


def learned_pieces(text: str, count: int) -> list[str]:
    """Returns the `count` pieces of a byte pair encoding of `text`: its characters, then the merges in their order."""
    words = Counter("\u2581" + word for word in text.split() if word.isascii())
    spellings: dict[str, list[str]] = {word: list(word) for word in words}
    pieces = sorted({character for word in words for character in word})[:count]
    while len(pieces) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spellings.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        first, second = max(pairs, key=lambda pair: (pairs[pair], pair))
        pieces.append(first + second)
        for word, parts in spellings.items():
            spellings[word] = _merged(parts, first, second)
    return pieces


def _merged(parts: list[str], first: str, second: str) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and merged[-1] == first and part == second:
            merged[-1] = first + second
        else:
            merged.append(part)
    return merged


class _Weights:
    """A writer of a GGUF with random weights of one seed."""

    def __init__(self, path: Path, architecture: str, context: int) -> None:
        self.writer = GGUFWriter(path, architecture)
        self._random = np.random.default_rng(1)
        self.writer.add_name(f"tiny {architecture}")
        self.writer.add_context_length(context)
        self.writer.add_embedding_length(WIDTH)
        self.writer.add_block_count(LAYERS)
        self.writer.add_feed_forward_length(2 * WIDTH)
        self.writer.add_head_count(HEADS)

    def random(self, rows: int, columns: int, gain: float = 1.0) -> np.ndarray[Any, Any]:
        """Returns a matrix whose products are about `gain` times as large as its inputs."""
        return self._random.standard_normal((rows, columns), np.float32) * np.float32(gain / columns**0.5)

    def add(self, name: str, values: np.ndarray[Any, Any]) -> None:
        """Adds a tensor."""
        self.writer.add_tensor(name, np.ascontiguousarray(values, np.float32))

    def norm(self, name: str, *, bias: bool) -> None:
        """Adds a norm that changes no scale."""
        self.add(f"{name}.weight", np.ones(WIDTH))
        if bias:
            self.add(f"{name}.bias", np.zeros(WIDTH))

    def attention(self, layer: int) -> None:
        """Adds queries, keys, values and the output, which leaves the first dimension unchanged."""
        for name, gain in (("attn_q", 2.0), ("attn_k", 2.0), ("attn_v", 1.0)):
            self.add(f"blk.{layer}.{name}.weight", self.random(WIDTH, WIDTH, gain))
        self.add(f"blk.{layer}.attn_output.weight", _without_first(self.random(WIDTH, WIDTH)))

    def close(self) -> None:
        """Completes the file."""
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def _without_first(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    matrix[0] = 0
    return matrix


def write_llama(path: Path, sources: Path, fim: tuple[str, ...] = ()) -> None:
    """Writes a text model that samples only pieces of text, so that no output ends by itself. `fim` are the names of
    its tokens for filling in."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *fim]
    special = len(tokens)
    tokens += learned_pieces((sources / "README.md").read_text("utf-8"), VOCABULARY_TOKENS - special)
    model = _Weights(path, "llama", TRAINED_CONTEXT)
    model.writer.add_head_count_kv(HEADS)
    model.writer.add_layer_norm_rms_eps(1e-5)
    model.writer.add_rope_dimension_count(WIDTH // HEADS)
    model.writer.add_vocab_size(len(tokens))
    _add_spm_vocabulary(model.writer, tokens, fim)
    # The first dimension is the same for all tokens and contexts. It lowers the logits of all but the pieces.
    embedding = model.random(len(tokens), WIDTH, 8.0)
    embedding[:, 0] = 1
    output = model.random(len(tokens), WIDTH, 3.0)
    output[:, 0] = 0
    output[:special] = 0
    output[:special, 0] = _NEVER
    model.add("token_embd.weight", embedding)
    model.add("output.weight", output)
    for layer in range(LAYERS):
        model.norm(f"blk.{layer}.attn_norm", bias=False)
        model.attention(layer)
        model.norm(f"blk.{layer}.ffn_norm", bias=False)
        model.add(f"blk.{layer}.ffn_gate.weight", model.random(2 * WIDTH, WIDTH))
        model.add(f"blk.{layer}.ffn_up.weight", model.random(2 * WIDTH, WIDTH))
        model.add(f"blk.{layer}.ffn_down.weight", _without_first(model.random(WIDTH, 2 * WIDTH)))
    model.norm("output_norm", bias=False)
    model.close()


def _add_spm_vocabulary(writer: GGUFWriter, tokens: list[str], fim: tuple[str, ...]) -> None:
    pieces = range(len(SPECIAL) + 256 + len(fim), len(tokens))
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    kinds += [TokenType.CONTROL] * len(fim) + [TokenType.NORMAL] * len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(pieces.start - token) if token in pieces else 0.0 for token in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    for name, token in zip(("pre", "suf", "mid"), fim, strict=False):
        writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", tokens.index(token))


def write_infill(path: Path, sources: Path) -> None:
    """Writes the text model with tokens for filling in."""
    write_llama(path, sources, FIM)


def write_bert(path: Path, sources: Path, pooling: PoolingType = PoolingType.CLS) -> None:
    """Writes an embedding model with the vocabulary of BERT, or a reranker for the pooling type RANK."""
    vocabulary = GGUFReader(sources / "models" / "ggml-vocab-bert-bge.gguf")
    model = _Weights(path, "bert", 512)
    model.writer.add_layer_norm_eps(1e-12)
    model.writer.add_causal_attention(False)
    model.writer.add_pooling_type(pooling)
    names = [name for name in vocabulary.fields if name.startswith("tokenizer.") and name != "tokenizer.chat_template"]
    for name in names:
        field = vocabulary.fields[name]
        items = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        model.writer.add_key_value(name, field.contents(), field.types[0], sub_type=items)
    if "tokenizer.ggml.token_type_count" not in names:
        model.writer.add_token_type_count(2)
    count = len(vocabulary.fields["tokenizer.ggml.tokens"].data)
    model.add("token_embd.weight", model.random(count, WIDTH, 8.0))
    model.add("token_types.weight", model.random(2, WIDTH))
    model.add("position_embd.weight", model.random(512, WIDTH))
    model.norm("token_embd_norm", bias=True)
    for layer in range(LAYERS):
        model.attention(layer)
        model.norm(f"blk.{layer}.attn_output_norm", bias=True)
        model.add(f"blk.{layer}.ffn_up.weight", model.random(2 * WIDTH, WIDTH))
        model.add(f"blk.{layer}.ffn_down.weight", model.random(WIDTH, 2 * WIDTH))
        model.norm(f"blk.{layer}.layer_output_norm", bias=True)
    if pooling == PoolingType.RANK:
        model.add("cls.weight", model.random(WIDTH, WIDTH))
        model.add("cls.bias", np.zeros(WIDTH))
        model.add("cls.output.weight", model.random(1, WIDTH))
        model.add("cls.output.bias", np.zeros(1))
    model.close()


def write_reranker(path: Path, sources: Path) -> None:
    """Writes a reranker."""
    write_bert(path, sources, PoolingType.RANK)


MODEL_WRITERS: Mapping[str, ModelWriter] = {
    "llama.gguf": write_llama,
    "infill.gguf": write_infill,
    "bert.gguf": write_bert,
    "rerank.gguf": write_reranker,
}


def write_models(folder: Path, sources: Path) -> None:
    """Writes each model that `folder` lacks. `sources` is the folder of llama.cpp's sources."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in MODEL_WRITERS.items():
        if not (folder / name).exists():
            write(folder / f"{name}.part", sources)
            (folder / f"{name}.part").rename(folder / name)
