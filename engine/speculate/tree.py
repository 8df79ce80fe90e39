"""A suffix tree that grows with its texts, token by token, and knows how often each run of tokens went on how.

The tree spells every run of at most `depth` tokens that stands in one of its texts: the longest suffix of a history
that was seen before, and what followed it then, are found by a walk from the root. It is built online, as Ukkonen
(1995) does it, for several texts that grow side by side and with suffixes cut at `depth`:

- A suffix is *settled* when it has `depth` tokens, or when its tokens are not elsewhere in the tree with more after
  them. It then has an edge to itself at its end, a leaf, which grows with the text by itself.
- The other suffixes of a text are *in progress*: their tokens are in the tree anyway, as others'. They are the
  shortest ones, so a text keeps only where the longest of them starts, the *active* one. When a new token does not
  continue it in the tree, it is settled, and the next shorter one is active.
- Of two texts that end alike, one owns the leaf, and the other's suffix is in progress on it. When the other gets
  its next token first, the leaf becomes its own, and the former owner's suffix is in progress again. A leaf can
  change hands like that once per token and suffix; only texts that say the same at the same time do it.

Suffixes in progress are not counted: **the count of a run of tokens is the number of settled suffixes that begin with
it**. It is kept on edges, and as every settled suffix ends in a leaf, an edge's count is the sum of those below it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle, islice
from typing import NamedTuple

from msgspec import Struct


class Text:
    """Tokens that grow at their end. The suffixes that start at `active` or later are in progress."""

    __slots__ = ("active", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.active = 0


class Edge(Struct, eq=False, gc=False):
    """A leaf: the tokens from its parent's depth on of the suffix of `source` that starts at `start`, to its end.

    Where several suffixes pass, `source` and `start` name the one that was settled last; `count` says how many.
    """

    # There are some 100,000 edges and no cycles: a collector that visited them would hold everybody up for 100 ms.
    # For the same reason of number, forks are told by `type`: `isinstance` takes 200 ns to say no.

    source: Text
    start: int
    count: int


class Fork(Edge, eq=False, gc=False):
    """An edge that ends at `depth` tokens from the root, where more than one token may follow.

    `best` is the child with the highest count; of equal ones, that which a suffix was last settled through.
    """

    depth: int
    best: Edge
    children: dict[int, Edge]


class Locus(NamedTuple):
    """A place in the tree, `length` tokens from the root, inside `edge` or at its end. Good until the tree grows."""

    edge: Edge
    length: int


class Continuation(NamedTuple):
    """Tokens that may follow a place, and for each how likely it is, given those before it."""

    tokens: list[int]
    chances: list[float]


class SuffixTree:
    """The tree. A token costs the edges on the way to its suffixes' ends, mostly a handful, at most `depth`."""

    def __init__(self, depth: int = 64) -> None:
        assert depth > 0, "a suffix has a token"
        self.depth = depth
        self.size = 0
        """Tokens of all texts."""
        nothing = Text()
        self._root = Fork(nothing, 0, 0, 0, Edge(nothing, 0, 0), {})

    def extend(self, text: Text, tokens: Iterable[int]) -> None:
        """`tokens` follow in `text`, which is in this tree from its first token on, and in no other."""
        for token in tokens:
            self._append(text, token)

    def active(self, text: Text) -> Locus:
        """The longest suffix of `text`, of fewer than `depth` tokens, that is in the tree once more.

        If `text` is the only one, it has a token after it there.
        """
        length = len(text.tokens) - text.active
        return Locus(self._path(text, length)[1], length)

    def longest(self, query: list[int], guess: int = 1) -> Locus:
        """The longest suffix of `query`, of fewer than `depth` tokens, that is in the tree with a token after it.

        If a suffix is there, so are all shorter ones: its length is searched, in larger and larger steps up from
        `guess`, which changes only how long that takes, and then by halving.
        """
        found, step = Locus(self._root, 0), 1
        beyond = min(len(query) + 1, self.depth)
        length = min(max(1, guess), beyond - 1)
        while found.length + 1 < beyond:
            edge = self._find(query[-length:])
            if edge is None or not _goes_on(edge, length):
                beyond = length
            else:
                found = Locus(edge, length)
            length = min(found.length + step, (found.length + beyond) // 2)
            step *= 2
        return found

    def count(self, tokens: list[int]) -> int:
        """How many settled suffixes begin with `tokens`."""
        edge = self._find(tokens) if len(tokens) <= self.depth else None
        return edge.count if edge is not None else 0

    def continuation(self, locus: Locus, limit: int, p_min: float, text: Text | None = None) -> Continuation:
        """At most `limit` tokens: at each fork the best child, as likely as its share of the count.

        It ends before the chance of all its tokens together falls below `p_min`. On a leaf, with one way to go on,
        it copies from the text that was there last, beyond `depth` if need be and up to that text's end. If that is
        `text`, the one that ends at the locus, the copy goes on with what was copied (as in Lempel and Ziv 1977).
        """
        tokens: list[int] = []
        chances: list[float] = []
        edge, at = locus
        together = 1.0
        while type(edge) is Fork:
            tokens += edge.source.tokens[edge.start + at : edge.start + min(edge.depth, at + limit - len(tokens))]
            chances += [1.0] * (len(tokens) - len(chances))
            chance = edge.best.count / edge.count
            together *= chance
            if len(tokens) == limit or together < p_min:
                return Continuation(tokens, chances)
            at, edge = edge.depth, edge.best
            tokens.append(edge.source.tokens[edge.start + at])
            chances.append(chance)
            at += 1
        start, room = edge.start + at, limit - len(tokens)
        run = edge.source.tokens[start : start + room]
        tokens += islice(cycle(run + tokens), room) if edge.source is text and len(run) < room else run
        chances += [1.0] * (len(tokens) - len(chances))
        return Continuation(tokens, chances)

    def _append(self, text: Text, token: int) -> None:
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

    def _path(self, text: Text, length: int) -> tuple[list[Fork], Edge]:
        """The way to the active suffix's first `length` tokens: the forks above, and the edge where they end.

        They are known to be in the tree, so one token per edge tells the way.
        """
        tokens, start = text.tokens, text.active
        forks: list[Fork] = []
        edge: Edge = self._root
        while type(edge) is Fork and (depth := edge.depth) < length:
            forks.append(edge)
            edge = edge.children[tokens[start + depth]]
        return forks, edge

    def _find(self, tokens: list[int]) -> Edge | None:
        """The edge where the way that spells `tokens` ends, if there is one."""
        edge: Edge = self._root
        at, length = 0, len(tokens)
        while at < length:
            assert type(edge) is Fork, "a leaf is compared to the end"
            child = edge.children.get(tokens[at])
            if child is None:
                return None
            end = min(child.depth, length) if type(child) is Fork else length
            start = child.start
            if end > at + 1 and child.source.tokens[start + at : start + end] != tokens[at:end]:
                return None
            edge, at = child, end
        return edge

    def _settle(self, forks: list[Fork], edge: Edge, length: int, text: Text, token: int) -> None:
        """Makes the active suffix a leaf: `edge` has its first `length` tokens, all but the new one, `token`."""
        if not _goes_on(edge, length):
            edge.source.active = min(edge.source.active, edge.start)
            _pass(forks, edge, text, 0)
            return
        fork = edge if type(edge) is Fork and edge.depth == length else _split(forks[-1], edge, length)
        _pass(forks, fork, text, 1)
        leaf = fork.children[token] = Edge(text, text.active, 1)
        if fork.best.count <= 1:
            fork.best = leaf


def _goes_on(edge: Edge, length: int) -> bool:
    """Whether a token follows the place on `edge` at `length`, which is less than the tree's depth."""
    return type(edge) is Fork or edge.start + length < len(edge.source.tokens)


def _continues(edge: Edge, length: int, token: int) -> bool:
    """Whether `token` may follow the place on `edge` at `length`."""
    if type(edge) is Fork and edge.depth == length:
        return token in edge.children
    return _goes_on(edge, length) and edge.source.tokens[edge.start + length] == token


def _pass(forks: list[Fork], edge: Edge, text: Text, count: int) -> None:
    """The active suffix of `text` is settled through `forks` and `edge`, adding `count` to each."""
    start, below = text.active, edge
    for fork in reversed(forks):
        below.count += count
        below.source = text
        below.start = start
        if below.count >= fork.best.count:
            fork.best = below
        below = fork
    below.count += count


def _split(parent: Fork, edge: Edge, depth: int) -> Fork:
    """Puts a fork at `depth` into `edge`, a child of `parent`, and returns it; `edge` is what is below.

    A suffix has to be settled through it next: then it is the best child if `edge` was.
    """
    tokens, start = edge.source.tokens, edge.start
    fork = Fork(edge.source, start, edge.count, depth, edge, {tokens[start + depth]: edge})
    parent.children[tokens[start + parent.depth]] = fork
    return fork
