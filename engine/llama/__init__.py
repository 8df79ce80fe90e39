"""llama.cpp through llama-cpp-python. Only this package calls the native library.

model    opens the model, vocabulary and context of a GGUF
vocab    the vocabulary
context  cells: copies, cuts and moves to other positions, over saved_states, which saves and loads sequences, and
         decoder, which has the native calls
branches context with rows of alternatives in unified KV
row_positions   the positions of rows with M-RoPE, where they are not indices
mtp      context with the MTP layers of a model: mtp_layers has all their cells, mtp_layer one of their contexts, and
         mtp_head opens their file
weights  loads the weights of a model
state    cuts states into blocks and joins blocks, by numpy on llama.cpp's state format
shift    moves saved keys to other positions
rollback snapshots of recurrent states
adapters LoRA adapters and control vectors
top_k_chains   backend sampling
params   parameters of a context, size of a cell; placement has those of a load, threads the pools and their cores
embedding   embeddings in a context of its own; textless stands for the cells of a model that computes no text
mtmd     projectors, which encode images and sounds
layout   the choice between per-slot and unified KV, and the number of cells; fit is that number for GPUs
exact    the deterministic profile
gguf_file   metadata and tensors of a GGUF; gguf_check refuses damaged metadata, memory_check too many cells
special_tokens   cuts long texts at special tokens
library  log, stop flag, enumerations and devices of the library
"""

import os

# By default the threads of a step spin for milliseconds at each barrier. If the event loop or another process needs the
# cores, a step then takes up to 50 times as long, with stalls of seconds. With this value they spin for microseconds,
# which costs nothing measurable on a quiet machine. The import below loads libgomp, which then reads the variable.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# A failed assertion of the library then ends the process at once. Otherwise each thread that fails forks a debugger,
# which can block for ever and keeps the listening socket.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

from engine.llama.embedding import open_embedding
from engine.llama.library import list_devices
from engine.llama.model import open_gguf
from engine.llama.mtmd import open_projector
from engine.llama.vocab import open_vocabulary

__all__ = ["list_devices", "open_embedding", "open_gguf", "open_projector", "open_vocabulary"]
