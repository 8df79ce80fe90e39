"""What the engine needs of a model: the seam between scheduling and the native library.

`engine.llama` fills it with a GGUF and llama.cpp; the tests fill it with a context that computes no model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

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


class NoFreeCells(Exception):
    """The batch does not fit the cells; nothing was computed and nothing changed."""


class Aborted(Exception):
    """A decode was told to stop; part of the batch may be in the cells."""


class NativeFault(Exception):
    """A decode failed; part of the batch may be in the cells."""


class ModelInfo(Struct, frozen=True):
    """What is served, for people and clients."""

    name: str
    path: str
    description: str
    bytes: int
    parameters: int
    vocabulary: int
    trained_context: int
    """Tokens."""
    context: int
    """Cells shared by all sequences."""
    device: str
    chat_template: str | None
    bos: str
    """The text of the token that begins a sequence; empty if there is none."""
    eos: str
    bos_added: bool
    """Whether `Vocab.tokenize` with `special` begins with that token."""
    digest: str = ""
    """Of the model file's content."""
    build: str = ""
    """Of the library."""
    layout: str = ""
    """Of a saved state: equal where one can be loaded that was saved elsewhere."""
    offloaded: bool = False
    """Whether steps are computed elsewhere, so that the processor is free meanwhile."""
    exact: bool = False
    """Whether a request's tokens depend on nothing but itself: not on its company, its drafts or how it was read."""


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
    """Cells, and decodes over them. Only the engine thread calls it, `abort` excepted."""

    @property
    def batch(self) -> Batch:
        """The rows of the next decode; its capacity is the most that one decode takes."""

    @property
    def cells(self) -> int:
        """Cells that all sequences share."""

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
    def partial(self) -> bool:
        """Whether a sequence can be cut and copied at any position; if not, only as a whole."""

    @property
    def window(self) -> int:
        """Positions that a row of some layers looks back on, older ones may be forgotten; 0 if all look on all."""

    def decode(self, meanwhile: Meanwhile = nothing) -> Logits:
        """The logits of the batch's rows that asked for them.

        `meanwhile` is called once the rows have their cells: before they are computed where that goes on by itself,
        as on a GPU, and not at all if this raises. Raises NoFreeCells with the cells unchanged; after Aborted or
        NativeFault, `length` tells what each sequence still has.
        """

    def copy(self, source: int, target: int, length: int) -> bool:
        """Lets the empty sequence `target` share the first `length` cells of `source`.

        False if `source` no longer has them all, as with a sliding window: `target` is then empty.
        """

    def share(self, source: int, target: int, start: int, end: int) -> None:
        """Lets `target`, for which nothing is ever computed, hold the cells of positions from `start` up to `end`."""

    def cut(self, seq: int, length: int) -> bool:
        """Drops what `seq` has from position `length` on. False if the model cannot do that: nothing changed."""

    def save(self, seq: int, start: int, end: int) -> State | None:
        """What `seq` has at positions from `start` up to `end`; all or nothing of it if the context is not partial.

        None if it no longer has them all. Nothing changes.
        """

    def load(self, seq: int, state: State, start: int, end: int, shift: int = 0) -> bool:
        """Appends to `seq`, which has `start` positions, those up to `end` of a `state` that was saved from `start`
        or before. They get cells of their own. False, with nothing changed, if there are too few or it does not fit.

        With `shift` the state is of positions so many before these. The cells may not be saved before a decode then.
        """

    @property
    def shifts(self) -> bool:
        """Whether states can be loaded at other positions than they were saved from."""

    def intact(self, seq: int, length: int) -> bool:
        """Whether `seq` has `length` positions, and of these all that a next row may look at: with a sliding window
        a cut can leave less."""

    def length(self, seq: int) -> int:
        """Positions that `seq` has."""

    @property
    def ordered(self) -> bool:
        """Whether a sequence's cells lie in the order of its positions always; only `clear` frees all then."""

    @property
    def wasted(self) -> int:
        """Cells that no sequence has and none gets."""

    def clear(self) -> None:
        """Frees every cell; no sequence has any."""

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
