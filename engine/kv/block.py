"""A block of a stored prefix, its neighbours in the tree, and its key."""

from __future__ import annotations

from array import array
from concurrent.futures import Future
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

from engine.backend import State
from engine.kv.tree import common_length

# Moving a block of this size takes about 0.2 ms. Smaller blocks take longer per token.
BLOCK_TOKENS = 32
# Start of a block that costs twice as much to compute as the first one, because of attention to all tokens before it.
ATTENTION_TOKENS = 8192
# Only the latest children of a block are searched for a common prefix, which bounds the time of a match.
MAX_SIBLINGS = 64


class Block:
    """Up to `BLOCK_TOKENS` tokens that follow the parent's tokens, and the state of their cells while it is in RAM.

    A root has no parent and no tokens; each salt has one root. Each block begins at a multiple of `BLOCK_TOKENS`. Only
    blocks without children may have fewer than `BLOCK_TOKENS` tokens.
    """

    __slots__ = ("children", "key", "parent", "pending_read", "pins", "start", "state", "tokens")

    def __init__(self, parent: Block | None, start: int, tokens: array[int], key: str) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.key = key
        """Name of the block's file: equal for equal tokens after an equal prefix with the same salt."""
        self.children: dict[bytes, Block] = {}
        self.state: State | None = None
        self.pins = 0
        """Number of growing sequences whose last saved block is this one. A pinned block stays in the tree."""
        self.pending_read: Future[State | None] | None = None
        """The pending read from disk; None if there is none."""

    @property
    def end(self) -> int:
        """The position after the block's last token."""
        return self.start + len(self.tokens)

    @property
    def prefix(self) -> array[int]:
        """All tokens from the start of the sequence up to the block's end."""
        parts, block = [self.tokens], self.parent
        while block is not None:
            parts.append(block.tokens)
            block = block.parent
        return array("i", [token for part in reversed(parts) for token in part])

    def is_prefix_of(self, tokens: array[int]) -> bool:
        """Returns True if `tokens` begin with the block's tokens, whatever the block's position."""
        return self.tokens == tokens[: len(self.tokens)]

    def part(self, start: int, end: int, shift: int = 0) -> array[int]:
        """Returns the block's tokens at positions from `start` up to `end`. A position is the original one plus
        `shift`."""
        return self.tokens[start - shift - self.start : end - shift - self.start]

    @property
    def root(self) -> Block:
        """The root of the block's path."""
        block = self
        while block.parent is not None:
            block = block.parent
        return block

    @property
    def path(self) -> list[Block]:
        """The blocks up to this one, the root excluded."""
        blocks, block = list[Block](), self
        while block.parent is not None:
            blocks.append(block)
            block = block.parent
        return blocks[::-1]

    @property
    def cost(self) -> float:
        """Estimated cost of recomputing the block. The unit is the cost of one token at the start of a sequence."""
        return len(self.tokens) * (1 + self.start / ATTENTION_TOKENS)

    @property
    def full(self) -> bool:
        """True if the block may have children."""
        return self.parent is None or len(self.tokens) == BLOCK_TOKENS

    def child(self, tokens: array[int]) -> Block:
        """Returns the child with `tokens`. Creates it, without a state, if it does not exist."""
        name = tokens.tobytes()
        found = self.children.get(name)
        if found is None:
            found = self.children[name] = Block(self, self.end, tokens, key_of(self.key, name))
        return found

    def nearest(self, tokens: array[int]) -> tuple[Block | None, int]:
        """Returns the child that has the longest common prefix with `tokens` from `self.end` on, and the prefix's
        length. Returns (None, 0) if no child matches."""
        whole = self.children.get(tokens[self.end : self.end + BLOCK_TOKENS].tobytes())
        if whole is not None:
            return whole, len(whole.tokens)
        best, longest = None, 0
        for child in islice(reversed(self.children.values()), MAX_SIBLINGS):
            if (size := common_length(child.tokens, tokens, self.end)) > longest:
                best, longest = child, size
        return best, longest


class BlockChain(NamedTuple):
    """Consecutive blocks of a sequence, of which the first `length` tokens of the sequence are used."""

    blocks: tuple[Block, ...]
    length: int


def key_of(parent: str, name: bytes) -> str:
    """Returns the key of a block with the token bytes `name` after the block with key `parent`."""
    return blake2b(name, key=bytes.fromhex(parent), digest_size=16).hexdigest()


def root_key(salt: str) -> str:
    """Returns the key of the root of `salt`."""
    return blake2b(salt.encode(), digest_size=16, person=b"paceline root").hexdigest()
