"""The prefix tree compared with a naive model: a list of cell objects for each sequence."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv.tree import PrefixTree, Resident
from tests.sizes import sized


class NaivePrefixTree:
    """A reference tree: each sequence is a list of pairs of token and cell, and cells are shared by identity."""

    def __init__(self) -> None:
        self.held: dict[int, list[tuple[int, object]]] = {}
        self.salts: dict[int, str] = {}

    def matches(self, tokens: list[int], salt: str, *, whole: bool) -> dict[int, int]:
        def same(seq: int) -> int:
            pairs = zip(tokens, self.held[seq], strict=False)
            return next((i for i, (a, (b, _)) in enumerate(pairs) if a != b), min(len(tokens), len(self.held[seq])))

        found = {seq: same(seq) for seq in self.held if self.salts[seq] == salt}
        return {seq: size for seq, size in found.items() if size and (size == len(self.held[seq]) or not whole)}

    def cells(self) -> int:
        return len({id(cell) for held in self.held.values() for _, cell in held})

    def exclusive(self, seq: int) -> int:
        others = {id(cell) for other, held in self.held.items() if other != seq for _, cell in held}
        return sum(id(cell) not in others for _, cell in self.held[seq])


TOKENS = st.lists(st.integers(0, 2), max_size=6)
OPERATION = st.tuples(
    st.sampled_from(["begin", "extend", "share", "truncate", "remove"]),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 12),
    TOKENS,
    st.sampled_from(["", "other"]),
)


def apply(tree: PrefixTree, naive: NaivePrefixTree, operation: tuple[str, int, int, int, list[int], str]) -> None:
    name, seq, other, length, tokens, salt = operation
    known = seq in naive.held
    match name:
        case "begin" if not known:
            tree.begin(seq, salt)
            naive.held[seq], naive.salts[seq] = [], salt
        case "extend" if known:
            tree.extend(seq, tokens)
            naive.held[seq] += [(token, object()) for token in tokens]
        case "share" if known and other not in naive.held:
            length = min(length, len(naive.held[seq]))
            tree.share(seq, other, length)
            naive.held[other], naive.salts[other] = naive.held[seq][:length], naive.salts[seq]
        case "truncate" if known:
            tree.truncate(seq, length)
            del naive.held[seq][length:]
        case "remove" if known:
            tree.remove(seq)
            del naive.held[seq], naive.salts[seq]


@settings(max_examples=sized(150, 2000), deadline=None)
@given(st.lists(OPERATION, max_size=40), TOKENS)
def test_equals_the_naive_model(operations: list[tuple[str, int, int, int, list[int], str]], query: list[int]) -> None:
    tree, naive = PrefixTree(), NaivePrefixTree()
    for operation in operations:
        apply(tree, naive, operation)
        tree.check()
        assert tree.cells == naive.cells()
        assert sum(1 for _ in tree.runs()) <= 2 * len(naive.held)
        for salt in ("", "other"):
            for tokens in (query, operation[4]):
                for whole in (True, False):
                    expected = naive.matches(tokens, salt, whole=whole)
                    assert tree.matches(array("i", tokens), salt, whole=whole) == expected
                    found = tree.match(array("i", tokens), salt, whole=whole)
                    assert found.length == max(expected.values(), default=0)
                if found.length:
                    assert [token for token, _ in naive.held[found.seq]][: found.length] == tokens[: found.length]
                    assert naive.salts[found.seq] == salt
    for seq, held in naive.held.items():
        assert tree.length(seq) == len(held)
        assert list(tree.tokens(seq)) == [token for token, _ in held]
        assert tree.exclusive(seq) == naive.exclusive(seq)


def test_a_shared_prefix_is_found_in_the_middle_of_a_run() -> None:
    tree = PrefixTree()
    tree.begin(0)
    tree.extend(0, list(range(103)))
    assert tree.match(array("i", [*range(100), 500])) == Resident(0, 100)


def test_equal_tokens_of_another_salt_are_not_found() -> None:
    tree = PrefixTree()
    tree.begin(0, "tenant")
    tree.extend(0, [1, 2, 3])
    assert tree.match(array("i", [1, 2, 3])) == Resident(-1, 0)
    assert tree.match(array("i", [1, 2, 3]), "tenant").length == 3


def test_equal_tokens_computed_twice_count_twice() -> None:
    tree = PrefixTree()
    for seq in (0, 1):
        tree.begin(seq)
        tree.extend(seq, [7, 8])
    assert tree.cells == 4
    tree.remove(0)
    assert tree.match(array("i", [7, 8])) == Resident(1, 2)


def test_the_version_grows_when_a_prefix_is_dropped() -> None:
    tree = PrefixTree()
    tree.begin(0)
    tree.extend(0, [1, 2, 3])
    version = tree.version
    tree.truncate(0, 3)
    assert tree.version == version
    tree.truncate(0, 2)
    assert tree.version > version


def test_a_sequence_is_begun_once() -> None:
    tree = PrefixTree()
    tree.begin(0)
    with pytest.raises(AssertionError):
        tree.begin(0)
