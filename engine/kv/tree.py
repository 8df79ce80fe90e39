"""Prefix tree of the resident sequences.

The path from a root to a node contains the tokens of a sequence. A node is a run of tokens whose cells are held by the
same sequences. Two sequences share a node only if they share its cells, which begins with `share`, so the summed length
of all nodes is the number of cells in use. Sequences that computed equal tokens independently have sibling nodes.

Each salt has its own root, so sequences with different salts never share a prefix.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Resident(NamedTuple):
    """The longest resident prefix of a prompt: `length` tokens, held by `seq`. `seq` is -1 if no token is resident."""

    seq: int
    length: int


class TreeObserver(Protocol):
    """Observes the edits of a `PrefixTree`, which calls the method with the name and arguments of the edit after it."""

    def begin(self, seq: int, salt: str) -> None: ...

    def share(self, source: int, target: int, length: int) -> None: ...

    def extend(self, seq: int, tokens: Sequence[int]) -> None: ...

    def truncate(self, seq: int, length: int) -> None: ...

    def remove(self, seq: int) -> None: ...


class Node:
    """A run of tokens that follows the parent's run, and the sequences that hold all of its cells."""

    __slots__ = ("children", "holders", "parent", "tokens")

    def __init__(self, parent: Node | None, tokens: array[int], holders: set[int]) -> None:
        self.parent = parent
        self.tokens = tokens
        self.holders = holders
        self.children: dict[int, list[Node]] = {}

    def attach(self, child: Node) -> None:
        """Adds `child`, which must have tokens, to the children of this node."""
        child.parent = self
        self.children.setdefault(child.tokens[0], []).append(child)

    def detach(self, child: Node) -> None:
        """Removes `child` from the children of this node."""
        siblings = self.children[child.tokens[0]]
        siblings.remove(child)
        if not siblings:
            del self.children[child.tokens[0]]


def common_length(left: array[int], right: array[int], start: int, at: int = 0) -> int:
    """Returns the length of the common prefix of `left` from `at` on and `right` from `start` on."""
    size = min(len(left) - at, len(right) - start)
    if size <= 0:
        return 0
    # `argmax` is the index of the first difference, or 0 if there is none.
    unequal = np.frombuffer(left, np.int32, size, 4 * at) != np.frombuffer(right, np.int32, size, 4 * start)
    first = int(unequal.argmax())
    return first if unequal[first] else size


class PrefixTree:
    """The prefix tree of one context. A sequence is in it from `begin` or `share` until `remove`."""

    def __init__(self) -> None:
        self._roots: dict[str, Node] = {}
        self._tails: dict[int, Node] = {}  # last node of each sequence
        self._lengths: dict[int, int] = {}
        self._salts: dict[int, str] = {}
        self.cells = 0
        """Number of cells that sequences hold."""
        self.version = 0
        """Grows whenever a sequence is begun, cut or removed, after which earlier matches may be wrong."""
        self.observer: TreeObserver | None = None

    def __contains__(self, seq: int) -> bool:
        return seq in self._tails

    def length(self, seq: int) -> int:
        """Returns the number of tokens of `seq`."""
        return self._lengths[seq]

    def salt(self, seq: int) -> str:
        """Returns the salt of `seq`."""
        return self._salts[seq]

    def sequences(self, salt: str) -> list[int]:
        """Returns the sequences with this salt, the most recently begun first."""
        return [seq for seq, own in reversed(self._salts.items()) if own == salt]

    def tokens(self, seq: int) -> array[int]:
        """Returns the tokens of `seq`."""
        tokens = array("i")
        for node in reversed([*self._path(self._tails[seq])]):
            tokens.extend(node.tokens)
        return tokens

    def exclusive_tail(self, seq: int) -> int:
        """Returns the number of cells in the last node of `seq` if no other sequence holds the node; 0 otherwise."""
        tail = self._tails[seq]
        return len(tail.tokens) if len(tail.holders) == 1 else 0

    def begin(self, seq: int, salt: str = "") -> None:
        """Adds an empty sequence."""
        assert seq not in self._tails, f"sequence {seq} is in the tree already"
        if salt not in self._roots:
            self._roots[salt] = Node(None, array("i"), set())
        root = self._roots[salt]
        root.holders.add(seq)
        self._tails[seq], self._lengths[seq], self._salts[seq] = root, 0, salt
        self.version += 1
        if self.observer is not None:
            self.observer.begin(seq, salt)

    def match(self, tokens: array[int], salt: str = "", *, whole: bool = False) -> Resident:
        """Returns the longest prefix of `tokens` that a sequence with this salt holds. With `whole`, the prefix must be
        a whole sequence."""
        matches = self.matches(tokens, salt, whole=whole)
        seq = max(matches, key=matches.__getitem__, default=-1)
        return Resident(seq, matches[seq]) if seq >= 0 else Resident(-1, 0)

    def matches(self, tokens: array[int], salt: str = "", *, whole: bool = False) -> dict[int, int]:
        """Returns the length of the common prefix with `tokens` for each sequence with this salt, unless it is 0. With
        `whole`, only for sequences that are prefixes of `tokens` as a whole."""
        root, found = self._roots.get(salt), dict[int, int]()
        pending = [(root, 0)] if root is not None and tokens else []
        while pending:
            node, start = pending.pop()
            for child in node.children.get(tokens[start], ()) if start < len(tokens) else ():
                end = start + common_length(child.tokens, tokens, start)
                complete = end - start == len(child.tokens)
                if not whole:
                    found.update(dict.fromkeys(child.holders, end))
                elif complete:
                    found.update(dict.fromkeys((seq for seq in child.holders if self._tails[seq] is child), end))
                if complete:
                    pending.append((child, end))
        return found

    def share(self, source: int, target: int, length: int) -> None:
        """Adds the sequence `target`, which shares the first `length` cells of `source` and has its salt."""
        assert length <= self._lengths[source], "a sequence shares only tokens that it has"
        self.begin(target, self._salts[source])
        node, end = self._tails[source], self._lengths[source]
        while end - len(node.tokens) >= length and node.parent is not None:
            end -= len(node.tokens)
            node = node.parent
        if end > length:
            node = self._split(node, len(node.tokens) - (end - length))
        self._tails[target], self._lengths[target] = node, length
        for held in self._path(node):
            held.holders.add(target)
        if self.observer is not None:
            self.observer.share(source, target, length)

    def extend(self, seq: int, tokens: Sequence[int]) -> None:
        """Appends `tokens` to `seq`, in cells that only `seq` holds."""
        if not len(tokens):
            return
        node = self._tails[seq]
        if node.parent is None or node.children or len(node.holders) > 1:
            child = Node(node, array("i", tokens), {seq})
            node.attach(child)
            self._tails[seq] = child
        else:
            node.tokens.extend(tokens)
        self._lengths[seq] += len(tokens)
        self.cells += len(tokens)
        if self.observer is not None:
            self.observer.extend(seq, tokens)

    def truncate(self, seq: int, length: int) -> None:
        """Drops the tokens of `seq` from `length` on. Cells that other sequences hold stay in use."""
        node, end = self._tails[seq], self._lengths[seq]
        self.version += end > length
        while end > length:
            start = end - len(node.tokens)
            if start < length:
                node = self._split(node, length - start)
                (child,) = (c for group in node.children.values() for c in group if seq in c.holders)
                self._drop(child, seq)
                break
            parent = node.parent
            assert parent is not None, "a path begins at the root"
            self._drop(node, seq)
            node, end = parent, start
        self._tails[seq], self._lengths[seq] = node, min(length, self._lengths[seq])
        if self.observer is not None:
            self.observer.truncate(seq, self._lengths[seq])

    def remove(self, seq: int) -> None:
        """Removes `seq`. Cells that other sequences hold stay in use."""
        self.truncate(seq, 0)
        salt = self._salts.pop(seq)
        root = self._roots[salt]
        root.holders.discard(seq)
        if not root.holders:
            del self._roots[salt]
        del self._tails[seq], self._lengths[seq]
        if self.observer is not None:
            self.observer.remove(seq)

    def exclusive(self, seq: int) -> int:
        """Returns the number of cells that only `seq` holds."""
        return sum(len(node.tokens) for node in self._path(self._tails[seq]) if len(node.holders) == 1)

    def redundant(self, seq: int) -> bool:
        """Returns True if another sequence holds every cell of `seq`."""
        return len(self._tails[seq].holders) > 1

    def runs(self) -> Iterator[tuple[int, set[int]]]:
        """Yields the number of tokens and the holders of every node."""
        nodes = list(self._roots.values())
        while nodes:
            node = nodes.pop()
            if node.tokens:
                yield len(node.tokens), node.holders
            nodes += (child for group in node.children.values() for child in group)

    def holders(self, seq: int, length: int) -> Iterator[tuple[int, set[int]]]:
        """Yields the number of tokens and the holders of each node of the first `length` tokens of `seq`, the last node
        first."""
        end = self._lengths[seq]
        for node in self._path(self._tails[seq]):
            start = end - len(node.tokens)
            if (size := min(end, length) - start) > 0:
                yield size, node.holders
            end = start

    def _path(self, node: Node) -> Iterator[Node]:
        """Yields `node` and its ancestors, the root excluded."""
        while node.parent is not None:
            yield node
            node = node.parent

    def _split(self, node: Node, at: int) -> Node:
        """Splits `node` after `at` of its tokens. Returns the new upper node. The lower node is the same object as
        before, as `_tails` refers to it."""
        parent = node.parent
        assert parent is not None, "the root is never split"
        assert 0 < at < len(node.tokens), "a node is split inside its run"
        parent.detach(node)
        upper = Node(parent, node.tokens[:at], set(node.holders))
        node.tokens = node.tokens[at:]
        parent.attach(upper)
        upper.attach(node)
        return upper

    def _drop(self, node: Node, seq: int) -> None:
        """Removes `seq` from the holders of `node`. Removes the node from the tree if no holder remains."""
        node.holders.discard(seq)
        parent = node.parent
        assert parent is not None, "the root is never dropped"
        if not node.holders:
            parent.detach(node)
            self.cells -= len(node.tokens)
            self._merge(parent)
        else:
            self._merge(node)

    def _merge(self, node: Node) -> None:
        """Joins `node` with its only child if the same sequences hold both, so that there are at most twice as many
        nodes as sequences. The child's object stays, as `_tails` refers to it."""
        if node.parent is None or len(node.children) != 1:
            return
        ((child, *others),) = node.children.values()
        if others or child.holders != node.holders:
            return
        node.parent.detach(node)
        child.tokens = node.tokens + child.tokens
        node.parent.attach(child)

    def check(self) -> None:
        """Raises AssertionError unless lengths, holders and the number of cells agree with each other."""
        total, nodes = 0, list(self._roots.values())
        while nodes:
            node = nodes.pop()
            below = [child for group in node.children.values() for child in group]
            for child in below:
                assert child.parent is node, "children and parents agree"
                assert child.tokens, "no run is empty"
                assert child.holders, "every run is held"
                assert child.holders <= node.holders, "the holders of a run hold the runs before it"
            total += len(node.tokens)
            nodes += below
        assert total == self.cells, f"the runs have {total} tokens, {self.cells} are counted"
        for seq, tail in self._tails.items():
            path = list(self._path(tail))
            assert all(seq in node.holders for node in path), f"sequence {seq} holds its own path"
            assert sum(len(node.tokens) for node in path) == self._lengths[seq], f"length of sequence {seq}"
