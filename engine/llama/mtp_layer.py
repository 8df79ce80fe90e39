"""The MTP layers of a model (llama.cpp: NextN): conditions for their use, the size of their cells, their contexts."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as native
from llama_cpp import llama_cpp_ext as staged
from numpy.typing import NDArray

from engine.backend import HostWork, Logits, no_host_work
from engine.config import EngineConfig
from engine.contents import model_files
from engine.llama.context import LlamaContext
from engine.llama.gguf_file import tensor_types
from engine.llama.params import cell_bytes, metadata

# Architectures whose MTP layers the library computes in a context with plain cells.
ARCHITECTURES = (
    *("bailingmoe3", "cohere2moe", "deepseek2", "deepseek32", "glm-dsa", "glm4moe", "hy_v3", "mimo2"),
    *("nemotron_h_moe", "qwen35", "qwen35moe", "qwen3next", "step35"),
)
# Those of which it also computes a second and further layers (`llama_set_nextn_layer_offset`). For the others it ends
# the process, except for hy_v3, where it returns the hidden states of the first rows instead of those with output.
SEVERAL_LAYERS = ("mimo2", "step35")
# Architectures of heads that have no cells but read those of a model, with the architecture of that model.
CELL_READERS = {"gemma4-assistant": "gemma4"}

Hidden = NDArray[np.float32]


def loads_mtp(config: EngineConfig) -> bool:
    """Returns True if `config` asks for MTP layers, and the GGUF contains their weights."""
    return config.mtp and _num_weighted_layers(Path(config.model.path)) > 0


def _num_weighted_layers(path: Path) -> int:
    """Returns the number of MTP layers whose weights are in a file, which may be split."""
    names = [name for part in model_files(path) for name in tensor_types(part)]
    return len({name.split(".")[1] for name in names if ".nextn." in name})


def mtp_problem(model: Any, path: Path) -> str:
    """Returns the reason why the MTP layers of a model, which was loaded from `path`, cannot be used; empty if they
    can."""
    family, layers = metadata(model, "general.architecture"), num_layers(model)
    if family in CELL_READERS:
        return ""
    if family not in ARCHITECTURES:
        return f"llama.cpp computes no MTP layers of the architecture {family}"
    if layers > 1 and family not in SEVERAL_LAYERS:
        return f"the model has {layers} MTP layers, and llama.cpp computes only one of the architecture {family}"
    if layers > (weighted := _num_weighted_layers(path)):  # the library would end the process
        return f"the file has the weights of {weighted} MTP layers, and its metadata claim {layers}"
    return ""


def reads_cells(head: Any) -> bool:
    """Returns True if `head` reads the cells of the model for which it drafts."""
    return metadata(head, "general.architecture") in CELL_READERS


def num_layers(head: Any) -> int:
    """Returns the number of MTP layers with cells of a loaded model; 0 for None."""
    return int(native.llama_model_n_layer_nextn(head)) if head and not reads_cells(head) else 0


def model_cell_bytes(config: EngineConfig, model: Any, head: Any) -> int:
    """Returns the bytes of one cell in all layers of `model` together and in the MTP layers of `head`, which may be
    None: each of these has a context of its own, in which the library allocates the cells of all."""
    trunk, layers = cell_bytes(config.model, model), int(native.llama_model_n_layer(model))
    return trunk + num_layers(head) ** 2 * -(-trunk // layers)


def mtp_params(params: Any, other: Any, layers: int) -> Any:
    """Returns the parameters of the context of one of `layers` MTP layers, given the model's context `other` and its
    `params`."""
    result = type(params).from_buffer_copy(params)
    result.ctx_type, result.ctx_other = native.LLAMA_CONTEXT_TYPE_MTP, other
    result.n_batch = max(params.n_batch, layers * params.n_seq_max)  # a further layer computes the whole draft
    result.n_outputs_max, result.n_rs_seq = params.n_seq_max, 0
    result.samplers, result.n_samplers = None, 0
    return result


class MtpLayer(LlamaContext):
    """The cells of one MTP layer. Each row of its batch has a token and the hidden state of the position before."""

    def __init__(self, model: Any, params: Any, other: Any, index: int, *, window: int) -> None:
        """`other` is the model's context, which was opened with `params`. Raises NativeFault."""
        self.width: int = native.llama_model_n_embd_out(model)
        self._hidden: Hidden | None = None
        super().__init__(model, mtp_params(params, other, num_layers(model)), partial=True, window=window)
        staged.llama_set_embeddings_nextn(self._handle, True, True)
        staged.llama_set_nextn_layer_offset(self._handle, index)

    @property
    def hidden(self) -> Hidden:
        """The hidden states of the batch's rows."""
        if self._hidden is None:
            self._hidden = np.zeros((self.batch.capacity, self.width), np.float32)
            self._native_batch.embd = self._hidden.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        return self._hidden

    def decode(self, host_work: HostWork = no_host_work) -> Logits:
        """See `Decoder.decode`."""
        assert self.hidden is not None, "the batch has hidden states"
        return super().decode(host_work)

    def add(self, seq: int, start: int, tokens: Sequence[int] | array[int], hidden: Hidden, outputs: int = 0) -> None:
        """Adds rows to the batch, see `Batch.add`. `hidden` has the hidden state of the position before each row."""
        self.hidden[self.batch.rows : self.batch.rows + len(tokens)] = hidden
        self.batch.add(seq, start, tokens, outputs)

    def output_states(self) -> Hidden:
        """Returns the hidden states of the last decode's rows with output."""
        pointer = staged.llama_get_embeddings_nextn(self._handle)
        return np.ctypeslib.as_array(pointer, (self.batch.outputs, self.width)).copy()
