"""The protocols of an opened model, between scheduling and the native library.

`engine.llama` implements them with llama.cpp, `engine.sim` and the tests with contexts that compute no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from engine.adapters import AdapterInfo, AdapterSet
from engine.backend_sampling import BackendSampling
from engine.batch import Batch

# Rows of logits, [rows, vocabulary]. The next decode overwrites them, also where the engine has changed them.
Logits = NDArray[np.float32]

# Work that overlaps a decode. It must not use the decode's logits or change its inputs.
HostWork = Callable[[], None]

# The content of cells as bytes. Only contexts of the same model with equal `ModelInfo.layout` can load it.
State = NDArray[np.uint8]


def no_host_work() -> None:
    """Does nothing: the default of `Context.decode`."""


class StatePart(NamedTuple):
    """The cells of positions from `start` up to `end` in `state`; a state may contain further positions."""

    state: State
    start: int
    end: int


class Snapshot(Protocol):
    """The saved cells of one sequence. Valid until the sequence changes."""

    def cut(self, start: int, end: int) -> State | None:
        """Returns the state of positions from `start` up to `end`; None if a position is missing."""


class NoFreeCells(Exception):
    """The batch does not fit the free cells; nothing was computed and nothing changed."""


class Aborted(Exception):
    """A decode was stopped by `abort`; part of the batch may be in the cells."""


class NativeFault(Exception):
    """A decode failed; part of the batch may be in the cells."""


class FimTokens(NamedTuple):
    """Ids of the tokens that mark the parts of a fill-in-the-middle prompt; -1 for a token that the model lacks."""

    prefix: int = -1
    suffix: int = -1
    middle: int = -1
    repository: int = -1
    """Precedes the name of a repository."""
    file: int = -1
    """Precedes the name of a file."""


class ModelInfo(Struct, frozen=True):
    """Properties of the loaded model, for operators and clients."""

    name: str
    path: str
    description: str
    bytes: int
    parameters: int
    vocabulary: int
    trained_context: int
    """Tokens."""
    context: int
    """KV cells of all sequences together."""
    device: str
    chat_template: str | None
    bos: str
    """Text of the BOS token; empty if there is none."""
    eos: str
    """Text of the EOS token; empty if there is none."""
    bos_added: bool
    """True if `Vocab.tokenize` with `special` begins with `bos`."""
    digest: str = ""
    """Digest of the model file's content."""
    build: str = ""
    """Version and features of the library."""
    layout: str = ""
    """Format of saved states: two contexts with equal values can load each other's states."""
    offloaded: bool = False
    """True if a GPU computes the steps, so that host work can overlap them."""
    exact: bool = False
    """True if a request's tokens depend on the request only: not on other requests, drafts or prefill chunks."""
    kv_unified: bool = True
    """True for unified KV, False for per-slot KV."""
    kv_reason: str = ""
    """Reason of that layout, with the flag that changes it."""
    fim: FimTokens = FimTokens()
    longest_token: int = 0
    """Maximum bytes of a text that become one token; 0 if there is no maximum."""
    generates: bool = True
    """False for a model that computes embeddings only."""
    adapters: tuple[AdapterInfo, ...] = ()
    """The loaded LoRA adapters, by number."""
    cell_bytes: int = 0
    """Bytes of one KV cell in all layers together, an upper bound; 0 if there are no cells."""
    no_drafts: str = ""
    """Reason for which the context can verify no drafts; empty if it can."""


class Vocab(Protocol):
    """Converts text to tokens and back. Any thread may call it."""

    @property
    def size(self) -> int:
        """Number of tokens: token ids are from 0 to `size - 1`."""

    @property
    def ends(self) -> frozenset[int]:
        """The end-of-generation tokens (llama.cpp: EOG): those that end a turn and those that end a text."""

    @property
    def kind(self) -> int:
        """The type of the tokenizer (llama.cpp: `enum llama_vocab_type`)."""

    @property
    def added(self) -> tuple[int, int]:
        """The ids of BOS and EOS, each if the model expects it around a text; -1 if it does not."""

    @property
    def special(self) -> frozenset[int]:
        """Ids of control tokens, and of user-defined tokens with a name in angle brackets, such as `<tool_call>`.
        `text` returns a special token's name."""

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Returns the token ids of `text`.

        With `special`, special tokens in the text are recognised and BOS is added if the model expects it.
        """

    def piece(self, token: int) -> bytes:
        """Returns the token's bytes, which can be a part of a character; empty for a control token."""

    def text(self, token: int) -> str:
        """Returns the token's text in the vocabulary; for a special token, its name."""


class Context(Protocol):
    """KV cells, and decodes over them. Only the engine thread may call it, except `abort`.

    There are two layouts (llama.cpp: `kv_unified`). With unified KV all sequences share one pool of cells, and a copy
    shares its source's cells. With per-slot KV each sequence id has `sequence_cells` cells, and a copy uses the
    target's cells. One pass over the weights then computes rows of consecutive sequence ids only, the same number for
    each. A position is the index of a row in its sequence, also where the library counts otherwise (M-RoPE).
    """

    @property
    def batch(self) -> Batch:
        """The rows of the next decode. The capacity of the batch is the maximum number of rows of one decode."""

    @property
    def unified(self) -> bool:
        """True for unified KV, False for per-slot KV."""

    @property
    def flash(self) -> bool:
        """True with flash attention, which skips the cells that a row does not attend to."""

    @property
    def cells(self) -> int:
        """Cells of all sequences together."""

    @property
    def sequence_cells(self) -> int:
        """Cells that one sequence can use: all with unified KV, those of its slot with per-slot KV."""

    @property
    def sequences(self) -> int:
        """Number of sequence ids: ids are from 0 to `sequences - 1`."""

    @property
    def outputs(self) -> int:
        """Maximum rows of logits of one decode."""

    @property
    def ubatch(self) -> int:
        """Maximum rows of one pass over the weights."""

    @property
    def prefill_rows(self) -> int:
        """Minimum rows of one sequence in a prefill pass, so that prefill results do not depend on the chunking: 2 if
        the kernels for a single row differ from those for several rows, else 1."""

    @property
    def partial(self) -> bool:
        """True if a sequence can be cut at any position; False if layers have recurrent states."""

    @property
    def max_rollback(self) -> int | None:
        """Maximum positions of a rollback, which is the only `cut` of a sequence between two decodes of it and keeps at
        least one row of the first. 0 if there are no rollbacks; None, for no limit, if `partial`."""

    @property
    def divisible(self) -> bool:
        """True if a saved sequence can be cut into states of position ranges; False if a state has a whole sequence."""

    @property
    def window(self) -> int:
        """Sliding window of some layers, in positions; 0 for none. Cells before the window may be overwritten."""

    @property
    def shifts(self) -> bool:
        """True if `shift` can move a state to other positions."""

    @property
    def backend_sampling(self) -> BackendSampling | None:
        """The selection of the most likely tokens by the device. None if decodes return all logits."""

    def decode(self, host_work: HostWork = no_host_work) -> Logits:
        """Returns the logits of the batch's rows with `output`, in their order.

        `host_work` is called once the rows have cells: on a GPU while they are computed. It is not called if the
        decode raises. Raises NoFreeCells with the cells unchanged. After Aborted or NativeFault, `length` returns the
        positions that each sequence still has.
        """

    def set_adapters(self, adapters: AdapterSet) -> bool:
        """Applies `adapters`, and no others, to later decodes. Returns True if the set changes."""

    def copy(self, source: int, target: int, length: int) -> bool:
        """Copies the first `length` positions of `source` to the empty sequence `target`. If states are not divisible,
        all positions are copied. With unified KV the two sequences share the cells.

        Returns False, with `target` empty, if `source` lacks a position, as with a sliding window.
        """

    def cut(self, seq: int, length: int) -> bool:
        """Drops the positions from `length` on. Returns False, with nothing changed, if the model cannot drop them."""

    def save(self, seq: int) -> Snapshot | None:
        """Returns the cells of `seq`, in time proportional to its length; None if they cannot be saved."""

    def load(self, seq: int, parts: Sequence[StatePart]) -> bool:
        """Appends consecutive `parts`, of which the first starts at the end of `seq`, to `seq` in newly allocated
        cells. Returns False, with nothing changed, if there are too few cells or a state does not fit this context."""

    def shift(self, state: State, start: int, end: int, by: int) -> State | None:
        """Returns the cells of positions from `start` up to `end`, moved by `by` positions; None if that fails.
        Computes one row. No sequence changes."""

    def intact(self, seq: int, length: int) -> bool:
        """Returns True if `seq` has `length` positions and no cell that the next row attends to is missing."""

    def length(self, seq: int) -> int:
        """Returns the number of positions of `seq`."""

    def clear(self) -> None:
        """Frees every cell."""

    def abort(self) -> None:
        """Makes the running decode and every later one raise Aborted soon. Any thread may call it."""


class Backend(Protocol):
    """An opened model. Created, used and closed on the engine thread; any thread may use `vocab` and `info`."""

    @property
    def info(self) -> ModelInfo:
        """Properties of the model."""

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary."""

    @property
    def context(self) -> Context:
        """The model's cells."""

    def close(self) -> None:
        """Frees every native object. The context must not be used again."""


# Called on the engine thread with the share of a model that is loaded, 0 to 1.
LoadProgress = Callable[[float], None]

# The vectors of one input, [vectors, numbers]: one vector, or one for each token without pooling.
Embedding = NDArray[np.float32]


class RerankMarks(NamedTuple):
    """Tokens around a query and a document, for models without a template of such pairs."""

    start: tuple[int, ...]
    middle: tuple[int, ...]
    end: tuple[int, ...]


class EmbeddingInfo(Struct, frozen=True):
    """Properties of the model that computes embeddings."""

    name: str
    """Name of the file without its extension."""
    path: str
    pooling: str
    """`none`, `mean`, `cls`, `last` or `rank`."""
    width: int
    """Numbers of a vector; for `rank` the number of scores."""
    limit: int
    """Maximum tokens of one input."""
    rerank_template: str
    """Text around `{query}` and `{document}`; empty if the model has none."""
    marks: RerankMarks


class EmbeddingBackend(Protocol):
    """An opened model that computes embeddings. Used by one thread, except `info`, `vocab` and `abort`."""

    @property
    def info(self) -> EmbeddingInfo:
        """Properties of the model."""

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary."""

    @property
    def sequences(self) -> int:
        """Maximum number of inputs of one decode."""

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[Embedding]:
        """Returns the vectors of each input, at most `sequences` inputs with together at most `info.limit` tokens.
        Raises Aborted or NativeFault."""

    def abort(self) -> None:
        """Makes the running decode, and every one before `resume`, raise Aborted."""

    def resume(self) -> None:
        """Lets later decodes run after `abort`."""

    def close(self) -> None:
        """Frees the native objects."""
