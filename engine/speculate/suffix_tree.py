"""A suffix tree that grows token by token and counts the continuations of each run of tokens.

The tree contains each run of at most `depth` tokens of its texts as a path from the root. A walk from the root gives
the longest suffix of a history that occurred before, and the continuations of that suffix. The tree is built online
(Ukkonen 1995), for several texts that grow concurrently, with suffixes cut at `depth` tokens:

- A suffix is *settled* when it has `depth` tokens, or when no other occurrence of it in the tree is followed by a
token.
  A settled suffix ends in a leaf, which grows with the text at no cost.
- The other suffixes of a text are *in progress*: the tree contains them already, as parts of other suffixes. They are
  the shortest suffixes, so a text stores only the start of the longest of them, the *active* suffix. When a new token
  does not continue the active suffix in the tree, that suffix is settled, and the next shorter one becomes active.
- Of two texts that end with the same tokens, one owns the leaf, and the other's suffix is in progress on that leaf. If
  the other text gets the next token first, it becomes the owner, and the former owner's suffix is in progress again. A
  leaf can change its owner once per token and suffix; only texts that get the same tokens at the same time cause this.

Suffixes in progress are not counted: **the count of a run of tokens is the number of settled suffixes that begin with
it**. Edges store the counts. Every settled suffix ends in a leaf, so an edge's count is the sum of the counts below it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle, islice
from typing import NamedTuple

from msgspec import Struct


class TreeText:
    """A token sequence in the tree. The suffixes that start at `active` or later are in progress."""

    __slots__ = ("active", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.active = 0


class Edge(Struct, eq=False, gc=False):
    """A leaf: an edge with the tokens of the suffix of `source` that starts at `start`, from the parent's depth to the
    end of `source`.

    `count` is the number of suffixes that were settled through the edge. `source` and `start` are those of the last
    one.
    """

    # gc=False: there are some 100,000 edges and no cycles; a collection that includes them stops all threads for 100
    # ms. Forks are recognised by `type`, because a negative `isinstance` takes 200 ns.

    source: TreeText
    start: int
    count: int


class Fork(Edge, eq=False, gc=False):
    """An edge that ends `depth` tokens below the root, where more than one token may follow.

    `best` is the child with the highest count; of equal ones, the child through which a suffix was settled last.
    """

    depth: int
    best: Edge
    children: dict[int, Edge]


class Locus(NamedTuple):
    """A point in the tree, `length` tokens below the root, inside `edge` or at its end. Valid until the tree grows."""

    edge: Edge
    length: int


class Continuation(NamedTuple):
    """Tokens that may follow a locus, with the chance of each, given the tokens before it."""

    tokens: list[int]
    chances: list[float]


class SuffixTree:
    """The tree. Appending a token visits the paths of the suffixes that it settles: usually a few, at most `depth`."""

    def __init__(self, depth: int = 64) -> None:
        assert depth > 0, "a suffix has a token"
        self.depth = depth
        self.size = 0
        """Number of tokens of all texts."""
        empty = TreeText()
        self._root = Fork(empty, 0, 0, 0, Edge(empty, 0, 0), {})

    def extend(self, text: TreeText, tokens: Iterable[int]) -> None:
        """Appends `tokens` to `text`. All tokens of `text` must have been appended in this tree."""
        for token in tokens:
            self._append(text, token)

    def active(self, text: TreeText) -> Locus:
        """Returns the longest suffix of `text`, of fewer than `depth` tokens, that has another occurrence in the tree.

        If `text` is the only text in the tree, that occurrence is followed by a token.
        """
        length = len(text.tokens) - text.active
        return Locus(self._path(text, length)[1], length)

    def longest(self, query: list[int], hint: int = 1) -> Locus:
        """Returns the longest suffix of `query`, of fewer than `depth` tokens, that is followed by a token in the tree.

        If a suffix is in the tree, so are all shorter ones. So the length is found by exponential search upwards from
        `hint` and then by bisection. `hint` changes the time of the search, not its result.
        """
        found, step = Locus(self._root, 0), 1
        beyond = min(len(query) + 1, self.depth)
        length = min(max(1, hint), beyond - 1)
        while found.length + 1 < beyond:
            edge = self._find(query[-length:])
            if edge is None or not _has_next(edge, length):
                beyond = length
            else:
                found = Locus(edge, length)
            length = min(found.length + step, (found.length + beyond) // 2)
            step *= 2
        return found

    def count(self, tokens: list[int]) -> int:
        """Returns the number of settled suffixes that begin with `tokens`."""
        edge = self._find(tokens) if len(tokens) <= self.depth else None
        return edge.count if edge is not None else 0

    def continuation(self, locus: Locus, limit: int, p_min: float, text: TreeText | None = None) -> Continuation:
        """Returns at most `limit` tokens that may follow `locus`.

        The walk takes the best child of each fork; its chance is its share of the fork's count. The continuation ends
        before the product of the chances falls below `p_min`. On a leaf the continuation copies the leaf's source,
        beyond `depth` if necessary, up to the end of the source. If the source is `text`, the text that ends at the
        locus, the copy then continues with its own beginning (as in LZ77: Ziv, Lempel 1977).
        """
        tokens: list[int] = []
        chances: list[float] = []
        edge, at = locus
        product = 1.0
        while type(edge) is Fork:
            tokens += edge.source.tokens[edge.start + at : edge.start + min(edge.depth, at + limit - len(tokens))]
            chances += [1.0] * (len(tokens) - len(chances))
            chance = edge.best.count / edge.count
            product *= chance
            if len(tokens) == limit or product < p_min:
                return Continuation(tokens, chances)
            at, edge = edge.depth, edge.best
            tokens.append(edge.source.tokens[edge.start + at])
            chances.append(chance)
            at += 1
        start, missing = edge.start + at, limit - len(tokens)
        copied = edge.source.tokens[start : start + missing]
        repeats = edge.source is text and len(copied) < missing
        tokens += islice(cycle(copied + tokens), missing) if repeats else copied
        chances += [1.0] * (len(tokens) - len(chances))
        return Continuation(tokens, chances)

    def _append(self, text: TreeText, token: int) -> None:
        end = len(text.tokens)
        text.tokens.append(token)
        self.size += 1
        while text.active <= end:
            length = end - text.active
            forks, edge = self._path(text, length)
            if not _continues(edge, length, token):
                self._settle(forks, edge, length, text, token)
                text.active += 1
                continue
            if length + 1 == self.depth:
                if type(edge) is Fork and edge.depth == length:
                    forks.append(edge)
                    edge = edge.children[token]
                _pass(forks, edge, text, 1)
                text.active += 1
            return

    def _path(self, text: TreeText, length: int) -> tuple[list[Fork], Edge]:
        """Returns the path of the active suffix's first `length` tokens: the forks, and the edge where the path ends.

        The tree contains these tokens, so the walk compares one token per edge.
        """
        tokens, start = text.tokens, text.active
        forks: list[Fork] = []
        edge: Edge = self._root
        while type(edge) is Fork and (depth := edge.depth) < length:
            forks.append(edge)
            edge = edge.children[tokens[start + depth]]
        return forks, edge

    def _find(self, tokens: list[int]) -> Edge | None:
        """Returns the edge where the path of `tokens` ends. None if the tree does not contain them."""
        edge: Edge = self._root
        at, length = 0, len(tokens)
        while at < length:
            assert type(edge) is Fork, "a leaf is compared up to the last token"
            child = edge.children.get(tokens[at])
            if child is None:
                return None
            end = min(child.depth, length) if type(child) is Fork else length
            start = child.start
            if end > at + 1 and child.source.tokens[start + at : start + end] != tokens[at:end]:
                return None
            edge, at = child, end
        return edge

    def _settle(self, forks: list[Fork], edge: Edge, length: int, text: TreeText, token: int) -> None:
        """Settles the active suffix of `text` in a leaf. `token` is its last token; the others end on `edge` at
        `length`."""
        if not _has_next(edge, length):
            edge.source.active = min(edge.source.active, edge.start)
            _pass(forks, edge, text, 0)
            return
        fork = edge if type(edge) is Fork and edge.depth == length else _split(forks[-1], edge, length)
        _pass(forks, fork, text, 1)
        leaf = fork.children[token] = Edge(text, text.active, 1)
        if fork.best.count <= 1:
            fork.best = leaf


def _has_next(edge: Edge, length: int) -> bool:
    """Returns True if a token follows on `edge` at `length`, which is less than the tree's depth."""
    return type(edge) is Fork or edge.start + length < len(edge.source.tokens)


def _continues(edge: Edge, length: int, token: int) -> bool:
    """Returns True if `token` follows on `edge` at `length`."""
    if type(edge) is Fork and edge.depth == length:
        return token in edge.children
    return _has_next(edge, length) and edge.source.tokens[edge.start + length] == token


def _pass(forks: list[Fork], edge: Edge, text: TreeText, count: int) -> None:
    """Settles the active suffix of `text` through `forks` and `edge`: adds `count` to the count of each, and makes the
    suffix their source."""
    start, child = text.active, edge
    for fork in reversed(forks):
        child.count += count
        child.source = text
        child.start = start
        if child.count >= fork.best.count:
            fork.best = child
        child = fork
    child.count += count


def _split(parent: Fork, edge: Edge, depth: int) -> Fork:
    """Splits `edge`, a child of `parent`, at `depth` and returns the new fork above it.

    The caller must settle a suffix through the fork next: this makes the fork the best child if `edge` was.
    """
    tokens, start = edge.source.tokens, edge.start
    fork = Fork(edge.source, start, edge.count, depth, edge, {tokens[start + depth]: edge})
    parent.children[tokens[start + parent.depth]] = fork
    return fork
