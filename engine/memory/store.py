"""Prefixes that left the cells, in pieces: in RAM and, if wanted, on disk.

Pieces of equal beginnings are one: what a thousand conversations share is stored once. A piece without a state of its
own only says where others follow; what is missing there has to be resident, or is lost.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from concurrent import futures
from itertools import islice
from pathlib import Path

from engine.backend import ModelInfo, State
from engine.config import MemoryConfig
from engine.contract import ModelError
from engine.memory.disk import Disk, UnusableFolder
from engine.memory.pieces import PIECE, SIBLINGS, Found, Piece, root_key
from engine.memory.shelf import Shelf

PATIENCE = 0.05
"""Seconds to wait for the disk before the inbox is looked at again."""
TEXTS = 2
"""Resident, and as many stored, texts that are looked through for parts of a prompt that has changed."""
QUEUE = 2**28
"""Bytes that may wait to be written to disk; what is kept beyond them is not written."""


class Store:
    """At most `most` bytes of states in RAM, and `disk_most` on `disk`. Belongs to the engine thread.

    With `whole`, for models that keep one state for all of a text, a piece's state is that of everything up to its
    end, and of no use for less.
    """

    def __init__(self, most: int, *, whole: bool = False, disk: Disk | None = None, disk_most: int = 0) -> None:
        self.ram = Shelf(most, whole=whole)
        self.disk = Shelf(disk_most, whole=whole)
        """What is on disk or on its way there."""
        self._whole = whole
        self._files = disk
        self._writing: dict[str, Piece] = {}
        self._used: set[str] = set()  # keys, to be marked so on disk
        self._roots: dict[str, Piece] = {}
        if disk is not None:
            self._open(disk)

    # ── finding ──

    def find(self, tokens: array[int], salt: str, start: int) -> Found:
        """The pieces that continue the first `start` of `tokens` furthest; none if nothing does."""
        return self._deepest(tokens, salt, start) if self._whole else self._chain(tokens, salt, start)

    def _path(self, tokens: array[int], salt: str) -> Iterator[tuple[Piece, int]]:
        """The pieces that spell `tokens` from their start, each with how many of its tokens do, the last maybe not
        all."""
        at = self._roots.get(root_key(salt))
        while at is not None and at.full:
            at, size = at.nearest(tokens)
            if at is not None:
                yield at, size
            if at is None or size < len(at.tokens):
                return

    def _chain(self, tokens: array[int], salt: str, start: int) -> Found:
        chain: list[Piece] = []
        for piece, size in self._path(tokens, salt):
            if piece.start + size > start:
                if not self.has(piece):
                    break
                chain.append(piece)
                start = piece.start + size
        return Found(tuple(chain), start)

    def _deepest(self, tokens: array[int], salt: str, start: int) -> Found:
        best: Piece | None = None
        at = self._roots.get(root_key(salt))
        while at is not None and at.full:
            ahead = tokens[at.end : at.end + PIECE]
            for piece in islice(reversed(at.children.values()), SIBLINGS):
                if self.has(piece) and piece.tokens == ahead[: len(piece.tokens)]:
                    best = piece if best is None or piece.end > best.end else best
            at = at.children.get(ahead.tobytes())
        if best is None or best.end <= start:
            return Found((), start)
        return Found((best,), best.end)

    def along(self, tokens: array[int], salt: str) -> dict[int, Piece]:
        """The pieces that can be had of a text, by their start."""
        return {
            piece.start: piece
            for piece, size in self._path(tokens, salt)
            if size == min(len(piece.tokens), len(tokens) - piece.start) and self.has(piece)
        }

    def latest(self, tokens: array[int], salt: str) -> list[array[int]]:
        """Texts that were kept lately and go on otherwise than `tokens` does, the latest first."""
        at = self._roots.get(root_key(salt))
        while at is not None and (child := at.children.get(tokens[at.end : at.end + PIECE].tobytes())) is not None:
            at = child
        ends: list[Piece] = []
        for piece in islice(reversed(at.children.values()), TEXTS) if at is not None else ():
            while piece.children:
                piece = next(reversed(piece.children.values()))
            ends.append(piece)
        return [piece.spelled for piece in ends]

    def has(self, piece: Piece) -> bool:
        """Whether the state of `piece` can be had, maybe not at once."""
        return piece in self.ram or piece in self.disk

    def fetch(self, pieces: Iterable[Piece], *, wait: bool) -> bool:
        """Begins to read those of `pieces` that are on disk alone; whether `take` can tell of the first now. `wait`
        waits for that a little, so that there is no need to ask all the time."""
        first = None
        for piece in pieces:
            first = first or piece
            if piece.state is None and piece.reading is None and piece in self.disk and self._files is not None:
                piece.reading = self._files.read(piece.key)
        if first is None or first.reading is None:
            return True
        if wait:
            futures.wait([first.reading], PATIENCE)
        return first.reading.done()

    def take(self, piece: Piece) -> State | None:
        """The state of a piece that was fetched; None if it is gone."""
        state = piece.state
        if state is None and piece.reading is not None:
            state, piece.reading = piece.reading.result(), None
            if state is None:
                self._lose(piece)
            elif state.nbytes <= self.ram.most and piece in self.disk:  # else it left while it was read
                self._hold(piece, state)
        elif state is not None:
            self.ram.touch(piece)
        if piece in self.disk:
            self.disk.touch(piece)
            self._used.add(piece.key)
        return state

    def release(self, pieces: Iterable[Piece]) -> None:
        """Nobody waits for what is read of `pieces` any more: what has been read is kept if there is room."""
        for piece in pieces:
            if piece.reading is not None and piece.reading.done():
                self.take(piece)
            elif piece.reading is not None:
                piece.reading.cancel()  # if it has begun, what it reads is dropped
                piece.reading = None

    # ── keeping ──

    def places(self, tokens: array[int], salt: str, start: int, most: int | None = None) -> list[Piece]:
        """The first `most` pieces for `tokens` from `start` on of which there is no state; they are made if need be.

        With `whole` that is only the last one of all. What is not kept is to be given to `forget`.
        """
        pieces: list[Piece] = []
        at = self._roots.setdefault(key := root_key(salt), Piece(None, 0, array("i"), key)) if tokens[start:] else None
        while at is not None and at.end < len(tokens) and (self._whole or len(pieces) != most):
            at = self._next(at, tokens)
            if at.end > start and not self.has(at):
                pieces.append(at)
        return [piece for piece in pieces if piece.end == len(tokens)] if self._whole else pieces

    def _next(self, at: Piece, tokens: array[int]) -> Piece:
        """The piece of `tokens` after `at`, or one that begins so and can be had."""
        ahead = tokens[at.end : at.end + PIECE]
        nearest, size = at.nearest(tokens)
        if nearest is not None and size == len(ahead) < len(nearest.tokens) and self.has(nearest) and not self._whole:
            return nearest
        return at.child(ahead)

    def keep(self, piece: Piece, state: State) -> None:
        """Keeps the state of `piece`, for which others may have to leave, and has it written if there is a disk."""
        self._attach(piece)
        if not self._whole and piece.parent is not None:
            for shorter in self._shorter(piece.parent, piece):
                self._drop(shorter)
        self._write(piece, state)
        if state.nbytes <= self.ram.most:
            self._attach(piece)  # the disk may have been too full for it
            self._hold(piece, state)
        self.forget(piece)

    def _hold(self, piece: Piece, state: State) -> None:
        piece.state = state
        self.ram.add(piece, state.nbytes)
        while (least := self.ram.pop()) is not None:
            least.state = None
            self.forget(least)

    def _attach(self, piece: Piece) -> None:
        """Puts `piece` back if what it led to has left since `places` gave it, and it with that."""
        while (parent := piece.parent) is not None:
            parent.children.setdefault(piece.tokens.tobytes(), piece)
            piece = parent
        self._roots.setdefault(piece.key, piece)

    def _shorter(self, parent: Piece, piece: Piece) -> list[Piece]:
        """What `piece` contains."""
        others = islice(reversed(parent.children.values()), SIBLINGS)
        return [o for o in others if o is not piece and o.tokens == piece.tokens[: len(o.tokens)]]

    def _drop(self, piece: Piece) -> None:
        if piece in self.ram:
            self.ram.remove(piece)
        piece.state = None
        self._lose(piece)

    def forget(self, piece: Piece) -> None:
        """Takes out of the tree `piece`, and what precedes it, as far as it holds nothing and leads nowhere."""
        while not piece.children and not self.has(piece):
            parent = piece.parent
            if parent is None:
                if self._roots.get(piece.key) is piece:
                    del self._roots[piece.key]
                return
            if parent.children.get(name := piece.tokens.tobytes()) is piece:
                del parent.children[name]
            piece = parent

    def erase(self, tokens: array[int], salt: str) -> None:
        """Forgets the pieces of a text that no other leads through, last first."""
        while self._whole and (pieces := self.find(tokens, salt, 0).pieces) and not pieces[0].children:
            self._drop(pieces[0])
        # Not by `find`: what precedes a stored piece may be in cells only.
        for piece in reversed(() if self._whole else self.along(tokens, salt).values()):
            if piece.children or piece.end > len(tokens):
                break
            self._drop(piece)

    # ── on disk ──

    def _open(self, disk: Disk) -> None:
        """Finds what is there. Pieces that nothing leads to are removed."""
        entries = disk.entries()
        pieces: dict[str, Piece] = {}
        for entry in sorted(entries, key=lambda entry: entry.start):
            parent = pieces.get(entry.parent)
            if entry.start == 0 and parent is None:
                parent = self._roots.setdefault(entry.parent, Piece(None, 0, array("i"), entry.parent))
            if parent is None or parent.end != entry.start:
                disk.remove(entry.key)
                continue
            for start in range(0, len(entry.tokens), PIECE):
                parent = parent.child(entry.tokens[start : start + PIECE])
            pieces[entry.key] = parent
        for entry in entries:
            piece = pieces.get(entry.key)
            if piece is not None and piece.key == entry.key:
                self.disk.add(piece, entry.bytes)
            elif piece is not None:
                disk.remove(entry.key)
                self.forget(piece)
        self._make_room()

    def _write(self, piece: Piece, state: State) -> None:
        files = self._files
        if files is None or piece in self.disk or files.paused or files.queued > QUEUE or piece.parent is None:
            return
        if self._whole:  # the file is of all of the text
            files.write(piece.key, piece.root.key, 0, piece.spelled, state)
        else:
            files.write(piece.key, piece.parent.key, piece.start, piece.tokens, state)
        self._writing[piece.key] = piece
        self.disk.add(piece, state.nbytes)
        self._make_room()

    def settle(self) -> None:
        """Learns what became of files that were written, and tells the disk what was of use. To be called now and
        then."""
        if self._files is None:
            return
        for key, size in self._files.finished():
            piece = self._writing.pop(key, None)
            if piece is not None and piece in self.disk:
                if size is None:
                    self._lose(piece)
                else:
                    self.disk.resize(piece, size)
        self._make_room()
        if self._used:
            self._files.touch(self._used)
            self._used = set()

    def _make_room(self) -> None:
        while self._files is not None and (least := self.disk.pop()) is not None:
            self._files.remove(least.key)
            self.forget(least)

    def _lose(self, piece: Piece) -> None:
        """There is no file of `piece`, or is to be none."""
        if piece in self.disk:
            self.disk.remove(piece)
            if self._files is not None:
                self._files.remove(piece.key)
        self.forget(piece)

    def close(self) -> None:
        """Waits a while for what is being written."""
        if self._files is not None:
            self.settle()
            self._files.close()

    def check(self) -> None:
        """Raises AssertionError unless tree and budgets agree."""
        total = 0
        for piece in self._all():
            assert piece.start % PIECE == 0 or self._whole, "pieces are aligned"
            assert piece.children or self.has(piece), "a piece that holds nothing leads somewhere"
            assert (piece in self.ram) == (piece.state is not None), "what is in RAM counts"
            assert piece.full or not piece.children, "nothing follows a short piece"
            total += piece.state.nbytes if piece.state is not None else 0
        assert total == self.ram.bytes <= max(self.ram.most, 0), f"{total} bytes, counted are {self.ram.bytes}"

    def _all(self) -> Iterator[Piece]:
        pieces: list[Piece] = [child for root in self._roots.values() for child in root.children.values()]
        while pieces:
            piece = pieces.pop()
            yield piece
            pieces += piece.children.values()


def open_store(config: MemoryConfig, info: ModelInfo, *, whole: bool) -> Store | None:
    """The store of a model, if there is to be one. Raises ModelError if the folder cannot be used."""
    if not config.keeps:
        return None
    try:
        disk = Disk(Path(config.disk), info.layout) if config.disk else None
    except UnusableFolder as error:
        raise ModelError(f"--cache-disk cannot be used: {error}") from None
    return Store(config.ram_bytes, whole=whole, disk=disk, disk_most=config.disk_bytes)
