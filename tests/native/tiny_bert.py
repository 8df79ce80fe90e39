"""GGUFs of BERT models with random weights and an alphabet as vocabulary, for embeddings and reranking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, PoolingType, TokenType

WIDTH, LAYERS, HIDDEN, CONTEXT = 64, 2, 128, 128
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def bert(path: Path, *, ranks: bool = False, pooling: PoolingType | None = PoolingType.MEAN, seed: int = 1) -> Path:
    """Writes a BERT. With `ranks` it has a classification head with one score. Words are tokenized by letters."""
    writer = GGUFWriter(path, "bert")
    random = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!"
    tokens = [*SPECIAL, *(f"\u2581{letter}" for letter in letters), *letters]
    writer.add_name("tiny bert")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(False)
    writer.add_token_type_count(2)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens])
    for number, name in enumerate(("pad", "unk", "bos", "sep", "mask")):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_eos_token_id(3)

    def add(name: str, *shape: int, gain: float = 1.0) -> None:
        weight = random.standard_normal(shape, np.float32) * np.float32(gain / shape[-1] ** 0.5)
        writer.add_tensor(f"{name}.weight", weight)
        writer.add_tensor(f"{name}.bias", random.standard_normal(shape[0], np.float32) * np.float32(0.1))

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(WIDTH, np.float32))

    for name, count in (("token_embd", len(tokens)), ("position_embd", CONTEXT), ("token_types", 2)):
        writer.add_tensor(f"{name}.weight", random.standard_normal((count, WIDTH), np.float32))
    add_norm("token_embd_norm")
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}", WIDTH, WIDTH, gain=2)
        add_norm(f"blk.{layer}.attn_output_norm")
        add(f"blk.{layer}.ffn_up", HIDDEN, WIDTH)
        add(f"blk.{layer}.ffn_down", WIDTH, HIDDEN)
        add_norm(f"blk.{layer}.layer_output_norm")
    if ranks:
        add("cls", WIDTH, WIDTH)
        add("cls.output", 1, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
