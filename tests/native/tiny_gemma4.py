"""Writes a tiny random Gemma 4 model, and layers that draft for it and read its cells, in a file of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from tests.native.tiny import HEAD_WIDTH, LAYERS, WIDTH, TinyModel

# Width of a row and number of layers of the head.
OWN_WIDTH, OWN_LAYERS = 2 * WIDTH, 2


def gemma4(path: Path, seed: int = 1) -> Path:
    """Writes a model whose even layers attend to the last 32 positions only."""
    model = TinyModel(path, "gemma4", seed, feed_forward=2 * WIDTH)
    _fields(model, LAYERS)
    model.writer.add_embedding_length_per_layer_input(0)
    for layer in range(LAYERS):
        model.attention(layer)
        model.feed_forward(layer)
        for norm in ("attn_norm", "post_attention_norm", "post_ffw_norm"):
            model.ones(f"blk.{layer}.{norm}", WIDTH)
    return model.written("output_norm")


def gemma4_head(path: Path, seed: int = 1) -> Path:
    """Writes layers for `gemma4` with the same seed, most of whose drafts are accepted: their input is the embedding of
    the last token beside the hidden state before, and their output has the model's weights for the former."""
    model = TinyModel(path, "gemma4-assistant", seed, feed_forward=2 * WIDTH)
    _fields(model, OWN_LAYERS)
    model.writer.kv_data[0]["gemma4-assistant.block_count"].value = OWN_LAYERS
    model.writer.kv_data[0]["gemma4-assistant.embedding_length"].value = OWN_WIDTH
    model.writer.add_embedding_length_out(WIDTH)
    model.writer.add_nextn_predict_layers(OWN_LAYERS)
    vocabulary = model.writer.tensors[0].pop("token_embd.weight").shape[0]
    model.writer.tensors[0].pop("output.weight")
    numbers = np.random.default_rng(seed)
    _, output = (numbers.standard_normal((vocabulary, WIDTH), np.float32) for _ in range(2))
    _packed(model, "token_embd", np.concatenate((output, np.zeros_like(output)), axis=1))
    _packed(model, "nextn.pre_projection", np.eye(OWN_WIDTH, dtype=np.float32))
    model.matrix("nextn.post_projection", OWN_WIDTH, WIDTH)
    for layer in range(OWN_LAYERS):
        name = f"blk.{layer}"
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            model.ones(f"{name}.{norm}", OWN_WIDTH)
        model.ones(f"{name}.attn_q_norm", HEAD_WIDTH)
        model.ones(f"{name}.layer_output_scale", 1)
        model.matrix(f"{name}.attn_q", OWN_WIDTH, WIDTH)
        model.matrix(f"{name}.attn_output", WIDTH, OWN_WIDTH)
        for part in ("gate", "up"):
            model.matrix(f"{name}.ffn_{part}", OWN_WIDTH, 2 * WIDTH)
        model.matrix(f"{name}.ffn_down", 2 * WIDTH, OWN_WIDTH)
    return model.written("output_norm", width=OWN_WIDTH)


def _fields(model: TinyModel, layers: int) -> None:
    """Adds the fields of attention, and the factors of rotations."""
    model.heads()
    model.writer.add_key_length_swa(HEAD_WIDTH)
    model.writer.add_value_length_swa(HEAD_WIDTH)
    model.writer.add_sliding_window(32)
    model.writer.add_sliding_window_pattern([layer % 2 == 0 for layer in range(layers)])
    model.ones("rope_freqs", HEAD_WIDTH // 2)


def _packed(model: TinyModel, name: str, weight: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    kind = GGMLQuantizationType.Q8_0
    model.writer.add_tensor(f"{name}.weight", quantize(weight, kind), raw_dtype=kind)
