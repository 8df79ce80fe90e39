"""A piece of a stored prefix, and the tree of them."""

from __future__ import annotations

from array import array
from concurrent.futures import Future
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

from engine.backend import State
from engine.memory.radix import common

PIECE = 32
"""Tokens of a piece. Moving one takes some 0.2 ms, less for each token than moving them one by one; but where the
cells of several requests alternate and values lie transposed, as without flash attention, up to 0.7 ms a token."""
DEPTH = 8192
"""Tokens before a piece at which attention to them costs about as much as all the rest of computing it."""
SIBLINGS = 64
"""Pieces after one piece that are looked at for a common beginning, the latest first."""


class Piece:
    """Up to `PIECE` tokens after its parent's, and the state of their cells while that is in RAM.

    A root, which has no parent, stands for a namespace and holds nothing. Pieces are aligned: each begins at a
    multiple of `PIECE`, and only those without a piece after them may be shorter.
    """

    __slots__ = ("children", "key", "parent", "reading", "start", "state", "tokens")

    def __init__(self, parent: Piece | None, start: int, tokens: array[int], key: str) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.key = key
        """Names it on disk; the same for the same tokens after the same tokens in the same namespace."""
        self.children: dict[bytes, Piece] = {}
        self.state: State | None = None
        self.reading: Future[State | None] | None = None
        """While it is being read from disk."""

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + len(self.tokens)

    @property
    def spelled(self) -> array[int]:
        """All tokens from the start of the text to its end."""
        parts, at = [self.tokens], self.parent
        while at is not None:
            parts.append(at.tokens)
            at = at.parent
        return array("i", [token for part in reversed(parts) for token in part])

    def part(self, start: int, end: int, shift: int = 0) -> array[int]:
        """Its tokens at positions from `start` up to `end`, if it stood `shift` further on."""
        return self.tokens[start - shift - self.start : end - shift - self.start]

    @property
    def root(self) -> Piece:
        """Its namespace's root."""
        at = self
        while at.parent is not None:
            at = at.parent
        return at

    @property
    def cost(self) -> float:
        """What computing it again would take, in units of a token at the start of a text."""
        return len(self.tokens) * (1 + self.start / DEPTH)

    @property
    def full(self) -> bool:
        """Whether others may follow it."""
        return self.parent is None or len(self.tokens) == PIECE

    def child(self, tokens: array[int]) -> Piece:
        """The piece of `tokens` after this one; a new one, which holds nothing, if there is none."""
        name = tokens.tobytes()
        found = self.children.get(name)
        if found is None:
            found = self.children[name] = Piece(self, self.end, tokens, key_of(self.key, name))
        return found

    def nearest(self, tokens: array[int]) -> tuple[Piece | None, int]:
        """The piece after this one that begins most like `tokens` from `self.end` on, and how many tokens of it do."""
        whole = self.children.get(tokens[self.end : self.end + PIECE].tobytes())
        if whole is not None:
            return whole, len(whole.tokens)
        best, most = None, 0
        for child in islice(reversed(self.children.values()), SIBLINGS):
            if (size := common(child.tokens, tokens, self.end)) > most:
                best, most = child, size
        return best, most


class Found(NamedTuple):
    """Pieces whose states together reach `length` tokens of a text, from wherever the search was told to begin."""

    pieces: tuple[Piece, ...]
    length: int


def key_of(parent: str, name: bytes) -> str:
    """The key of a piece with these tokens, as bytes, after that of `parent`."""
    return blake2b(name, key=bytes.fromhex(parent), digest_size=16).hexdigest()


def root_key(salt: str) -> str:
    """The key of a namespace's root."""
    return blake2b(salt.encode(), digest_size=16, person=b"paceline root").hexdigest()
