"""The offload tiers: states of blocks in RAM and, if configured, on disk."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence
from concurrent import futures
from concurrent.futures import Future
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from engine.backend import ModelInfo, State
from engine.config import MemoryConfig
from engine.contract import ModelError
from engine.kv.block import BLOCK_TOKENS, MAX_SIBLINGS, Block
from engine.kv.block_tree import BlockTree
from engine.kv.disk import Disk, DiskEntry, UnusableFolder, prepare_folder
from engine.kv.tier import Tier

log = logging.getLogger("paceline.memory")

# Maximum time that one call blocks until a read finishes, so that the engine thread soon executes its commands.
DISK_WAIT_SECONDS = 0.05
# Maximum of bytes queued for writing. While more are queued, new blocks are not written to disk.
WRITE_QUEUE_BYTES = 2**28


class OpenedDisk(NamedTuple):
    """A disk tier, and the blocks that were in its folder."""

    disk: Disk
    entries: list[DiskEntry]


class Offload:
    """The RAM tier with at most `ram_bytes` of states, and the disk tier with at most `disk_bytes` in `disk`.

    Belongs to the engine thread. `whole` is True for contexts whose states are not divisible, as in `BlockTree`.
    """

    def __init__(self, ram_bytes: int, *, whole: bool = False, disk: Disk | None = None, disk_bytes: int = 0) -> None:
        self.tree = BlockTree(self.has, whole=whole)
        self.ram = Tier(ram_bytes, whole=whole)
        self.disk = Tier(disk_bytes, whole=whole)
        """Blocks on disk or queued to be written."""
        self._files: Disk | None = disk
        self._writing: dict[str, Block] = {}  # blocks whose write has not finished, by key
        self._added = 0  # number of states that entered RAM since the start
        # The disk tier and its blocks, while the model's files are being hashed on another thread.
        self._opening: Future[OpenedDisk] | None = None
        if disk is not None:
            self._add_entries(disk, disk.entries())

    @property
    def version(self) -> int:
        """Grows whenever a state enters RAM or a block leaves the tree."""
        return self._added + self.tree.version

    def has(self, block: Block) -> bool:
        """True if the state of `block` is in RAM or on disk."""
        return block in self.ram or block in self.disk

    # ── reading ──

    def prefetch(self, blocks: Sequence[Block], *, wait: bool) -> bool:
        """Starts to read those of `blocks` that are only on disk. Returns True if the first block needs no read or its
        read has finished. With `wait`, blocks for up to `DISK_WAIT_SECONDS` until it has."""
        for block in blocks:
            if block.state is None and block.pending_read is None and block in self.disk and self._files is not None:
                block.pending_read = self._files.read(block.key)
        if not blocks or (read := blocks[0].pending_read) is None:
            return True
        if wait:
            futures.wait([read], DISK_WAIT_SECONDS)
        return read.done()

    def get(self, block: Block) -> State | None:
        """Returns the state of a prefetched block; None if it was evicted or its file is damaged. Blocks while a read
        of it is pending."""
        state = block.state
        if state is None and block.pending_read is not None:
            state, block.pending_read = block.pending_read.result(), None
            if state is None:
                self._remove_file(block)
            elif state.nbytes <= self.ram.capacity and block in self.disk:  # not if it was evicted during the read
                self._add_to_ram(block, state)
        elif state is not None:
            self.ram.touch(block)
        if block in self.disk and self._files is not None:
            self.disk.touch(block)
            self._files.touch(block.key)
        return state

    def cancel(self, blocks: Iterable[Block]) -> None:
        """Cancels the pending reads of `blocks`. A state that has been read already goes to RAM."""
        for block in blocks:
            if block.pending_read is not None and block.pending_read.done():
                self.get(block)
            elif block.pending_read is not None:
                block.pending_read.cancel()  # no effect on a read that has begun, whose result is dropped
                block.pending_read = None

    # ── adding and dropping ──

    def put(self, block: Block, state: State) -> None:
        """Stores the state of `block` in RAM, queues its write to disk, and evicts other blocks that exceed a capacity.
        Drops siblings that are prefixes of `block`."""
        self.tree.attach(block)
        if not self.tree.whole and block.parent is not None:
            siblings = islice(reversed(block.parent.children.values()), MAX_SIBLINGS)
            for shorter in [each for each in siblings if each is not block and each.is_prefix_of(block.tokens)]:
                self._drop(shorter)
        self._write(block, state)
        if state.nbytes <= self.ram.capacity:
            self.tree.attach(block)  # `_write` pruned it if the disk tier evicted it at once
            self._add_to_ram(block, state)
        self.tree.prune(block)

    def _add_to_ram(self, block: Block, state: State) -> None:
        block.state = state
        self.ram.add(block, state.nbytes)
        self._added += 1
        while (evicted := self.ram.pop()) is not None:
            evicted.state = None
            self.tree.prune(evicted)

    def _drop(self, block: Block) -> None:
        if block in self.ram:
            self.ram.remove(block)
        block.state = None
        self._remove_file(block)

    def erase(self, tokens: array[int], salt: str) -> None:
        """Drops the blocks of `tokens` that no other sequence shares, the last block first."""
        whole, match = self.tree.whole, self.tree.match
        while whole and (blocks := match(tokens, salt, 0).blocks) and not blocks[0].children:
            self._drop(blocks[0])
        # `match` would stop at the first block that is not stored, for example one that is only in cells.
        for block in reversed(() if whole else self.tree.blocks_of(tokens, salt).values()):
            if block.children or block.end > len(tokens):
                break
            self._drop(block)

    # ── on disk ──

    def open_later(self, opening: Future[OpenedDisk]) -> None:
        """Uses the disk tier of `opening` from the first `poll` after its end. Blocks stay in RAM until then."""
        self._opening = opening

    def await_disk(self, seconds: float) -> None:
        """Blocks for up to `seconds` until the disk tier can be used."""
        if self._opening is not None:
            futures.wait([self._opening], seconds)
        self.poll()

    def _open(self, opening: Future[OpenedDisk]) -> None:
        """Starts to use the disk tier of `opening`. Logs a warning and goes on without one if it failed."""
        try:
            disk, entries = opening.result()
        except Exception as error:
            log.warning("there is no disk tier: %s", error)
            return
        self._files = disk
        self._add_entries(disk, entries)
        for block in sorted(self.tree.blocks(), key=lambda block: block.start):
            if block.state is not None:
                self._write(block, block.state)

    def _add_entries(self, disk: Disk, entries: list[DiskEntry]) -> None:
        """Adds the blocks in the folder to the tree and the disk tier. Removes files whose parents are missing."""
        blocks: dict[str, Block] = {}
        entries = sorted(entries, key=lambda entry: entry.start)
        for entry in entries:
            parent = blocks.get(entry.parent)
            if entry.start == 0 and parent is None:
                parent = self.tree.root(entry.parent)
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
                self.tree.prune(block)
        self._make_disk_room()

    def _write(self, block: Block, state: State) -> None:
        files = self._files
        if files is None or block in self.disk or files.paused or files.queued > WRITE_QUEUE_BYTES:
            return
        if self.tree.whole:  # the file holds the whole sequence
            files.write(block.key, block.root.key, 0, block.prefix, state)
        elif block.parent is not None:
            files.write(block.key, block.parent.key, block.start, block.tokens, state)
        self._writing[block.key] = block
        self.disk.add(block, state.nbytes)
        self._make_disk_room()

    def poll(self) -> None:
        """Processes the results of finished writes. Called once a step and while the engine is idle."""
        if self._opening is not None and self._opening.done():
            opening, self._opening = self._opening, None
            self._open(opening)
        if self._files is None:
            return
        for key, size in self._files.finished():
            block = self._writing.pop(key, None)
            if block is not None and block in self.disk:
                if size is None:
                    self._remove_file(block)
                else:
                    self.disk.resize(block, size)
        self._make_disk_room()

    def _make_disk_room(self) -> None:
        while self._files is not None and (evicted := self.disk.pop()) is not None:
            self._files.remove(evicted.key)
            self.tree.prune(evicted)

    def _remove_file(self, block: Block) -> None:
        """Removes the file of `block`, if it has one, and prunes the block."""
        if block in self.disk:
            self.disk.remove(block)
            if self._files is not None:
                self._files.remove(block.key)
        self.tree.prune(block)

    def close(self) -> None:
        """Waits up to 5 seconds for queued writes. No method may be called afterwards."""
        if self._files is not None:
            self.poll()
            self._files.close()

    def check(self) -> None:
        """Raises AssertionError unless the tree is valid and its states in RAM are those that the RAM tier counts."""
        self.tree.check()
        total = 0
        for block in self.tree.blocks():
            assert (block in self.ram) == (block.state is not None), "the RAM tier counts the states in RAM"
            total += block.state.nbytes if block.state is not None else 0
        assert total == self.ram.bytes <= max(self.ram.capacity, 0), f"{total} bytes in RAM, {self.ram.bytes} counted"


def open_offload(config: MemoryConfig, info: ModelInfo, digest: Future[str] | None, *, whole: bool) -> Offload | None:
    """Returns the offload tiers of a model; None if neither is configured. The disk tier is opened when `digest`, that
    of the model's files, is known. Raises ModelError if the folder of --cache-disk cannot be used."""
    if not config.offloads:
        return None
    offload = Offload(config.ram_bytes, whole=whole, disk_bytes=config.disk_bytes)
    if not config.disk or digest is None:
        return offload
    folder = Path(config.disk)
    try:
        prepare_folder(folder)
    except UnusableFolder as error:
        raise ModelError(f"--cache-disk cannot be used: {error}") from None
    opening: Future[OpenedDisk] = Future()
    digest.add_done_callback(partial(_open_disk, folder, info.layout, opening))
    offload.open_later(opening)
    return offload


def _open_disk(folder: Path, layout: str, opening: Future[OpenedDisk], digest: Future[str]) -> None:
    """Opens the disk tier and lists its blocks, on the thread that has computed `digest`."""
    try:
        disk = Disk(folder, f"{layout} {digest.result()}")
        opening.set_result(OpenedDisk(disk, disk.entries()))
    except Exception as error:
        opening.set_exception(error)
