"""A block of a stored prefix, its neighbours in the tree, and its key."""

from __future__ import annotations

from array import array
from concurrent.futures import Future
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

from engine.backend import State
from engine.kv.tree import common

# Moving a block of this size takes some 0.2 ms, less per token than smaller ones.
BLOCK_TOKENS = 32
# Position at which attention to the tokens before a block costs as much as the rest of computing the block.
ATTENTION_TOKENS = 8192
# Only the latest children of a block are compared for a common prefix.
MAX_SIBLINGS = 64


class Block:
    """Up to `BLOCK_TOKENS` tokens after its parent's, and the state of their cells while that is in RAM.

    A root has no parent and no tokens; it stands for a namespace. Blocks are aligned: each begins at a multiple of
    `BLOCK_TOKENS`, and only blocks without children may be shorter.
    """

    __slots__ = ("children", "key", "parent", "pending_read", "pins", "start", "state", "tokens")

    def __init__(self, parent: Block | None, start: int, tokens: array[int], key: str) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.key = key
        """Name of the block on disk: equal for equal tokens after an equal prefix in the same namespace."""
        self.children: dict[bytes, Block] = {}
        self.state: State | None = None
        self.pins = 0
        """Number of sequences that grow from this block, which keep it in the tree."""
        self.pending_read: Future[State | None] | None = None
        """The read from disk that is under way; None if there is none."""

    @property
    def end(self) -> int:
        """The position after its last token."""
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
        """True if `tokens` begin with the block's tokens."""
        return self.tokens == tokens[: len(self.tokens)]

    def part(self, start: int, end: int, shift: int = 0) -> array[int]:
        """Returns its tokens at positions from `start` up to `end`, after the block was shifted by `shift`
        positions."""
        return self.tokens[start - shift - self.start : end - shift - self.start]

    @property
    def root(self) -> Block:
        """The root of its namespace."""
        block = self
        while block.parent is not None:
            block = block.parent
        return block

    @property
    def cost(self) -> float:
        """Cost of recomputing the block, in units of a token at the start of a sequence."""
        return len(self.tokens) * (1 + self.start / ATTENTION_TOKENS)

    @property
    def full(self) -> bool:
        """True if other blocks may follow it."""
        return self.parent is None or len(self.tokens) == BLOCK_TOKENS

    def child(self, tokens: array[int]) -> Block:
        """Returns the child with `tokens`, which is created without a state if need be."""
        name = tokens.tobytes()
        found = self.children.get(name)
        if found is None:
            found = self.children[name] = Block(self, self.end, tokens, key_of(self.key, name))
        return found

    def nearest(self, tokens: array[int]) -> tuple[Block | None, int]:
        """Returns the child with the longest common prefix with `tokens` from `self.end` on, and the prefix's
        length."""
        whole = self.children.get(tokens[self.end : self.end + BLOCK_TOKENS].tobytes())
        if whole is not None:
            return whole, len(whole.tokens)
        best, longest = None, 0
        for child in islice(reversed(self.children.values()), MAX_SIBLINGS):
            if (size := common(child.tokens, tokens, self.end)) > longest:
                best, longest = child, size
        return best, longest


class BlockChain(NamedTuple):
    """Consecutive blocks of a sequence that end after `length` tokens."""

    blocks: tuple[Block, ...]
    length: int


def key_of(parent: str, name: bytes) -> str:
    """Returns the key of a block with the token bytes `name` after the block with key `parent`."""
    return blake2b(name, key=bytes.fromhex(parent), digest_size=16).hexdigest()


def root_key(salt: str) -> str:
    """Returns the key of a namespace's root."""
    return blake2b(salt.encode(), digest_size=16, person=b"paceline root").hexdigest()
