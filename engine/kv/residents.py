"""The sequence ids of a context: allocated, idle or free, and the tokens of each.

Each method changes the context and the prefix tree together. `Offloader.load` loads cells elsewhere.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from engine.backend import Context
from engine.branching import BranchingContext
from engine.kv.idle import Idle
from engine.kv.tree import PrefixTree, Resident


class Residents:
    """The sequence ids of one context. Belongs to the engine thread.

    An id in the tree is either in `allocated` or in `idle`; all others are free.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.tree = PrefixTree()
        self.idle = Idle()
        self.allocated: set[int] = set()
        self._idle_cells: int | None = 0  # None if outdated
        self._transitions = 0  # number of changes of ids between allocated and idle

    @property
    def version(self) -> int:
        """Grows whenever a sequence is begun, cut or removed, or changes between allocated and idle."""
        return self.tree.version + self._transitions

    def match(self, tokens: array[int], salt: str) -> Resident:
        """Returns the longest resident prefix of `tokens` that a new sequence can begin with."""
        return self.tree.match(tokens, salt, whole=not self.context.partial)

    @property
    def free_id(self) -> int:
        """The lowest free id; -1 if none is free."""
        return next((seq for seq in range(self.context.sequences) if seq not in self.tree), -1)

    @property
    def idle_cells(self) -> int:
        """Number of cells that only idle sequences hold."""
        if self._idle_cells is None:
            self._idle_cells = sum(size for size, holders in self.tree.runs() if holders <= self.idle.sequences)
        return self._idle_cells

    def idle_part(self, match: Resident) -> int:
        """Returns the number of cells of `match` that only idle sequences hold."""
        runs = self.tree.holders(match.seq, match.length) if match.length else ()
        return sum(size for size, holders in runs if holders <= self.idle.sequences)

    def redundant(self, seq: int) -> bool:
        """Returns True if other sequences hold every cell of `seq`, so that it can be dropped without loss."""
        return self.context.partial and self.tree.redundant(seq)

    def begin(self, seq: int, salt: str) -> None:
        """Allocates `seq` as an empty sequence. Drops the tokens of a sequence with this id."""
        if seq in self.tree:
            self.free(seq)
        self.tree.begin(seq, salt)
        self.allocated.add(seq)
        self._idle_cells = None

    def copy(self, source: int, seq: int, tokens: array[int]) -> bool:
        """Allocates the free id `seq` with `tokens`, the first ones of `source`: the same cells with unified KV, a copy
        with per-slot KV. Returns False, with `seq` still free, if the context cannot copy these positions."""
        if not self.context.copy(source, seq, len(tokens)):
            return False
        if self.context.unified:
            self.tree.share(source, seq, len(tokens))
        else:
            self.tree.begin(seq, self.tree.salt(source))
            self.tree.extend(seq, tokens)
        self.allocated.add(seq)
        self._idle_cells = None
        return True

    def reallocate(self, seq: int) -> None:
        """Allocates an idle sequence, which keeps its tokens."""
        self.idle.remove(seq)
        self.allocated.add(seq)
        self._idle_cells = None
        self._transitions += 1

    def release(self, seq: int) -> None:
        """Makes an allocated sequence an idle one."""
        self.allocated.remove(seq)
        self.idle.use(seq)
        self._idle_cells = None
        self._transitions += 1

    def cut(self, seq: int, length: int, *, rows: bool = False) -> bool:
        """Drops the tokens of `seq` from `length` on. Returns False if the context cannot drop them, or if a sliding
        window then lacks cells before `length`: the sequence cannot be continued, and the caller must free it.

        With `rows` it also drops the last decode's alternative, which has a cell but does not count for the length.
        """
        if rows or length < self.tree.length(seq) or self.context.length(seq) > length:
            if not self.context.cut(seq, length):
                return False
            if length < self.tree.length(seq):
                self.tree.truncate(seq, length)
                self._idle_cells = None
        return not self.context.window or self.context.intact(seq, length)

    def extend(self, seq: int, tokens: Sequence[int], *, alternative: bool = False) -> None:
        """Appends `tokens`, which the last decode computed, to `seq`. With `alternative` the last one is that of `seq`,
        which replaces its other rows from that position on."""
        if alternative:
            assert isinstance(self.context, BranchingContext), "the decode had an alternative"
            self.context.adopt(seq, self.tree.length(seq) + len(tokens) - 1)
        self.tree.extend(seq, tokens)

    def free(self, seq: int) -> None:
        """Frees `seq` and all its cells that no other sequence holds."""
        if seq in self.idle:
            self.idle.remove(seq)
        self.allocated.discard(seq)
        self.context.cut(seq, 0)
        self.tree.remove(seq)
        self._idle_cells = None

    def check(self) -> None:
        """Raises AssertionError unless the tree is valid, each id has one state, and tree and context have equal
        lengths."""
        self.tree.check()
        for seq in range(self.context.sequences):
            states = (seq in self.allocated) + (seq in self.idle)
            assert states == (seq in self.tree), f"sequence {seq} is allocated, idle or free"
            known, found = self.tree.length(seq) if seq in self.tree else 0, self.context.length(seq)
            assert found == known, f"sequence {seq} has {found} positions in the context, {known} in the tree"
