"""A context without a model whose logits expose every bookkeeping error, and the parts of an engine around it.

Its logits are a hash of exactly the tokens that a row attends to. Any slip in positions, sharing, rollback or
preemption changes the output, so "the same tokens as alone" is a complete test of the bookkeeping.
"""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby, islice
from typing import Any

import numpy as np

from engine.adapters import AdapterSet
from engine.backend import (
    Aborted,
    HostWork,
    LoadProgress,
    Logits,
    ModelInfo,
    NativeFault,
    NoFreeCells,
    State,
    StatePart,
    no_host_work,
)
from engine.backend_sampling import BackendSampling
from engine.batch import Batch
from engine.config import EngineConfig
from engine.pace.passes import SequenceRows, passes
from engine.pace.recurrent_passes import lost_rollbacks, recurrent_passes

VOCABULARY = 50
END = 0
# Added in a saved state to a token whose row was the only row of its sequence in a pass.
SINGLE = 1000
# Added to the token in a cell for each LoRA adapter, times its number, so that logits depend on the adapters.
ADAPTED = 100


class Cell:
    """The cell of one token; shared cells are one object under several sequences."""

    __slots__ = ("index", "single", "token")

    def __init__(self, token: int, index: int, *, single: bool = False) -> None:
        self.token = token
        self.index = index
        self.single = single  # True if its row was the only row of its sequence in the pass


# A request is usually computed alone and together with others, so most histories occur twice.
@lru_cache(maxsize=4096)
def random_logits(seed: int) -> Logits:
    """Returns the logits with this seed, as a read-only array."""
    logits = np.random.default_rng(seed).standard_normal(VOCABULARY, np.float32) * 3
    logits.flags.writeable = False
    return logits


class ToySnapshot:
    """Implements `engine.backend.Snapshot`."""

    def __init__(self, context: ToyContext, seq: int) -> None:
        self._context = context
        self._tokens = {pos: cell.token + SINGLE * cell.single for pos, cell in context.held[seq].items()}

    def cut(self, start: int, end: int) -> State | None:
        """Returns the tokens at these positions; `None` if some are missing, or if a part is cut from an indivisible
        state."""
        if not self._context.divisible and (start, end) != (0, len(self._tokens)):
            return None
        if self._context.lost() or not all(pos in self._tokens for pos in range(start, end)):
            return None
        return np.array([start, *(self._tokens[pos] for pos in range(start, end))], np.int32).view(np.uint8)


class ToyContext:
    """Implements `engine.backend.Context`, asserts the library's rules, and fails on request.

    With `unified` False each sequence has `sequence_cells` cells of its own.
    """

    def __init__(
        self,
        cells: int = 200,
        sequences: int = 12,
        rows: int = 64,
        outputs: int = 32,
        *,
        partial: bool = True,
        max_rollback: int | None = None,
        divisible: bool | None = None,
        other: float = 0.0,
        by_cell_order: bool = False,
        unified: bool = True,
        prefill_rows: int = 1,
    ) -> None:
        """`cells` is the number of all cells with unified KV, and of the cells of one slot with per-slot KV. With
        `max_rollback`, as with snapshots of recurrent states, `partial` is False."""
        self.batch = Batch(rows)
        self.unified = unified
        self.sequence_cells = cells
        self.cells = cells if unified else cells * sequences
        self.sequences = sequences
        self.outputs = outputs
        self.ubatch = rows
        self.prefill_rows = prefill_rows
        self.flash = True
        self.partial = partial = partial and max_rollback is None
        self.max_rollback = None if partial else max_rollback or 0
        self.droppable: dict[int, int] = {}  # rows of the last decode that a rollback of each sequence can drop
        self.divisible = partial if divisible is None else divisible
        self.other = other  # fraction of histories for which the logits differ from those of other toys
        self.by_cell_order = by_cell_order  # True if logits also depend on the order of the cells
        self.window = 0
        self.shifts = self.divisible
        self.damaged: Callable[[], bool] = lambda: False  # True if the next cut leaves a sliding window with a gap
        self.decodes = 0
        self.computed = 0  # rows of all decodes so far
        self.copied = 0  # cells copied so far; stays 0 with unified KV
        self.faults: Callable[[int], Exception | None] = lambda decode: None
        self.lost: Callable[[], bool] = lambda: False  # True if the next state cannot be saved or loaded
        self.aborted = False
        self.before_decode: Callable[[], None] = lambda: None
        # The positions of each sequence ascend: every change appends cells or drops the last ones.
        self.held: list[dict[int, Cell]] = [{} for _ in range(sequences)]
        self.alternatives = 2 if unified and partial else 0
        self.branches: dict[int, dict[int, Cell]] = {}  # the cells of each sequence's alternative of the last decode
        self.adopted = 0
        self.adapters: AdapterSet = ()
        self.backend_sampling: BackendSampling | None = None

    def decode(self, host_work: HostWork = no_host_work) -> Logits:
        """Returns the logits of the output rows; the cells are unchanged if the batch does not fit."""
        self.decodes += 1
        self.before_decode()
        if self.aborted:
            raise Aborted
        if (fault := self.faults(self.decodes)) is not None:
            raise fault
        batch = self.batch
        assert 0 < batch.rows <= batch.capacity
        assert batch.outputs <= self.outputs
        ids = batch.seq[: batch.rows].tolist()
        if self.unified and len(self._distinct(self.held)) + batch.rows > self.cells:
            raise NoFreeCells
        if not self.unified:
            if self.partial:
                self._check_order(ids)
            if any(len(self.held[seq]) + ids.count(seq) > self.sequence_cells for seq in set(ids)):
                raise NoFreeCells
        rows = list(zip(ids, batch.pos[: batch.rows].tolist(), batch.token[: batch.rows].tolist(), strict=True))
        free = (
            {-1: self._free_cells(self.held)}
            if self.unified
            else {seq: self._free_cells([self.held[seq]]) for seq in set(ids)}
        )
        lengths = {seq: self.length(seq) for seq in set(ids)}
        assert not self.branches.keys() & lengths.keys(), "the last alternative was adopted or dropped"
        assert len(batch.alternatives) <= self.alternatives
        branches = {each.row: each for each in batch.alternatives}
        single = self._single(ids) if self.prefill_rows > 1 else [False] * len(ids)
        adapted = ADAPTED * sum(each.id + 1 for each in self.adapters)
        for row, ((seq, pos, token), one) in enumerate(zip(rows, single, strict=True)):
            token += adapted
            if (branch := branches.get(row)) is not None:
                assert rows[branch.end][:2] == (seq, pos), "the row of the other token has the same position"
                before = {at: cell for at, cell in self.held[seq].items() if at < pos}
                self.branches[seq] = {**before, pos: Cell(token, next(free[-1]))}
                continue
            assert pos == lengths[seq], f"sequence {seq}: position {pos} after {lengths[seq]} tokens"
            self.held[seq][pos] = Cell(token, next(free[-1 if self.unified else seq]), single=one)
            lengths[seq] += 1
        self.computed += len(rows)
        if self.max_rollback:
            self._keep_snapshots(ids)
        host_work()
        held = [self.branches[seq] if row in branches else self.held[seq] for row, (seq, _, _) in enumerate(rows)]
        out = [self._logits(cells, pos) for cells, (_, pos, _), on in zip(held, rows, batch.output, strict=False) if on]
        return np.stack(out) if out else np.empty((0, VOCABULARY), np.float32)

    def set_adapters(self, adapters: AdapterSet) -> bool:
        """Applies `adapters` to the rows of later decodes."""
        changed, self.adapters = adapters != self.adapters, adapters
        return changed

    def _keep_snapshots(self, ids: list[int]) -> None:
        """Sets the rows that can be dropped. Asserts that no sequence with a draft loses its snapshots."""
        counts = [(seq, len([*same])) for seq, same in groupby(ids)]
        computed = recurrent_passes(counts, self.ubatch, (self.max_rollback or 0) + 1, consecutive=not self.unified)
        lost, outputs = lost_rollbacks(computed), self.batch.output[: len(ids)].tolist()
        drafting = {seq for seq in set(ids) if sum(on for at, on in zip(ids, outputs, strict=True) if at == seq) > 1}
        assert not lost & drafting, "each sequence with a draft can be rolled back"
        self.droppable = {seq: min(count - 1, self.max_rollback or 0) for seq, count in counts if seq not in lost}

    def _check_order(self, ids: list[int]) -> None:
        """Asserts an order of rows with few passes.

        Ids are sorted; where single rows differ from others, the rows of a prompt share no pass.
        """
        if self.prefill_rows == 1:
            assert ids == sorted(ids), "rows are in the order of their ids"
            return
        outputs = self.batch.output[: len(ids)].tolist()
        for seq in set(ids):
            first, count = ids.index(seq), ids.count(seq)
            assert ids[first : first + count] == [seq] * count, "rows of a sequence are together"
            if count > 1 and sum(outputs[first : first + count]) <= 1:  # a prompt's
                assert seq + 1 not in ids[first:], "the next id comes before a prompt"

    def _logits(self, held: dict[int, Cell], pos: int) -> Logits:
        items = [*islice(held.items(), bisect_right([*held], pos))]
        if self.by_cell_order:
            items.sort(key=lambda item: item[1].index)
        seen = array("i", bytes(2 * array("i").itemsize * len(items)))
        seen[::2] = array("i", [position for position, _ in items])
        seen[1::2] = array("i", [cell.token for _, cell in items])
        if self.prefill_rows > 1:
            seen.extend(at for at, (_, cell) in enumerate(items) if cell.single)
        bits = zlib.crc32(seen)
        return random_logits(bits + (bits % 1000 < 1000 * self.other))

    def _single(self, ids: list[int]) -> list[bool]:
        """Returns, for each row, True if it is the only row of its sequence in its pass."""
        counts = [(seq, len([*same])) for seq, same in groupby(ids)]
        single: dict[int, list[bool]] = {seq: [] for seq, _ in counts}
        for first, sequences, rows in passes([SequenceRows(*part) for part in counts], self.unified, self.ubatch):
            for seq, _ in counts[first : first + sequences]:
                single[seq] += [rows == 1] * rows
        assert all(len(single[seq]) == count for seq, count in counts), "every row is in a pass"
        return [flag for seq, _ in counts for flag in single[seq]]

    def _distinct(self, held: Iterable[dict[int, Cell]]) -> set[Cell]:
        return set[Cell]().union(*(cells.values() for cells in (*held, *self.branches.values())))

    def _free_cells(self, rivals: Sequence[dict[int, Cell]]) -> Iterator[int]:
        """Returns the free cells in ascending order, as llama.cpp takes them."""
        taken = {cell.index for cell in self._distinct(rivals)}
        return (index for index in range(self.cells) if index not in taken)

    def copy(self, source: int, target: int, length: int) -> bool:
        """Shares cells with unified KV, copies them with per-slot KV."""
        assert not self.held[target], "the target must be empty"
        assert self.divisible or length == self.length(source), "only whole states can be copied"
        kept = {pos: cell for pos, cell in self.held[source].items() if pos < length}
        if not self.unified:
            if self.lost():
                return False
            kept = {pos: Cell(cell.token, pos, single=cell.single) for pos, cell in kept.items()}
            self.copied += length
        self.held[target] = kept
        return True

    def clear(self) -> None:
        """Removes all tokens of all sequences."""
        self.branches.clear()
        for held in self.held:
            held.clear()

    def cut(self, seq: int, length: int) -> bool:
        """Drops positions from `length` on. If sequences are not partial, drops all or the last rows, once."""
        dropped = self.length(seq) - length
        if length and not self.partial and dropped > 0 and dropped > self.droppable.pop(seq, 0):
            return False
        self.branches.pop(seq, None)
        self.held[seq] = {pos: cell for pos, cell in self.held[seq].items() if pos < length}
        return True

    def adopt(self, seq: int, length: int) -> None:
        """Replaces positions from `length` on by the alternative of the last decode."""
        self.held[seq] = self.branches.pop(seq)
        assert self.length(seq) == length + 1, "the alternative has that position"
        self.adopted += 1

    def save(self, seq: int) -> ToySnapshot | None:
        """Returns the current content of a sequence."""
        return ToySnapshot(self, seq)

    def load(self, seq: int, parts: Sequence[StatePart]) -> bool:
        """Appends the tokens of all parts, or of none."""
        tokens: list[int] = []
        for state, start, end in parts:
            first, *content = state.view(np.int32).tolist()
            assert first <= start == self.length(seq) + len(tokens), "continues the sequence"
            assert end <= first + len(content), "contains the positions"
            tokens += content[start - first : end - first]
        free_cells = (
            self.cells - len(self._distinct(self.held)) if self.unified else self.sequence_cells - len(self.held[seq])
        )
        if self.lost() or len(tokens) > free_cells:
            return False
        free = self._free_cells(self.held if self.unified else [self.held[seq]])
        start = self.length(seq)
        for at, saved in enumerate(tokens):
            self.held[seq][start + at] = Cell(saved % SINGLE, next(free), single=saved >= SINGLE)
        return True

    def shift(self, state: State, start: int, end: int, by: int) -> State | None:
        """Returns a state with the same tokens at other positions."""
        first, *tokens = state.view(np.int32).tolist()
        if self.lost():
            return None
        return np.array([start + by, *tokens[start - first : end - first]], np.int32).view(np.uint8)

    def intact(self, seq: int, length: int) -> bool:
        """Returns True if the length is `length` and `damaged` returns False."""
        return self.length(seq) == length and not self.damaged()

    def length(self, seq: int) -> int:
        """Returns the number of positions of `seq`."""
        return next(reversed(self.held[seq]), -1) + 1

    def used(self) -> int:
        """Returns the number of cells in use."""
        return len(self._distinct(self.held))

    def abort(self) -> None:
        """Makes every later decode raise Aborted."""
        self.aborted = True


class ToyHeadContext(ToyContext):
    """Also implements `engine.draft_head.DraftHead`: predicts the logits of later rows, for three of ten histories
    wrongly."""

    def __init__(
        self, cells: int = 200, sequences: int = 12, rows: int = 64, outputs: int = 32, **settings: Any
    ) -> None:
        super().__init__(cells, sequences, rows, outputs, **settings)
        self.max_draft: int | None = None
        self.drafted: dict[int, list[int]] = {}

    def draft(self, tokens: Sequence[tuple[int, int]]) -> Logits:
        """Returns the logits after each sequence, its drafted tokens and the given one."""
        ids = [seq for seq, _ in tokens]
        assert ids == sorted(set(ids)), "ids ascend"
        if self.aborted:
            raise Aborted
        rows = []
        for seq, token in tokens:
            drafted, length = self.drafted.setdefault(seq, []), self.length(seq)
            assert length, "a decoding sequence has cells"
            drafted.append(token)
            before, adapted = self.held[seq], ADAPTED * sum(each.id + 1 for each in self.adapters)
            added = {length + at: Cell(one + adapted, self.cells + at) for at, one in enumerate(drafted)}
            self.held[seq] = before | added
            row = self._logits(self.held[seq], length + len(drafted) - 1)
            self.held[seq] = before
            rows.append(np.roll(row, 1) if int(1000 * abs(row[0])) % 10 < 3 else row)
        return np.stack(rows)

    def rewind(self) -> None:
        """Drops the drafted tokens."""
        self.drafted.clear()

    def decode(self, host_work: HostWork = no_host_work) -> Logits:
        """Asserts that no drafted tokens are left."""
        assert not self.drafted, "drafts are dropped before the next decode"
        return super().decode(host_work)


class ToyVocab:
    """Token t is the character with code 64 + t, so that outputs show tokens; token 0 ends an output."""

    size = VOCABULARY
    ends = frozenset({END})
    special = ends
    kind = 0
    added = (-1, -1)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Returns one token per character; characters outside the vocabulary wrap around."""
        return [1 + (ord(char) - 65) % (VOCABULARY - 1) for char in text]

    def piece(self, token: int) -> bytes:
        """Returns the character's bytes."""
        return b"" if token == END else chr(64 + token).encode()

    def text(self, token: int) -> str:
        """Returns the character."""
        return chr(64 + token)


def describe(context: ToyContext) -> ModelInfo:
    """Returns the description of a toy model."""
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
        """Records the call."""
        assert not self.closed, "closed twice"
        self.closed = True


def opener(backend: ToyBackend) -> Callable[[EngineConfig, LoadProgress, Callable[[], bool]], ToyBackend]:
    """Returns a function that opens `backend` for `Engine.open`, with two reports of progress."""

    def open_toy(config: EngineConfig, progress: LoadProgress, go_on: Callable[[], bool]) -> ToyBackend:
        progress(0.5)
        progress(1.0)
        return backend

    return open_toy


@contextmanager
def failing(context: ToyContext, decodes: Iterable[int], fault: Exception | None = None) -> Iterator[None]:
    """Makes the decodes with these numbers, counted from now, raise `fault` within the block."""
    numbers = {context.decodes + n for n in decodes}
    context.faults = lambda n: (fault or NativeFault("injected")) if n in numbers else None
    yield
    context.faults = lambda n: None
