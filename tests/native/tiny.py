"""GGUFs of less than a megabyte with random weights, for kinds of models whose real files are too large for tests.

Their outputs depend on the whole context and do not repeat soon, but have no meaning. The weights are Q8_0, whose
kernels compute the same bits for a row in every batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

WIDTH, LAYERS = 64, 4
# Values of a head. Two heads of queries share one head of keys and values, so that a cell is one block of Q8_0.
HEAD_WIDTH = 32
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def recurrent(path: Path, seed: int = 1) -> Path:
    """Writes a model with one state instead of cells (Mamba)."""
    inner, state, rank = 2 * WIDTH, 16, 32
    model = TinyModel(path, "mamba", seed, feed_forward=0)
    model.writer.add_ssm_conv_kernel(4)
    model.writer.add_ssm_inner_size(inner)
    model.writer.add_ssm_state_size(state)
    model.writer.add_ssm_time_step_rank(rank)
    for layer in range(LAYERS):
        model.ones(f"blk.{layer}.attn_norm", WIDTH)
        model.matrix(f"blk.{layer}.ssm_in", WIDTH, 2 * inner, gain=1.5)
        model.numbers(f"blk.{layer}.ssm_conv1d.weight", model.random(inner, 4))
        model.numbers(f"blk.{layer}.ssm_conv1d.bias", np.zeros(inner))
        model.matrix(f"blk.{layer}.ssm_x", inner, rank + 2 * state, gain=2)
        model.matrix(f"blk.{layer}.ssm_dt", rank, inner)
        model.numbers(f"blk.{layer}.ssm_dt.bias", np.full(inner, -2))  # a state lasts for tens of tokens
        model.numbers(f"blk.{layer}.ssm_a", -np.tile(np.linspace(0.1, 2, state), (inner, 1)))
        model.ones(f"blk.{layer}.ssm_d", inner, suffix="")
        model.matrix(f"blk.{layer}.ssm_out", inner, WIDTH, gain=2)
    return model.written("output_norm")


def hybrid(path: Path, seed: int = 1) -> Path:
    """Writes a model whose even layers have a state and whose odd layers have cells (LFM2)."""
    model = TinyModel(path, "lfm2", seed, feed_forward=2 * WIDTH)
    model.writer.add_shortconv_l_cache(3)
    model.writer.add_head_count(WIDTH // HEAD_WIDTH)
    model.writer.add_head_count_kv([layer % 2 for layer in range(LAYERS)])
    model.writer.add_vocab_size(len(_tokens()[0]))
    for layer in range(LAYERS):
        model.ones(f"blk.{layer}.attn_norm", WIDTH)
        if layer % 2:
            model.attention(layer)
        else:
            model.matrix(f"blk.{layer}.shortconv.in_proj", WIDTH, 3 * WIDTH)
            model.numbers(f"blk.{layer}.shortconv.conv.weight", model.random(WIDTH, 3))
            model.matrix(f"blk.{layer}.shortconv.out_proj", WIDTH, WIDTH)
        model.feed_forward(layer)
    return model.written("token_embd_norm")


def delta_net(path: Path, seed: int = 1, *, mtp: bool = False) -> Path:
    """Writes a model whose even layers are gated delta nets and whose odd layers have cells (Qwen3.5). With `mtp` it
    has an MTP layer, most of whose drafts are accepted."""
    state, heads = 32, 2
    inner, channels = state * heads, 2 * state + state * heads
    model = TinyModel(path, "qwen35", seed, feed_forward=2 * WIDTH, mtp=mtp)
    model.heads()
    model.writer.add_rope_dimension_count(HEAD_WIDTH)
    model.writer.add_rope_dimension_sections([8, 4, 4, 0])
    model.writer.add_uint32("qwen35.full_attention_interval", 2)
    model.ssm(inner, state, heads)
    for layer in range(LAYERS):
        name = f"blk.{layer}"
        model.ones(f"{name}.attn_norm", WIDTH)
        if layer % 2:
            model.attention(layer, queries=2 * WIDTH)  # queries and gates
        else:
            model.matrix(f"{name}.attn_qkv", WIDTH, channels)
            model.matrix(f"{name}.attn_gate", WIDTH, inner)
            model.numbers(f"{name}.ssm_conv1d.weight", model.random(channels, 4))
            model.numbers(f"{name}.ssm_dt.bias", np.full(heads, -2))
            model.numbers(f"{name}.ssm_a", -np.linspace(0.1, 1, heads))
            model.matrix(f"{name}.ssm_beta", WIDTH, heads)
            model.matrix(f"{name}.ssm_alpha", WIDTH, heads)
            model.ones(f"{name}.ssm_norm", state)
            model.matrix(f"{name}.ssm_out", inner, WIDTH)
        model.ones(f"{name}.post_attention_norm", WIDTH)
        model.feed_forward(layer, norm=False)
    if mtp:
        model.mtp(LAYERS)
        model.attention(LAYERS, queries=2 * WIDTH)
        model.feed_forward(LAYERS, norm=False)
    return model.written("output_norm")


def mamba2(path: Path, seed: int = 1) -> Path:
    """Writes a model with two layers with a state, one with cells and one feed-forward layer (Nemotron-H)."""
    inner, state, heads, hidden = 2 * WIDTH, 16, 4, 2 * WIDTH
    channels = inner + 2 * state
    model = TinyModel(path, "nemotron_h", seed, feed_forward=[0, 0, 0, hidden])
    model.heads([0, 1, 0, 0])
    model.writer.add_layer_norm_eps(1e-5)
    model.ssm(inner, state, heads)
    for layer in range(LAYERS):
        model.ones(f"blk.{layer}.attn_norm", WIDTH)
    for layer in (0, 2):
        model.matrix(f"blk.{layer}.ssm_in", WIDTH, inner + channels + heads, gain=1.5)
        model.numbers(f"blk.{layer}.ssm_conv1d.weight", model.random(channels, 4))
        model.numbers(f"blk.{layer}.ssm_conv1d.bias", np.zeros(channels))
        model.numbers(f"blk.{layer}.ssm_dt.bias", np.full(heads, -2))
        model.numbers(f"blk.{layer}.ssm_a", -np.linspace(0.1, 2, heads)[:, None])
        model.numbers(f"blk.{layer}.ssm_d", np.ones((heads, 1)))
        model.numbers(f"blk.{layer}.ssm_norm.weight", np.ones((1, inner)))
        model.matrix(f"blk.{layer}.ssm_out", inner, WIDTH, gain=2)
    model.attention(1, norms=False)
    model.matrix("blk.3.ffn_up", WIDTH, hidden)
    model.matrix("blk.3.ffn_down", hidden, WIDTH, gain=2)
    return model.written("output_norm")


def windowed(path: Path, window: int = 32, seed: int = 1) -> Path:
    """Writes a model whose even layers attend to the last `window` positions only (Gemma 3); 0 means all positions."""
    model = TinyModel(path, "gemma3", seed, feed_forward=2 * WIDTH)
    model.heads()
    model.writer.add_sliding_window(window)
    model.writer.add_sliding_window_pattern([layer % 2 == 0 for layer in range(LAYERS)])
    for layer in range(LAYERS):
        model.ones(f"blk.{layer}.attn_norm", WIDTH)
        model.attention(layer)
        model.ones(f"blk.{layer}.post_attention_norm", WIDTH)
        model.feed_forward(layer)
        model.ones(f"blk.{layer}.post_ffw_norm", WIDTH)
    return model.written("output_norm")


def grid(path: Path, seed: int = 1) -> Path:
    """Writes a model whose rows in images have positions in a grid (Qwen2-VL)."""
    model = TinyModel(path, "qwen2vl", seed, feed_forward=2 * WIDTH)
    model.heads()
    model.writer.add_rope_dimension_sections([4, 6, 6, 0])
    for layer in range(LAYERS):
        model.numbers(f"blk.{layer}.attn_norm.weight", np.full(WIDTH, 1.7))  # in place of norms of queries and keys
        model.attention(layer, norms=False)
        model.ones(f"blk.{layer}.ffn_norm", WIDTH)
        model.feed_forward(layer, norm=False)
    return model.written("output_norm")


def experts(path: Path, seed: int = 1) -> Path:
    """Writes a model whose feed-forward parts are two of four experts (Mixtral)."""
    model = TinyModel(path, "llama", seed, feed_forward=2 * WIDTH)
    model.heads()
    model.writer.add_rope_dimension_count(HEAD_WIDTH)
    model.writer.add_expert_count(4)
    model.writer.add_expert_used_count(2)
    for layer in range(LAYERS):
        model.ones(f"blk.{layer}.attn_norm", WIDTH)
        model.attention(layer, norms=False)
        model.ones(f"blk.{layer}.ffn_norm", WIDTH)
        model.matrix(f"blk.{layer}.ffn_gate_inp", WIDTH, 4)
        model.matrix(f"blk.{layer}.ffn_gate_exps", WIDTH, 2 * WIDTH, of=4)
        model.matrix(f"blk.{layer}.ffn_up_exps", WIDTH, 2 * WIDTH, of=4)
        model.matrix(f"blk.{layer}.ffn_down_exps", 2 * WIDTH, WIDTH, gain=2, of=4)
    return model.written("output_norm")


def with_mtp(path: Path, seed: int = 1, *, part: str = "") -> Path:
    """Writes a model with cells in all layers and an MTP layer, most of whose drafts are accepted (GLM-4.5). `part` is
    that of `TinyModel.written`."""
    hidden = 2 * WIDTH
    model = TinyModel(path, "glm4moe", seed, feed_forward=hidden, mtp=True)
    model.heads()
    model.writer.add_rope_dimension_count(HEAD_WIDTH)
    model.writer.add_leading_dense_block_count(LAYERS)
    model.writer.add_expert_feed_forward_length(hidden)
    model.writer.add_expert_count(2)
    model.writer.add_expert_used_count(1)
    model.writer.add_expert_shared_count(1)
    model.writer.add_expert_weights_scale(1.0)
    model.writer.add_expert_weights_norm(True)
    for layer in range(LAYERS):
        model.ones(f"blk.{layer}.attn_norm", WIDTH)
        model.attention(layer)
        model.ones(f"blk.{layer}.post_attention_norm", WIDTH)
        model.feed_forward(layer, norm=False)
    name = f"blk.{LAYERS}"
    model.mtp(LAYERS)
    model.attention(LAYERS)
    model.matrix(f"{name}.ffn_gate_inp", WIDTH, 2)
    model.numbers(f"{name}.exp_probs_b.bias", np.zeros(2))
    for kind, of in (("exps", 2), ("shexp", 0)):
        model.matrix(f"{name}.ffn_gate_{kind}", WIDTH, hidden, of=of)
        model.matrix(f"{name}.ffn_up_{kind}", WIDTH, hidden, of=of)
        model.matrix(f"{name}.ffn_down_{kind}", hidden, WIDTH, of=of)
    return model.written("output_norm", part)


def with_mtp_layers(path: Path, count: int = 3, seed: int = 1) -> Path:
    """Writes a model with `count` MTP layers, most of whose drafts are accepted; even layers attend to the last 32
    positions only (Step 3.5)."""
    model = TinyModel(path, "step35", seed, feed_forward=2 * WIDTH, mtp=count)
    model.heads()
    model.writer.add_rope_dimension_count(HEAD_WIDTH)
    model.writer.add_expert_feed_forward_length(2 * WIDTH)
    model.writer.add_sliding_window(32)
    model.writer.add_sliding_window_pattern([layer % 2 == 0 for layer in range(LAYERS + count)])
    for layer in range(LAYERS + count):
        if layer < LAYERS:
            model.ones(f"blk.{layer}.attn_norm", WIDTH)
            model.ones(f"blk.{layer}.ffn_norm", WIDTH)
        else:
            model.mtp(layer, "ffn_norm")
        model.attention(layer)
        model.feed_forward(layer, norm=False)
    return model.written("output_norm")


def without_layers(path: Path, architecture: str) -> Path:
    """Writes a file of this architecture without any layers."""
    return TinyModel(path, architecture, 1, feed_forward=WIDTH).written("output_norm")


class TinyModel:
    """A writer of a GGUF: the vocabulary, the fields common to all kinds, and weights from one seed."""

    def __init__(
        self, path: Path, architecture: str, seed: int, feed_forward: int | list[int], *, mtp: int = 0
    ) -> None:
        self.path = path
        self.writer = GGUFWriter(path, architecture)
        self._random = np.random.default_rng(seed)
        self._hidden = feed_forward if isinstance(feed_forward, int) else max(feed_forward)
        self.writer.add_name(f"tiny {architecture}")
        self.writer.add_context_length(8192)
        self.writer.add_embedding_length(WIDTH)
        self.writer.add_block_count(LAYERS + mtp)
        if mtp:
            self.writer.add_nextn_predict_layers(mtp)
        self.writer.add_feed_forward_length(feed_forward)
        self.writer.add_layer_norm_rms_eps(1e-5)
        if architecture == "mamba":
            self.writer.add_head_count(0)
        self._vocabulary()
        size = len(_tokens()[0])
        # Gemma multiplies by 8. A large embedding makes the next token depend on the last one most.
        gain = {"gemma3": 1, "gemma4": 16}.get(architecture, 128 if mtp else 8)
        self.matrix("token_embd", WIDTH, size, gain=gain)
        self.matrix("output", WIDTH, size, gain=3)

    def _vocabulary(self) -> None:
        tokens, merges = _tokens()
        kinds = [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens]
        self.writer.add_tokenizer_model("gpt2")
        self.writer.add_tokenizer_pre("gpt-2")
        self.writer.add_token_list(tokens)
        self.writer.add_token_types(kinds)
        self.writer.add_token_merges(merges)
        self.writer.add_bos_token_id(1)
        self.writer.add_eos_token_id(2)
        self.writer.add_add_bos_token(False)
        self.writer.add_chat_template(TEMPLATE)

    def attention(self, layer: int, *, norms: bool = True, queries: int = WIDTH) -> None:
        """Adds queries, keys and values. Their norms make the scores large, so that a few positions matter most."""
        self.matrix(f"blk.{layer}.attn_q", WIDTH, queries)
        self.matrix(f"blk.{layer}.attn_k", WIDTH, HEAD_WIDTH)
        self.matrix(f"blk.{layer}.attn_v", WIDTH, HEAD_WIDTH, gain=2)
        self.matrix(f"blk.{layer}.attn_output", WIDTH, WIDTH)
        for norm in ("attn_q_norm", "attn_k_norm") if norms else ():
            self.numbers(f"blk.{layer}.{norm}.weight", np.full(HEAD_WIDTH, 1.7))

    def mtp(self, layer: int, second_norm: str = "post_attention_norm") -> None:
        """Adds the norms of an MTP layer and its projection, which adds the embedding of the last token, as large as in
        the first layer, and the hidden state before it."""
        name = f"blk.{layer}"
        for norm in ("attn_norm", second_norm, "nextn.hnorm", "nextn.shared_head_norm"):
            self.ones(f"{name}.{norm}", WIDTH)
        self.numbers(f"{name}.nextn.enorm.weight", np.full(WIDTH, 16))
        both = quantize(np.tile(np.eye(WIDTH, dtype=np.float32), 2), GGMLQuantizationType.Q8_0)
        self.writer.add_tensor(f"{name}.nextn.eh_proj.weight", both, raw_dtype=GGMLQuantizationType.Q8_0)

    def heads(self, kv: int | list[int] = 1) -> None:
        """Adds the numbers and sizes of heads; `kv` has the heads of keys of all layers or of each."""
        self.writer.add_head_count(WIDTH // HEAD_WIDTH)
        self.writer.add_head_count_kv(kv)
        self.writer.add_key_length(HEAD_WIDTH)
        self.writer.add_value_length(HEAD_WIDTH)

    def ssm(self, inner: int, state: int, heads: int) -> None:
        """Adds the sizes of recurrent states."""
        self.writer.add_ssm_conv_kernel(4)
        self.writer.add_ssm_inner_size(inner)
        self.writer.add_ssm_state_size(state)
        self.writer.add_ssm_time_step_rank(heads)
        self.writer.add_ssm_group_count(1)

    def feed_forward(self, layer: int, *, norm: bool = True) -> None:
        """Adds the gated feed-forward part, with its norm if `norm`."""
        if norm:
            self.ones(f"blk.{layer}.ffn_norm", WIDTH)
        self.matrix(f"blk.{layer}.ffn_gate", WIDTH, self._hidden)
        self.matrix(f"blk.{layer}.ffn_up", WIDTH, self._hidden)
        self.matrix(f"blk.{layer}.ffn_down", self._hidden, WIDTH, gain=2)

    def random(self, *shape: int) -> np.ndarray[Any, Any]:
        """Returns the seed's next normal random numbers, of unit variance."""
        return self._random.standard_normal(shape, np.float32)

    def matrix(self, name: str, columns: int, rows: int, gain: float = 1.0, of: int = 0) -> None:
        """Adds a weight of `columns` inputs and `rows` outputs, or `of` of them for experts; outputs are about `gain`
        times as large as inputs."""
        shape = (of, rows, columns) if of else (rows, columns)
        weight = quantize(self.random(*shape) * np.float32(gain / columns**0.5), GGMLQuantizationType.Q8_0)
        self.writer.add_tensor(f"{name}.weight", weight, raw_dtype=GGMLQuantizationType.Q8_0)

    def numbers(self, name: str, values: np.ndarray[Any, Any]) -> None:
        """Adds a tensor of these values."""
        self.writer.add_tensor(name, values.astype(np.float32))

    def ones(self, name: str, count: int, suffix: str = ".weight") -> None:
        """Adds a weight of ones."""
        self.numbers(name + suffix, np.ones(count))

    def written(self, norm: str, part: str = "", width: int = WIDTH) -> Path:
        """Completes the file and returns its path; `norm` is the architecture's name of the last norm. The file has all
        layers, or as `part` only the MTP layers (`head`) or the others (`trunk`)."""
        self.ones(norm, width)
        if part:
            tensors, metadata = self.writer.tensors[0], self.writer.kv_data[0]
            for name in [name for name in tensors if name.startswith("blk.")]:
                if (int(name.split(".")[1]) >= LAYERS) != (part == "head"):
                    del tensors[name]
            if part == "trunk":
                metadata[f"{self.writer.arch}.block_count"].value = LAYERS
                del metadata[f"{self.writer.arch}.nextn_predict_layers"]
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path


def _tokens() -> tuple[list[str], list[str]]:
    """Returns the tokens (special ones, all bytes in GPT-2's spelling, pairs of letters) and the merges of the
    pairs."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {byte: chr(byte) for byte in plain}
    for number, byte in enumerate(byte for byte in range(256) if byte not in spelled):
        spelled[byte] = chr(256 + number)
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(spelled[ord(" ")], letter) for letter in letters]
    pairs += [
        pair for one in "aeiou" for other in letters if other not in "aeiou" for pair in ((one, other), (other, one))
    ]
    tokens = [*SPECIAL, *(spelled[byte] for byte in range(256)), *(first + second for first, second in pairs)]
    return tokens, [f"{first} {second}" for first, second in pairs]
