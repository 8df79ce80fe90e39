"""Offloaded prefixes: blocks of KV in RAM and, if configured, on disk.

Equal beginnings are one block: what a thousand conversations share is stored once. A block without a state of its own
only leads to others; its tokens have to be resident in the context, or what follows them cannot be used.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from itertools import islice
from pathlib import Path

from engine.backend import ModelInfo, State
from engine.config import MemoryConfig
from engine.contract import ModelError
from engine.kv.block import BLOCK_TOKENS, MAX_SIBLINGS, Block, BlockChain, root_key
from engine.kv.disk import Disk, UnusableFolder
from engine.kv.tier import Tier

# How long one call waits for the disk before the engine looks at its inbox again.
DISK_WAIT_SECONDS = 0.05
# How many recently stored sequences are searched for parts of a changed prompt.
RECENT_SEQUENCES = 2
# Bytes that may wait to be written to disk; blocks beyond them are not written.
WRITE_QUEUE_BYTES = 2**28


class Offload:
    """At most `ram_bytes` of states in RAM, and `disk_bytes` on `disk`. Belongs to the engine thread.

    With `whole`, for contexts whose states are not divisible, a block's state is that of all positions up to its end
    and cannot be used for fewer.
    """

    def __init__(self, ram_bytes: int, *, whole: bool = False, disk: Disk | None = None, disk_bytes: int = 0) -> None:
        self.ram = Tier(ram_bytes, whole=whole)
        self.disk = Tier(disk_bytes, whole=whole)
        """What is on disk or queued to be written."""
        self.version = 0
        """Grows whenever a state is added or dropped."""
        self._whole = whole
        self._files = disk
        self._writing: dict[str, Block] = {}
        self._roots: dict[str, Block] = {}
        if disk is not None:
            self._open(disk)

    # ── matching ──

    def match(self, tokens: array[int], salt: str, start: int) -> BlockChain:
        """The blocks that continue the first `start` of `tokens` furthest; none if no block does."""
        if self._whole:
            return self._deepest(tokens, salt, start)
        chain: list[Block] = []
        for block, size in self._path(tokens, salt):
            if block.start + size > start:
                if not self.has(block):
                    break
                chain.append(block)
                start = block.start + size
        return BlockChain(tuple(chain), start)

    def _path(self, tokens: array[int], salt: str) -> Iterator[tuple[Block, int]]:
        """The blocks along `tokens` from their start, each with the number of its tokens that match; only the last
        may match in part."""
        at = self._roots.get(root_key(salt))
        while at is not None and at.full:
            at, size = at.nearest(tokens)
            if at is not None:
                yield at, size
            if at is None or size < len(at.tokens):
                return

    def _deepest(self, tokens: array[int], salt: str, start: int) -> BlockChain:
        best: Block | None = None
        at = self._roots.get(root_key(salt))
        while at is not None and at.full:
            ahead = tokens[at.end : at.end + BLOCK_TOKENS]
            for block in islice(reversed(at.children.values()), MAX_SIBLINGS):
                if self.has(block) and block.begins(ahead) and (best is None or block.end > best.end):
                    best = block
            at = at.children.get(ahead.tobytes())
        if best is None or best.end <= start:
            return BlockChain((), start)
        return BlockChain((best,), best.end)

    def blocks_of(self, tokens: array[int], salt: str) -> dict[int, Block]:
        """The blocks of `tokens` that have a state, by their start."""
        return {
            block.start: block
            for block, size in self._path(tokens, salt)
            if size == min(len(block.tokens), len(tokens) - block.start) and self.has(block)
        }

    def recent(self, tokens: array[int], salt: str) -> list[array[int]]:
        """The token sequences stored most recently that branch off `tokens`, the latest first."""
        at = self._roots.get(root_key(salt))
        while at is not None and (child := at.children.get(tokens[at.end : at.end + BLOCK_TOKENS].tobytes())):
            at = child
        found: list[array[int]] = []
        for block in islice(reversed(at.children.values()), RECENT_SEQUENCES) if at is not None else ():
            while block.children:
                block = next(reversed(block.children.values()))
            found.append(block.prefix)
        return found

    def has(self, block: Block) -> bool:
        """True if the state of `block` is in RAM or on disk."""
        return block in self.ram or block in self.disk

    # ── reading ──

    def prefetch(self, blocks: Sequence[Block], *, wait: bool) -> bool:
        """Starts to read those of `blocks` that are only on disk. True if `get` can answer for the first now; with
        `wait` it waits up to `DISK_WAIT_SECONDS` for that."""
        for block in blocks:
            if block.state is None and block.reading is None and block in self.disk and self._files is not None:
                block.reading = self._files.read(block.key)
        if not blocks or (reading := blocks[0].reading) is None:
            return True
        if wait:
            futures.wait([reading], DISK_WAIT_SECONDS)
        return reading.done()

    def get(self, block: Block) -> State | None:
        """The state of a block that was prefetched; None if it is gone."""
        state = block.state
        if state is None and block.reading is not None:
            state, block.reading = block.reading.result(), None
            if state is None:
                self._lose(block)
            elif state.nbytes <= self.ram.capacity and block in self.disk:  # else it left while it was being read
                self._hold(block, state)
        elif state is not None:
            self.ram.touch(block)
        if block in self.disk and self._files is not None:
            self.disk.touch(block)
            self._files.touch(block.key)
        return state

    def cancel(self, blocks: Iterable[Block]) -> None:
        """Gives up the reads of `blocks`; a state that has been read is kept if there is room."""
        for block in blocks:
            if block.reading is not None and block.reading.done():
                self.get(block)
            elif block.reading is not None:
                block.reading.cancel()  # the result of one that has begun is dropped
                block.reading = None

    # ── adding and dropping ──

    def missing(self, tokens: array[int], salt: str, start: int) -> list[Block]:
        """The blocks of `tokens` from `start` on that have no state; they are created if need be. With `whole` that is
        only the last one of all.

        The caller gives each of them a state by `put`, or drops it by `prune`.
        """
        blocks: list[Block] = []
        at = self._root(salt) if len(tokens) > start else None
        while at is not None and at.end < len(tokens):
            at = self._next(at, tokens)
            if at.end > start and not self.has(at):
                blocks.append(at)
        return [block for block in blocks if block.end == len(tokens)] if self._whole else blocks

    def pin(self, tokens: array[int], salt: str) -> Block:
        """The last block of `tokens`, which are a multiple of `BLOCK_TOKENS`; the root if there are none. Blocks are
        created if need be, and stay in the tree until `unpin`."""
        at = self._root(salt)
        while at.end < len(tokens):
            at = at.child(tokens[at.end : at.end + BLOCK_TOKENS])
        at.pins += 1
        return at

    def pin_child(self, block: Block, tokens: array[int]) -> Block:
        """Moves a pin from `block` to its child of `tokens`, which is created if need be."""
        child = block.child(tokens)
        child.pins += 1
        self.unpin(block)
        return child

    def unpin(self, block: Block) -> None:
        """Undoes a `pin`."""
        block.pins -= 1
        self.prune(block)

    def _root(self, salt: str) -> Block:
        return self._roots.setdefault(key := root_key(salt), Block(None, 0, array("i"), key))

    def _next(self, at: Block, tokens: array[int]) -> Block:
        """The block of `tokens` after `at`, or one with a state that begins so."""
        ahead = tokens[at.end : at.end + BLOCK_TOKENS]
        nearest, size = at.nearest(tokens)
        if nearest is not None and size == len(ahead) < len(nearest.tokens) and self.has(nearest) and not self._whole:
            return nearest
        return at.child(ahead)

    def put(self, block: Block, state: State) -> None:
        """Stores the state of `block`, which may evict others, and queues it to be written if there is a disk."""
        self._attach(block)
        if not self._whole and block.parent is not None:
            siblings = islice(reversed(block.parent.children.values()), MAX_SIBLINGS)
            for shorter in [each for each in siblings if each is not block and each.begins(block.tokens)]:
                self._drop(shorter)
        self._write(block, state)
        if state.nbytes <= self.ram.capacity:
            self._attach(block)  # the disk may have been too full for it
            self._hold(block, state)
        self.prune(block)

    def _hold(self, block: Block, state: State) -> None:
        block.state = state
        self.ram.add(block, state.nbytes)
        self.version += 1
        while (least := self.ram.pop()) is not None:
            least.state = None
            self.prune(least)

    def _attach(self, block: Block) -> None:
        """Puts `block` back into the tree if its parents were pruned since `missing` returned it."""
        while (parent := block.parent) is not None:
            parent.children.setdefault(block.tokens.tobytes(), block)
            block = parent
        self._roots.setdefault(block.key, block)

    def _drop(self, block: Block) -> None:
        if block in self.ram:
            self.ram.remove(block)
        block.state = None
        self._lose(block)

    def prune(self, block: Block) -> None:
        """Takes `block` and its parents out of the tree as far as they have neither states nor children nor pins."""
        while not (block.children or block.pins or self.has(block)):
            parent = block.parent
            if parent is None:
                if self._roots.get(block.key) is block:
                    del self._roots[block.key]
                return
            if parent.children.get(name := block.tokens.tobytes()) is block:
                del parent.children[name]
                self.version += 1
            block = parent

    def erase(self, tokens: array[int], salt: str) -> None:
        """Drops the blocks of `tokens` that lead to no other sequence, last first."""
        while self._whole and (blocks := self.match(tokens, salt, 0).blocks) and not blocks[0].children:
            self._drop(blocks[0])
        # Not by `match`: what precedes a stored block may be in the context only.
        for block in reversed(() if self._whole else self.blocks_of(tokens, salt).values()):
            if block.children or block.end > len(tokens):
                break
            self._drop(block)

    # ── on disk ──

    def _open(self, disk: Disk) -> None:
        """Takes over what is in the folder. Blocks without their parents are removed."""
        entries = disk.entries()
        blocks: dict[str, Block] = {}
        for entry in sorted(entries, key=lambda entry: entry.start):
            parent = blocks.get(entry.parent)
            if entry.start == 0 and parent is None:
                parent = self._roots.setdefault(entry.parent, Block(None, 0, array("i"), entry.parent))
            if parent is None or parent.end != entry.start:
                disk.remove(entry.key)
                continue
            for start in range(0, len(entry.tokens), BLOCK_TOKENS):
                parent = parent.child(entry.tokens[start : start + BLOCK_TOKENS])
            blocks[entry.key] = parent
        for entry in entries:
            block = blocks.get(entry.key)
            if block is not None and block.key == entry.key:
                self.disk.add(block, entry.bytes)
            elif block is not None:
                disk.remove(entry.key)
                self.prune(block)
        self._make_room()

    def _write(self, block: Block, state: State) -> None:
        files = self._files
        if files is None or block in self.disk or files.paused or files.queued > WRITE_QUEUE_BYTES:
            return
        if self._whole:  # the file holds the whole sequence
            files.write(block.key, block.root.key, 0, block.prefix, state)
        elif block.parent is not None:
            files.write(block.key, block.parent.key, block.start, block.tokens, state)
        self._writing[block.key] = block
        self.disk.add(block, state.nbytes)
        self._make_room()

    def poll(self) -> None:
        """Takes in the results of finished writes. Called now and then."""
        if self._files is None:
            return
        for key, size in self._files.finished():
            block = self._writing.pop(key, None)
            if block is not None and block in self.disk:
                if size is None:
                    self._lose(block)
                else:
                    self.disk.resize(block, size)
        self._make_room()

    def _make_room(self) -> None:
        while self._files is not None and (least := self.disk.pop()) is not None:
            self._files.remove(least.key)
            self.prune(least)

    def _lose(self, block: Block) -> None:
        """Removes the file of `block`, if there is one."""
        if block in self.disk:
            self.disk.remove(block)
            if self._files is not None:
                self._files.remove(block.key)
        self.prune(block)

    def close(self) -> None:
        """Waits some seconds for queued writes."""
        if self._files is not None:
            self.poll()
            self._files.close()

    def check(self) -> None:
        """Raises AssertionError unless the tree and the byte budgets agree."""
        total = 0
        blocks: list[Block] = [child for root in self._roots.values() for child in root.children.values()]
        while blocks:
            block = blocks.pop()
            blocks += block.children.values()
            assert block.start % BLOCK_TOKENS == 0 or self._whole, "blocks are aligned"
            assert block.children or block.pins or self.has(block), "a block without a state has children or pins"
            assert (block in self.ram) == (block.state is not None), "the RAM tier counts what is in RAM"
            assert block.full or not block.children, "a short block has no children"
            total += block.state.nbytes if block.state is not None else 0
        assert total == self.ram.bytes <= max(self.ram.capacity, 0), f"{total} bytes, counted are {self.ram.bytes}"


def open_offload(config: MemoryConfig, info: ModelInfo, *, whole: bool) -> Offload | None:
    """The offload tiers of a model; None if neither is configured. Raises ModelError if the folder cannot be used."""
    if not config.keeps:
        return None
    try:
        disk = Disk(Path(config.disk), info.layout) if config.disk else None
    except UnusableFolder as error:
        raise ModelError(f"--cache-disk cannot be used: {error}") from None
    return Offload(config.ram_bytes, whole=whole, disk=disk, disk_bytes=config.disk_bytes)
