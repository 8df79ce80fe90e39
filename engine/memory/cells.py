"""Sequence ids and cells: who may use them, who shares them, and what leaves when they run out."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence

from engine.backend import Context
from engine.memory.idle import AHEAD, Idle
from engine.memory.lease import Coming, Lease, Prefix
from engine.memory.moves import LEAST, likest, moved
from engine.memory.pieces import PIECE, Found, Piece
from engine.memory.radix import Match, RadixTree
from engine.memory.store import Store

HOLES, DEAR, BEARABLE = 512, 8, 0.2
"""Free cells among the used ones that are not worth the trouble; how many times the mean price moving what runs may
take, as cells of several streams alternate and transposed values are moved one by one; seconds that all may wait."""
MOVE = 5e-6
"""Seconds to save or load a cell, before any was."""


class Cells:
    """The cells of one context.

    A sequence id is free, leased, or idle: finished, and kept because a later prompt may begin like it. Idle ones
    leave from their ends, the longest unused first: when cells or ids are needed, or when keeping them has cost as
    much as getting them back would. With a store what leaves is saved there. One whose every cell another sequence
    holds too is not kept.
    """

    def __init__(self, context: Context, store: Store | None = None, reuse: int = 0) -> None:
        self.context = context
        self.tree = RadixTree()
        self.store = store
        self.compute = 0.0
        """Seconds that computing a token takes; 0 if not known."""
        self.saved = self.restored = 0
        """Tokens that were moved to the store, and back."""
        self.reuse = max(LEAST, reuse) if reuse and store is not None and context.shifts else 0
        """Tokens that must recur for cells to be moved to where a changed prompt has them; 0 if none are."""
        self.shifted = False
        """Whether cells were moved since the last decode: they cannot be saved yet."""
        self._move = MOVE
        self._top = 0  # about the highest cell that is used
        self._weight = 0.0  # bytes of a cell
        self._clearing = 0.0  # seconds a cell when all were cleared last
        self._unsaved: dict[int, int] = {}  # idle sequences, and from where on something may not be in the store
        self._credit = 0.0  # seconds that may be spent on letting leave what nobody asked to
        self._free = list(range(context.sequences - 1, -1, -1))
        self._idle = Idle()
        self._idle_cells: int | None = 0  # None: to be counted again

    @property
    def free(self) -> int:
        """Cells that nobody holds."""
        return self.context.cells - self.tree.cells - self.context.wasted

    @property
    def idle(self) -> int:
        """Cells that no running request holds: what `reclaim` can free, so none if they must stay in order."""
        return 0 if self.context.ordered else self.kept

    @property
    def kept(self) -> int:
        """Cells of idle sequences that no running request holds."""
        if self._idle_cells is None:
            runs = self.tree.runs()
            self._idle_cells = sum(size for size, holders in runs if holders <= self._idle.sequences)
        return self._idle_cells

    def find(self, tokens: array[int], salt: str) -> Prefix:
        """The longest known prefix of `tokens`, the last of them excluded: one row must be computed."""
        wanted = tokens[:-1]
        match = self.tree.match(wanted, salt, whole=not self.context.partial)
        stored = self._stored(wanted, salt, match.length)
        return Prefix(match.seq, match.length, self._idle_part(match), stored)

    def _stored(self, tokens: array[int], salt: str, start: int) -> Found:
        return Found((), start) if self.store is None else self.store.find(tokens, salt, start)

    def _idle_part(self, match: Match) -> int:
        if not match.length or self.context.ordered:
            return 0
        runs = self.tree.holders(match.seq, match.length)
        return sum(size for size, holders in runs if holders <= self._idle.sequences)

    def claim(self, tokens: array[int], salt: str) -> Lease:
        """A sequence that begins with the longest resident prefix of `tokens`; what the store has of the rest is
        `coming`.

        There is always one: an idle sequence leaves if no id is free, and no more are leased than slots exist.
        """
        prefix = self.find(tokens, salt)
        seq = self._take_id(keep=prefix.seq)
        self._idle_cells = None
        length, stored = prefix.length, prefix.stored
        if stored.pieces and (self.context.ordered or not self.context.partial):
            length = min(length, self._begin(stored.pieces[0]))  # a piece is loaded whole
        if length and self.context.copy(prefix.seq, seq, length):
            self.tree.share(prefix.seq, seq, length)
            self._refresh(prefix.seq)
        else:
            self.tree.begin(seq, salt)
            if length:
                length, stored = 0, self._stored(tokens[:-1], salt, 0)
        coming = self._coming(stored, length)
        reach = coming[-1].end if coming else length
        return Lease(self, seq, length, coming + self._moves(tokens[:-1], salt, reach, but=seq))

    def _coming(self, stored: Found, length: int) -> list[Coming]:
        if not self.context.partial:
            return [Coming(piece, 0, piece.end) for piece in stored.pieces]
        return [Coming(piece, max(length, piece.start), min(piece.end, stored.length)) for piece in stored.pieces]

    def _begin(self, piece: Piece) -> int:
        """The first position of which a state of `piece` is."""
        return piece.start if self.context.partial else 0

    def _moves(self, tokens: array[int], salt: str, start: int, but: int) -> list[Coming]:
        """What of `tokens` from `start` on is to be moved from other places, if anything is; none of `but`'s."""
        if not self.reuse or self.store is None or len(tokens) - start < self.reuse:
            return []
        seq, text, found = likest(tokens, salt, start, self.reuse, self.tree, self.store, but)
        if found and seq >= 0:
            end = max(run.old + run.size for run in found)
            self._save(seq, found[0].old, end=-(-end // PIECE) * PIECE)
        pieces = self.store.along(text, salt)
        return [coming for run in found for coming in moved(run, pieces)]

    def _take_id(self, keep: int) -> int:
        if not self._free:
            self._evict(self._idle.oldest(but=keep))
        return self._free.pop()

    def _refresh(self, seq: int) -> None:
        """Marks an idle sequence as of use just now, or drops it if its user holds all of it."""
        if seq not in self._idle:
            return
        if self._redundant(seq):
            self._evict(seq)
        else:
            self._idle.use(seq)

    def _redundant(self, seq: int) -> bool:
        return self.context.partial and self.tree.redundant(seq)

    def fetch(self, pieces: Sequence[Piece], *, wait: bool) -> bool:
        """Begins to read pieces from disk; whether the first is there."""
        return self.store is None or self.store.fetch(pieces, wait=wait)

    def release_pieces(self, pieces: Sequence[Piece]) -> None:
        """Nobody waits for these any more."""
        if self.store is not None:
            self.store.release(pieces)

    def restore(self, lease: Lease) -> bool:
        """Loads the piece that `lease` waits for. False if that cannot be: nothing more is coming then."""
        piece, start, end, shift = lease.coming[0]
        assert start == lease.length, "a piece continues what is there"
        assert self.store is not None, "pieces come from a store"
        state = self.store.take(piece)
        begun = time.perf_counter()
        self.reclaim(piece.end - self._begin(piece))
        if state is None or not self.context.load(lease.seq, state, start, end, shift or 0):
            lease.expect_nothing()
            return False
        self._moved(end - start, begun)
        self._top = max(self._top, self.tree.cells + len(piece.tokens))
        lease.coming.popleft()
        self.shifted |= bool(shift)
        lease.saved = max(lease.saved, end // PIECE * PIECE)
        lease.commit(piece.spelled[start:end] if not self.context.partial else piece.part(start, end, shift or 0))
        lease.reused += end - start
        lease.moved += 0 if shift is None else end - start
        self.restored += end - start
        return True

    def commit(self, lease: Lease, tokens: Sequence[int]) -> None:
        """Records the next tokens of a lease, which are computed or loaded."""
        self.tree.extend(lease.seq, tokens)
        self._save_soon(lease)

    def roll_back(self, lease: Lease) -> bool:
        """Frees cells beyond the length of `lease`. False if a sliding window then lacks some before."""
        self.context.cut(lease.seq, lease.length)
        return not self.context.window or self.context.intact(lease.seq, lease.length)

    def release(self, seq: int, *, keep: bool) -> None:
        """Ends a lease: the sequence is idle, or free if nothing is gained by keeping it."""
        self._idle.use(seq)
        self._idle_cells = None
        if not keep:
            self._free_id(seq)
        elif not self.tree.length(seq) or self._redundant(seq):
            self._evict(seq)
        elif self.store is not None:
            self._unsaved[seq] = 0

    def reclaim(self, wanted: int) -> None:
        """Lets idle sequences leave, the longest unused first, until `wanted` cells are free or none is idle."""
        while not self.context.ordered and self.free < wanted and self._idle:
            self._shrink(self._idle.oldest(), wanted - self.free)

    def age(self) -> None:
        """Counts a decode of the batch."""
        self._idle.age()
        self.shifted = False
        self._top = max(self._top, self.tree.cells + self.context.batch.rows)

    def expect(self, rate: float) -> None:
        """Every cell up to the highest used one will make the next steps `rate` seconds dearer; 0 if not known."""
        self._idle.rate = rate

    @property
    def scattered(self) -> bool:
        """Whether so many cells are free among the used ones that it pays to move all out and back: a step visits
        them too. About, since only the library knows where they lie: it fills the lowest free ones."""
        holes, live = self._top - self.tree.cells, self.tree.cells - self.kept
        price = live * max(DEAR * self._move, self._clearing)
        if self.store is None or self.context.window or not self.context.partial or self.shifted or holes < HOLES:
            return False
        fits = live * self._weight < self.store.ram.most / 2
        return fits and self._weight > 0 and AHEAD * self._idle.rate * holes > price and price < BEARABLE

    def tend(self, seconds: float) -> bool:
        """Lets leave what has cost enough, and saves what else is idle, for about so long; later calls make up for a
        piece that takes longer. Whether something idle is still to be saved."""
        self._credit = min(self._credit + seconds, seconds)
        if self.store is not None:
            self.store.settle()
        while self._credit >= 0 and (self._tend_oldest() or self._tend_unsaved()):
            pass
        return bool(self._unsaved)

    def _tend_oldest(self) -> bool:
        """Cuts what the credit allows off the longest unused sequence, if it is due; whether it was."""
        price = self.compute if self.store is None else 2 * self._move
        if self.context.ordered or not self._idle.due(price):
            return False
        begun = time.perf_counter()
        self._shrink(self._idle.oldest(), PIECE * self._affordable() if self.store is not None else self.context.cells)
        self._credit -= time.perf_counter() - begun
        return True

    def _tend_unsaved(self) -> bool:
        """Saves what the credit allows of an idle sequence, so that it can leave at once; whether there was one."""
        if not self._unsaved:
            return False
        begun = time.perf_counter()
        seq, start = self._unsaved.popitem()
        if seq in self._idle and start < self.tree.length(seq):
            self._unsaved[seq] = self._save(seq, start, self._affordable())
        self._credit -= time.perf_counter() - begun
        return True

    def _affordable(self) -> int:
        """Pieces that the credit is enough for, at least one."""
        return max(1, int(self._credit / (PIECE * self._move)))

    def clear(self) -> None:
        """Lets every idle sequence leave and frees what was wasted. Nothing is leased."""
        begun, cells = time.perf_counter(), self.tree.cells
        while self._idle:
            self._evict(self._idle.oldest())
        self.context.clear()
        self._clearing = (time.perf_counter() - begun) / max(1, cells)

    def _shrink(self, seq: int, wanted: int) -> None:
        """Cuts about `wanted` cells or more off the end of an idle sequence, or lets it leave if it holds no more."""
        length, own = self.tree.length(seq), self.tree.own(seq)
        keep = max(0, (length - wanted) // PIECE * PIECE)
        if keep <= length - own or not self.context.partial:
            self._evict(seq)
            return
        self._save(seq, keep)
        self.context.cut(seq, keep)
        self.tree.truncate(seq, keep)
        self._idle_cells = None
        if self.context.window and not self.context.intact(seq, keep):
            self._free_id(seq)

    def _evict(self, seq: int) -> None:
        """Lets an idle sequence leave; what nobody else holds of it is saved."""
        if self.tree.length(seq) and not self._redundant(seq):
            self._save(seq, self.tree.length(seq) - self.tree.own(seq) if self.context.partial else 0)
        self._free_id(seq)

    def _free_id(self, seq: int) -> None:
        self._idle.remove(seq)
        self._unsaved.pop(seq, None)
        self._idle_cells = None
        self.context.cut(seq, 0)
        self.tree.remove(seq)
        self._free.append(seq)
        if not self.tree.cells:
            self._top = 0

    def _save_soon(self, lease: Lease) -> None:
        """Saves what could not be saved later: pieces that leave a sliding window, and texts at their stops."""
        passed = len(lease.stops)
        while lease.stops and lease.length >= lease.stops[0]:
            del lease.stops[0]
        if len(lease.stops) < passed:
            self._save(lease.seq, 0)
        if self.store is not None and self.context.window and lease.length - lease.saved >= PIECE:
            end = lease.length // PIECE * PIECE
            self._save(lease.seq, lease.saved, end=end)
            lease.saved = end

    def _save(self, seq: int, start: int, most: int | None = None, end: int | None = None) -> int:
        """Saves what the store does not have of `seq` from `start` on, at most `most` pieces of it; up to where it
        looked."""
        length = self.tree.length(seq)
        if self.store is None or self.shifted:
            return length
        begun, saved = time.perf_counter(), 0
        places = self.store.places(self.tree.tokens(seq)[:end], self.tree.salt(seq), start, most)
        for piece in places:
            first = self._begin(piece)
            if (state := self.context.save(seq, first, piece.end)) is None:
                self.store.forget(piece)
            else:
                self.store.keep(piece, state)
                saved += piece.end - first
                self._weight = state.nbytes / (piece.end - first)
        self.saved += saved
        self._moved(saved, begun)
        return places[-1].end if places and len(places) == most else length

    def _moved(self, tokens: int, begun: float) -> None:
        if tokens:
            self._move += 0.2 * ((time.perf_counter() - begun) / tokens - self._move)

    def close(self) -> None:
        """Waits a while for what is being written to disk."""
        if self.store is not None:
            self.store.close()

    def check(self) -> None:
        """Raises AssertionError unless the tree is sound, the context's sequences are as long as it says, and each is
        free, idle or leased."""
        self.tree.check()
        taken = [seq for seq in range(self.context.sequences) if seq in self.tree]
        assert sorted([*self._free, *taken]) == list(range(self.context.sequences)), "each is free or has a place"
        assert self._idle.sequences <= set(taken), "what is idle has a place"
        for seq in range(self.context.sequences):
            known, found = self.tree.length(seq) if seq in taken else 0, self.context.length(seq)
            assert found == known, f"sequence {seq} has {found} positions, the tree says {known}"
