"""A block of a stored prefix, and the tree of blocks."""

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
# Tokens before a block at which attention to them costs about as much as the rest of computing the block.
ATTENTION_TOKENS = 8192
# Blocks after one block that are compared for a common beginning, the latest first.
MAX_SIBLINGS = 64


class Block:
    """Up to `BLOCK_TOKENS` tokens after its parent's, and the state of their cells while that is in RAM.

    A root, which has no parent, stands for a namespace and has no tokens. Blocks are aligned: each begins at a multiple
    of `BLOCK_TOKENS`, and only blocks without children may be shorter.
    """

    __slots__ = ("children", "key", "parent", "pins", "reading", "start", "state", "tokens")

    def __init__(self, parent: Block | None, start: int, tokens: array[int], key: str) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.key = key
        """Names the block on disk; equal for equal tokens after equal tokens in the same namespace."""
        self.children: dict[bytes, Block] = {}
        self.state: State | None = None
        self.pins = 0
        """Number of sequences that grow from here; while there are any, the block stays in the tree."""
        self.reading: Future[State | None] | None = None
        """Set while the block is being read from disk."""

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + len(self.tokens)

    @property
    def prefix(self) -> array[int]:
        """All tokens from the start of the sequence up to the block's end."""
        parts, at = [self.tokens], self.parent
        while at is not None:
            parts.append(at.tokens)
            at = at.parent
        return array("i", [token for part in reversed(parts) for token in part])

    def begins(self, tokens: array[int]) -> bool:
        """True if `tokens` begin with the block's."""
        return self.tokens == tokens[: len(self.tokens)]

    def part(self, start: int, end: int, shift: int = 0) -> array[int]:
        """Its tokens at positions from `start` up to `end`, after the block was shifted by `shift` positions."""
        return self.tokens[start - shift - self.start : end - shift - self.start]

    @property
    def root(self) -> Block:
        """Its namespace's root."""
        at = self
        while at.parent is not None:
            at = at.parent
        return at

    @property
    def cost(self) -> float:
        """The cost of computing it again, in units of a token at the start of a sequence."""
        return len(self.tokens) * (1 + self.start / ATTENTION_TOKENS)

    @property
    def full(self) -> bool:
        """True if other blocks may follow it."""
        return self.parent is None or len(self.tokens) == BLOCK_TOKENS

    def child(self, tokens: array[int]) -> Block:
        """The block of `tokens` after this one; a new one without a state if there is none."""
        name = tokens.tobytes()
        found = self.children.get(name)
        if found is None:
            found = self.children[name] = Block(self, self.end, tokens, key_of(self.key, name))
        return found

    def nearest(self, tokens: array[int]) -> tuple[Block | None, int]:
        """The child that has the longest common prefix with `tokens` from `self.end` on, and that prefix's length."""
        whole = self.children.get(tokens[self.end : self.end + BLOCK_TOKENS].tobytes())
        if whole is not None:
            return whole, len(whole.tokens)
        best, most = None, 0
        for child in islice(reversed(self.children.values()), MAX_SIBLINGS):
            if (size := common(child.tokens, tokens, self.end)) > most:
                best, most = child, size
        return best, most


class BlockChain(NamedTuple):
    """Blocks whose states together reach `length` tokens of a sequence, from wherever the search began."""

    blocks: tuple[Block, ...]
    length: int


def key_of(parent: str, name: bytes) -> str:
    """The key of a block with these tokens, as bytes, after the block with key `parent`."""
    return blake2b(name, key=bytes.fromhex(parent), digest_size=16).hexdigest()


def root_key(salt: str) -> str:
    """The key of a namespace's root."""
    return blake2b(salt.encode(), digest_size=16, person=b"paceline root").hexdigest()
