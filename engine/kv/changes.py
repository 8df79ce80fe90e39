"""Reports full blocks as they enter and leave cells, RAM and disk, for routers that track the cache.

A block is in cells while a sequence holds its tokens after the same prefix in the same namespace, and in a tier while
the tier has its state. It has the same key in all of them. Blocks of requests with `cache` False are not reported.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from msgspec import Struct

from engine.adapters import is_uncached
from engine.kv.block import BLOCK_TOKENS, Block, key_of, root_key
from engine.kv.offload import Offload
from engine.kv.residents import Residents

BlockMedium = Literal["cells", "ram", "disk"]


class BlockChange(NamedTuple):
    """A full block that entered `medium`, or left it if `stored` is False."""

    medium: BlockMedium
    stored: bool
    block: Block
    namespace: str | None
    """The namespace of the block's prefix. None for a block that left, and for one in RAM or on disk unless the
    namespace is empty, as the tiers keep only the digest of other namespaces."""

    @property
    def hash(self) -> int:
        """64 bits that depend on the namespace and all tokens up to the block's end."""
        return _hash_of(self.block)

    @property
    def parent_hash(self) -> int | None:
        """The hash of the block before; None for the first block of a prefix."""
        parent = self.block.parent
        return None if parent is None or parent.parent is None else _hash_of(parent)

    @property
    def tokens(self) -> array[int]:
        """The tokens of the block."""
        return self.block.tokens


ChangeSink = Callable[[list[BlockChange]], None]


class _HeldChain(Struct):
    """The tokens of a sequence, as full blocks and a rest."""

    namespace: str
    blocks: list[Block]
    """The first one is the root."""
    rest: array[int]

    def cut(self, length: int) -> _HeldChain:
        """Returns the chain of the first `length` tokens."""
        full, size = divmod(length, BLOCK_TOKENS)
        partial_block = self.blocks[full + 1].tokens if full + 1 < len(self.blocks) else self.rest
        return _HeldChain(self.namespace, self.blocks[: full + 1], partial_block[:size])


class BlockChanges:
    """Collects the changes, and passes them to `sink` in `flush`. Belongs to the engine thread.

    The first changes are the blocks that exist when the object is created.
    """

    def __init__(self, residents: Residents, offload: Offload | None, sink: ChangeSink) -> None:
        self._sink = sink
        self._changes: list[BlockChange] = []
        self._holders: dict[tuple[BlockMedium, str], int] = {}  # number of sequences or states that hold a block
        self._chains: dict[int, _HeldChain] = {}
        tree = residents.tree
        for seq in (*residents.allocated, *residents.idle.sequences):
            self.begin(seq, tree.salt(seq))
            self.extend(seq, tree.tokens(seq))
        tree.observer = self
        if offload is not None:
            self._observe_tiers(offload)

    def flush(self) -> None:
        """Passes the changes since the last call to the sink, if there are any."""
        if self._changes:
            self._sink(self._changes)
            self._changes = []

    # ── cells ──

    def begin(self, seq: int, salt: str) -> None:
        """Adds an empty sequence."""
        if not is_uncached(salt):
            self._chains[seq] = _HeldChain(salt, [Block(None, 0, array("i"), root_key(salt))], array("i"))

    def share(self, source: int, target: int, length: int) -> None:
        """Gives `target`, which is empty, the first `length` tokens of `source`."""
        if (chain := self._chains.get(source)) is not None:
            self._chains[target] = chain = chain.cut(length)
            self._hold("cells", chain.blocks[1:], chain.namespace)

    def extend(self, seq: int, tokens: Sequence[int]) -> None:
        """Appends `tokens` to a sequence."""
        if (chain := self._chains.get(seq)) is None:
            return
        chain.rest.extend(tokens)
        known = len(chain.blocks)
        while len(chain.rest) >= BLOCK_TOKENS:
            parent, own = chain.blocks[-1], chain.rest[:BLOCK_TOKENS]
            chain.blocks.append(Block(parent, parent.end, own, key_of(parent.key, own.tobytes())))
            del chain.rest[:BLOCK_TOKENS]
        self._hold("cells", chain.blocks[known:], chain.namespace)

    def truncate(self, seq: int, length: int) -> None:
        """Drops the tokens of a sequence from `length` on."""
        if (chain := self._chains.get(seq)) is not None:
            self._chains[seq] = kept = chain.cut(length)
            self._drop("cells", chain.blocks[len(kept.blocks) :])

    def remove(self, seq: int) -> None:
        """Removes a sequence."""
        self.truncate(seq, 0)
        self._chains.pop(seq, None)

    # ── tiers ──

    def _observe_tiers(self, offload: Offload) -> None:
        whole = offload.tree.whole
        ram, disk = partial(self._on_tier, "ram", whole), partial(self._on_tier, "disk", whole)
        for block in sorted(offload.tree.blocks(), key=lambda block: block.start):
            for tier, on_change in ((offload.ram, ram), (offload.disk, disk)):
                if block in tier:
                    on_change(block, True)
        offload.ram.on_change, offload.disk.on_change = ram, disk

    def _on_tier(self, medium: BlockMedium, whole: bool, block: Block, added: bool) -> None:
        """Counts a state that entered or left a tier. With `whole` a state contains all blocks up to its end."""
        path = [each for each in (block.path if whole else [block]) if len(each.tokens) == BLOCK_TOKENS]
        if added:
            self._hold(medium, path, "" if block.root.key == root_key("") else None)
        else:
            self._drop(medium, path)

    def _hold(self, medium: BlockMedium, blocks: Iterable[Block], namespace: str | None) -> None:
        for block in blocks:
            held = medium, block.key
            self._holders[held] = holders = self._holders.get(held, 0) + 1
            if holders == 1:
                self._changes.append(BlockChange(medium, True, block, namespace))

    def _drop(self, medium: BlockMedium, blocks: Sequence[Block]) -> None:
        """Removes one holder of each block, the last block first."""
        for block in reversed(blocks):
            holders = self._holders.pop((medium, block.key)) - 1
            if holders:
                self._holders[medium, block.key] = holders
            else:
                self._changes.append(BlockChange(medium, False, block, None))


def _hash_of(block: Block) -> int:
    return int(block.key[:16], 16)
