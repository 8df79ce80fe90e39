"""A context in miniature that cannot be fooled, and an engine's worth of parts around it.

Its logits are a hash of exactly the tokens that a row can see. Any slip in positions, sharing, rollback or
retraction changes the output, so "the same tokens as alone" is a complete test of the bookkeeping.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from engine.backend import (
    Aborted,
    Logits,
    Meanwhile,
    ModelInfo,
    NativeFault,
    NoFreeCells,
    Progress,
    State,
    nothing,
)
from engine.batch import Batch
from engine.config import EngineConfig

VOCABULARY = 50
END = 0


class Cell:
    """One token's place; shared cells are one object under several sequences."""

    __slots__ = ("place", "token")

    def __init__(self, token: int, place: int) -> None:
        self.token = token
        self.place = place


class ToyContext:
    """Implements `engine.backend.Context`, checks what llama.cpp would refuse, and fails when told to."""

    def __init__(
        self,
        cells: int = 200,
        sequences: int = 12,
        rows: int = 64,
        outputs: int = 32,
        *,
        partial: bool = True,
        other: float = 0.0,
        by_place: bool = False,
    ) -> None:
        self.batch = Batch(rows)
        self.cells = cells
        self.sequences = sequences
        self.outputs = outputs
        self.ubatch = rows
        self.partial = partial
        self.other = other  # share of histories about which it thinks otherwise than the other toys
        self.by_place = by_place  # whether logits also depend on the order in which the cells lie
        self.ordered, self.wasted = False, 0
        self.window = 0
        self.shifts = partial
        self.damaged: Callable[[], bool] = lambda: False  # whether the next cut leaves a sliding window with a gap
        self.decodes = 0
        self.computed = 0  # rows of all decodes so far
        self.faults: Callable[[int], Exception | None] = lambda decode: None
        self.lost: Callable[[], bool] = lambda: False  # whether the next state cannot be saved or loaded
        self.aborted = False
        self.before_decode: Callable[[], None] = lambda: None
        self._held: list[dict[int, Cell]] = [{} for _ in range(sequences)]
        self._nobodys: dict[int, Cell] = {}
        self._nobody = -1

    def decode(self, meanwhile: Meanwhile = nothing) -> Logits:
        """Logits of the rows that ask for them; leaves the cells alone when the batch does not fit."""
        self.decodes += 1
        self.before_decode()
        if self.aborted:
            raise Aborted
        if (fault := self.faults(self.decodes)) is not None:
            raise fault
        batch = self.batch
        assert 0 < batch.rows <= batch.capacity
        assert batch.outputs <= self.outputs
        if len(self._distinct()) + batch.rows > self.cells:
            raise NoFreeCells
        rows = list(zip(batch.seq[: batch.rows], batch.pos[: batch.rows], batch.token[: batch.rows], strict=True))
        free = iter(self._free())
        for seq, pos, token in rows:
            assert pos == self.length(seq), f"sequence {seq}: position {pos} after {self.length(seq)} tokens"
            self._held[seq][int(pos)] = Cell(int(token), next(free))
        self.computed += len(rows)
        meanwhile()
        out = [self._logits(seq, pos) for (seq, pos, _), on in zip(rows, batch.output, strict=False) if on]
        return np.stack(out) if out else np.empty((0, VOCABULARY), np.float32)

    def _logits(self, seq: int, pos: int) -> Logits:
        held = self._held[seq].items()
        order = sorted(held, key=lambda item: item[1].place) if self.by_place else sorted(held)
        seen = array("i", (value for place, cell in order if place <= pos for value in (place, cell.token)))
        bits = zlib.crc32(seen)
        rng = np.random.default_rng(bits + (bits % 1000 < 1000 * self.other))
        return rng.standard_normal(VOCABULARY, np.float32) * 3

    def _distinct(self) -> set[int]:
        return {id(cell) for held in [*self._held, self._nobodys] for cell in held.values()}

    def copy(self, source: int, target: int, length: int) -> bool:
        """Shares cells, as llama.cpp does with one unified stream."""
        assert not self._held[target], "the target must be empty"
        self._held[target] = {pos: cell for pos, cell in self._held[source].items() if pos < length}
        return True

    def share(self, source: int, target: int, start: int, end: int) -> None:
        """Adds cells to a sequence that may have others at these positions."""
        for pos in range(start, end):
            self._nobodys[len(self._nobodys)] = self._held[source][pos]
        self._nobody = target

    def clear(self) -> None:
        """Drops all."""
        self._nobodys.clear()
        for held in self._held:
            held.clear()

    def cut(self, seq: int, length: int) -> bool:
        """Drops positions from `length` on; all or nothing if sequences are not partial."""
        if length and not self.partial:
            return False
        if seq == self._nobody:
            self._nobodys.clear()
        self._held[seq] = {pos: cell for pos, cell in self._held[seq].items() if pos < length}
        return True

    def save(self, seq: int, start: int, end: int) -> State | None:
        """The tokens at these positions, or of the whole sequence if it is not partial, as llama.cpp would have it."""
        if not self.partial and (start, end) != (0, self.length(seq)):
            return None
        held = self._held[seq]
        if self.lost() or not all(pos in held for pos in range(start, end)):
            return None
        return np.array([start, *(held[pos].token for pos in range(start, end))], np.int32).view(np.uint8)

    def load(self, seq: int, state: State, start: int, end: int, shift: int = 0) -> bool:
        """Gives cells to all of the state, and then frees those that are not wanted."""
        first, *tokens = state.view(np.int32).tolist()
        first += shift
        assert first <= start == self.length(seq), "continues what is there"
        assert end <= first + len(tokens), "has what is wanted"
        if self.lost() or len(self._distinct()) + len(tokens) > self.cells:
            return False
        for pos, (token, place) in enumerate(zip(tokens, self._free(), strict=False), first):
            if start <= pos < end:
                self._held[seq][pos] = Cell(token, place)
        return True

    def _free(self) -> list[int]:
        taken = {cell.place for held in [*self._held, self._nobodys] for cell in held.values()}
        return [place for place in range(self.cells) if place not in taken]

    def intact(self, seq: int, length: int) -> bool:
        """As it is told."""
        return self.length(seq) == length and not self.damaged()

    def length(self, seq: int) -> int:
        """Positions of `seq`."""
        return max(self._held[seq], default=-1) + 1

    def used(self) -> int:
        """Cells that somebody holds."""
        return len(self._distinct())

    def abort(self) -> None:
        """Makes every later decode raise Aborted."""
        self.aborted = True


class ToyVocab:
    """Token t is the character with code 64 + t, so that text shows tokens; token 0 ends a text."""

    size = VOCABULARY
    ends = frozenset({END})
    special = ends
    kind = 0
    added = (-1, -1)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """One token per character; characters outside the vocabulary wrap around."""
        return [1 + (ord(char) - 65) % (VOCABULARY - 1) for char in text]

    def piece(self, token: int) -> bytes:
        """The character's bytes."""
        return b"" if token == END else chr(64 + token).encode()

    def text(self, token: int) -> str:
        """The character."""
        return chr(64 + token)


def describe(context: ToyContext) -> ModelInfo:
    """What a toy model says of itself."""
    return ModelInfo(
        name="toy",
        path="toy.gguf",
        description="a hash",
        bytes=0,
        parameters=0,
        vocabulary=VOCABULARY,
        trained_context=0,
        context=context.cells,
        device="none",
        chat_template=None,
        bos="",
        eos="@",
        bos_added=False,
    )


class ToyBackend:
    """Implements `engine.backend.Backend`."""

    def __init__(self, context: ToyContext) -> None:
        self.context = context
        self.vocab = ToyVocab()
        self.info = describe(context)
        self.closed = False

    def close(self) -> None:
        """Remembers that it was closed."""
        assert not self.closed, "closed twice"
        self.closed = True


def opener(backend: ToyBackend) -> Callable[[EngineConfig, Progress, Callable[[], bool]], ToyBackend]:
    """Opens `backend` for `Engine.open`, with two reports of progress."""

    def open_toy(config: EngineConfig, progress: Progress, go_on: Callable[[], bool]) -> ToyBackend:
        progress(0.5)
        progress(1.0)
        return backend

    return open_toy


@contextmanager
def failing(context: ToyContext, decodes: Iterable[int], fault: Exception | None = None) -> Iterator[None]:
    """Lets the decodes of these numbers, counted from now, fail."""
    numbers = {context.decodes + n for n in decodes}
    context.faults = lambda n: (fault or NativeFault("told to fail")) if n in numbers else None
    yield
    context.faults = lambda n: None
