"""What the engine needs of a model: the seam between scheduling and the native library.

`engine.llama` fills it with a GGUF and llama.cpp; the tests fill it with a context that computes no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from engine.batch import Batch

Logits = NDArray[np.float32]
"""Rows of logits, [rows, vocabulary]; overwritten by the next decode."""

Meanwhile = Callable[[], None]
"""What can be done while a decode is computed: nothing that looks at its logits or at what it is computed from."""


def nothing() -> None:
    """Nothing is to be done meanwhile."""


State = NDArray[np.uint8]
"""The content of cells as bytes, for the same model and the same kind of context only."""


class Part(NamedTuple):
    """The cells at positions from `start` up to `end` of a state, which may hold more."""

    state: State
    start: int
    end: int


class Snapshot(Protocol):
    """What one sequence held when it was saved. Valid until the sequence changes."""

    def cut(self, start: int, end: int) -> State | None:
        """The state of the positions from `start` up to `end`; None if some of them are gone."""


class NoFreeCells(Exception):
    """The batch does not fit the cells; nothing was computed and nothing changed."""


class Aborted(Exception):
    """A decode was told to stop; part of the batch may be in the cells."""


class NativeFault(Exception):
    """A decode failed; part of the batch may be in the cells."""


class ModelInfo(Struct, frozen=True):
    """The loaded model, as operators and clients see it."""

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
    """The text of the token that begins a sequence; empty if there is none."""
    eos: str
    bos_added: bool
    """True if `Vocab.tokenize` with `special` begins with `bos`."""
    digest: str = ""
    """Digest of the model file's content."""
    build: str = ""
    """Version and features of the library."""
    layout: str = ""
    """Format of saved states: two contexts with equal values can load each other's states."""
    offloaded: bool = False
    """True if steps are computed on a GPU, so that the CPU is free meanwhile."""
    exact: bool = False
    """True if a request's tokens depend on nothing but the request: not on other requests, drafts or prefill chunks."""
    kv_unified: bool = True
    """True for unified KV, False for per-slot KV."""
    kv_reason: str = ""
    """Reason of that layout, with the flag that changes it."""


class Vocab(Protocol):
    """Text to tokens and back. Safe to call from any thread."""

    @property
    def size(self) -> int:
        """Token ids are below this."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens with which the model ends a turn or a text."""

    @property
    def kind(self) -> int:
        """The library's number for how texts become tokens."""

    @property
    def added(self) -> tuple[int, int]:
        """The tokens that the model wants before and after a text; -1 for none."""

    @property
    def special(self) -> frozenset[int]:
        """The tokens that mean something to the model and are no text: control tokens, and those that were added to
        the vocabulary with a name in angle brackets, such as `<tool_call>`. Their name is `text`."""

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`. With `special`, special tokens in it are recognised and a BOS is added if the
        model wants one."""

    def piece(self, token: int) -> bytes:
        """The token's bytes, not always whole characters; empty for a control token."""

    def text(self, token: int) -> str:
        """How the vocabulary spells a token, special or not."""


class Context(Protocol):
    """KV cells, and decodes over them. Only the engine thread calls it, `abort` excepted.

    There are two layouts (llama.cpp: `kv_unified`). With unified KV all sequences share one pool of cells, and a copy
    shares them. With per-slot KV each sequence id has `sequence_cells` cells of its own, a copy has cells of its own
    too, and one pass over the weights takes the rows of consecutive ids only, as many of each.
    """

    @property
    def batch(self) -> Batch:
        """The rows of the next decode; its capacity is the most that one decode takes."""

    @property
    def unified(self) -> bool:
        """True if all sequences share one pool of cells, False if each id has cells of its own."""

    @property
    def flash(self) -> bool:
        """True with flash attention, which skips the cells that a row does not attend to."""

    @property
    def cells(self) -> int:
        """Cells of all sequences together."""

    @property
    def sequence_cells(self) -> int:
        """Cells that one sequence can have: all of them with unified KV, its slot's with per-slot KV."""

    @property
    def sequences(self) -> int:
        """Sequence ids are below this."""

    @property
    def outputs(self) -> int:
        """Rows of logits of one decode at most."""

    @property
    def ubatch(self) -> int:
        """Rows of one pass over the weights at most."""

    @property
    def prefill_rows(self) -> int:
        """Rows of one sequence that a pass over a prompt has at least. 2 where a single row is computed by other
        kernels than several: then all rows of prompts are computed alike, however the prompt is cut. Else 1."""

    @property
    def partial(self) -> bool:
        """True if a sequence can be cut at any position; False if it can only be dropped as a whole."""

    @property
    def divisible(self) -> bool:
        """True if a saved sequence can be cut into states of some of its positions, and several such states can be
        loaded one after the other; False if a state is always of a whole sequence."""

    @property
    def window(self) -> int:
        """Positions that a row of some layers attends to, 0 for all; older cells may be overwritten."""

    @property
    def shifts(self) -> bool:
        """True if `shift` can move a state to other positions."""

    def decode(self, meanwhile: Meanwhile = nothing) -> Logits:
        """The logits of the batch's rows that asked for them.

        `meanwhile` is called once the rows have their cells: before they are computed where that goes on by itself,
        as on a GPU, and not at all if this raises. Raises NoFreeCells with the cells unchanged; after Aborted or
        NativeFault, `length` tells what each sequence still has.
        """

    def copy(self, source: int, target: int, length: int) -> bool:
        """Gives the empty sequence `target` the first `length` positions of `source`: the same cells with unified KV,
        cells of its own with per-slot KV. All positions of `source` if states are not divisible.

        False if `source` no longer has them all, as with a sliding window: `target` is then empty.
        """

    def cut(self, seq: int, length: int) -> bool:
        """Drops what `seq` has from position `length` on. False if the model cannot do that: nothing changed."""

    def save(self, seq: int) -> Snapshot | None:
        """What `seq` holds; None if it cannot be saved. Nothing changes. Takes time in proportion to its length."""

    def load(self, seq: int, parts: Sequence[Part]) -> bool:
        """Appends `parts`, which are consecutive, to `seq`, which ends where the first of them starts.

        The positions get cells of their own. False, with nothing changed, if there are too few cells or a state does
        not fit this context.
        """

    def shift(self, state: State, start: int, end: int, by: int) -> State | None:
        """The state of positions from `start + by` up to `end + by`, made of that of `start` up to `end`. None if it
        cannot be made. Computes a row; no sequence changes."""

    def intact(self, seq: int, length: int) -> bool:
        """True if `seq` has `length` positions, and of these all that a next row may attend to: with a sliding window
        a cut can leave less."""

    def length(self, seq: int) -> int:
        """Positions that `seq` has."""

    def clear(self) -> None:
        """Frees every cell."""

    def abort(self) -> None:
        """Makes the running decode, and every later one, raise Aborted soon. Callable from any thread."""


class Backend(Protocol):
    """An opened model. Created, used and closed on the engine thread; `vocab` and `info` are for everyone."""

    @property
    def info(self) -> ModelInfo:
        """What is served."""

    @property
    def vocab(self) -> Vocab:
        """Its tokens."""

    @property
    def context(self) -> Context:
        """Its cells."""

    def close(self) -> None:
        """Frees every native object; the context is not used again."""


Progress = Callable[[float], None]
"""Told the share of a load that is done, 0 to 1, on the engine thread."""
