"""The proposers that copy from the history against references made of lists and scans."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculate import ngram_map
from engine.speculate.ngram_index import NgramIndex, NgramProposer
from engine.speculate.ngram_map import MAX_CONTINUATIONS, MAX_OCCURRENCES, NgramMapK4vProposer, NgramMapKProposer
from engine.speculate.ngram_simple import NgramSimpleProposer
from tests.sizes import sized

KINDS: list[type[NgramProposer]] = [NgramSimpleProposer, NgramMapKProposer, NgramMapK4vProposer]
DraftFunction = Callable[["NaiveNgramProposer", list[int], int], list[int]]


class NaiveNgramProposer:
    """A reference proposer whose history is a list that is scanned for every draft."""

    def __init__(self, draft: DraftFunction, size_n: int, size_m: int, min_hits: int) -> None:
        self.draft, self.n, self.m, self.min_hits = draft, size_n, size_m, min_hits
        self.history: list[int] = []
        self.lengths: dict[tuple[int, ...], int] = {}

    def key(self) -> tuple[int, ...]:
        return tuple(self.history[-self.n :])

    def starts(self) -> list[int]:
        """Returns the positions after earlier occurrences of the last n tokens, latest first."""
        ends = range(len(self.history) - 1, self.n - 1, -1)
        return [end for end in ends if tuple(self.history[end - self.n : end]) == self.key()]

    def copied(self, start: int, length: int) -> list[int]:
        tokens = list(self.history)
        for position in range(start, start + length):
            tokens.append(tokens[position])
        return tokens[len(self.history) :]

    def propose(self, limit: int) -> list[int]:
        starts = self.starts()
        return self.draft(self, starts, min(limit, self.m)) if len(starts) >= self.min_hits else []

    def learn(self, drafted: int, accepted: int) -> None:
        before = self.lengths.get(self.key(), self.m)
        after = max(before, min(self.m, 2 * drafted)) if accepted == drafted else max(1, accepted)
        self.lengths[self.key()] = after


def simple(naive: NaiveNgramProposer, starts: list[int], length: int) -> list[int]:
    return naive.copied(starts[0], length)


def map_k(naive: NaiveNgramProposer, starts: list[int], length: int) -> list[int]:
    length = min(length, naive.lengths.get(naive.key(), naive.m))
    values = [naive.copied(start, length) for start in starts[:MAX_OCCURRENCES]]
    draft: list[int] = []
    for position in range(length):
        tokens = [value[position] for value in values if value[:position] == draft]
        draft.append(next(token for token in tokens if tokens.count(token) == max(map(tokens.count, tokens))))
    return draft


def map_k4v(naive: NaiveNgramProposer, starts: list[int], length: int) -> list[int]:
    values = [tuple(naive.history[start : start + naive.m]) for start in starts]
    complete = [value for value in values if len(value) == naive.m][:MAX_OCCURRENCES]
    distinct = [value for i, value in enumerate(complete) if value not in complete[:i]][:MAX_CONTINUATIONS]
    for value in distinct:
        if complete.count(value) >= 2 * sum(complete.count(other) for other in distinct if other != value):
            return list(value[:length])
    return []


DRAFTING: dict[type[NgramProposer], DraftFunction] = {
    NgramSimpleProposer: simple,
    NgramMapKProposer: map_k,
    NgramMapK4vProposer: map_k4v,
}


class Operation(NamedTuple):
    """A step of a request. The meaning of the numbers depends on the name; the numbers are reduced to valid values."""

    name: str
    limit: int
    first: int
    second: int
    tokens: list[int]

    @classmethod
    def of(cls, data: bytes) -> Operation:
        """Decodes nine bytes, as hypothesis takes five times as long to draw each part on its own."""
        name = ("observe", "follow", "follow", "follow", "truncate", "shift")[data[0] % 6]
        return cls(name, 1 + data[1] % 10, data[2] % 41, data[3] % 10, list(data[5 : 5 + data[4] % 5] or data[8:]))


OPERATIONS = st.lists(st.binary(min_size=9, max_size=9).map(Operation.of), min_size=50, max_size=80)


class ProposerPair:
    """A proposer and its reference, compared at each step."""

    def __init__(self, kind: type[NgramProposer], size_n: int, size_m: int, min_hits: int, alphabet: int = 5) -> None:
        self.sizes = (size_n, size_m, min_hits)
        self.proposer = kind(*self.sizes)
        self.naive = NaiveNgramProposer(DRAFTING[kind], size_n, size_m, min_hits)
        self.alphabet = alphabet

    def begin(self, tokens: Sequence[int]) -> None:
        self.proposer.begin(tokens)
        self.naive.history += tokens

    def propose(self, limit: int) -> list[int]:
        draft = list(self.proposer.propose(limit).tokens)
        assert draft == self.naive.propose(limit)
        return draft

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        self.proposer.observe(emitted, drafted, accepted)
        if drafted:
            self.naive.learn(drafted, accepted)
        self.naive.history += emitted

    def follow(self, limit: int, cut: int, right: int, other: int) -> None:
        """Verifies all but `cut` tokens of a draft and accepts at most `right` of them."""
        draft = self.propose(limit)
        draft = draft[: max(0, len(draft) - cut)]
        accepted = min(right, len(draft))
        if accepted < len(draft) and other == draft[accepted]:
            other = (other + 1) % self.alphabet
        self.observe([*draft[:accepted], other], len(draft), accepted)

    def truncate(self, length: int) -> None:
        self.proposer.truncate(length)
        self._edited(self.naive.history[:length])

    def shift(self, keep: int, discard: int) -> None:
        self.proposer.shift(keep, discard)
        self._edited(self.naive.history[:keep] + self.naive.history[keep + discard :])

    def _edited(self, history: list[int]) -> None:
        self.naive.history = history
        self.naive.lengths = {}
        fresh = type(self.proposer)(*self.sizes)
        fresh.begin(history)
        assert state(self.proposer) == state(fresh)

    def apply(self, operation: Operation) -> None:
        name, limit, first, second, tokens = operation
        tokens = [token % self.alphabet for token in tokens]
        size = len(self.naive.history)
        match name:
            case "observe":
                self.observe(tokens)
            case "follow":
                self.follow(limit, cut=max(0, first - 37), right=second, other=tokens[0])
            case "truncate":
                self.truncate(max(0, size - first // 2))
            case "shift":
                keep = min(first, size)
                self.shift(keep, min(second, size - keep))


def state(proposer: NgramProposer) -> dict[str, object]:
    """Returns the whole state of a proposer."""
    return {**vars(proposer), "index": vars(proposer.index)}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=sized(120, 2000), deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 3), st.integers(2, 5)),
    prompt=st.binary(max_size=20),
    repeats=st.integers(1, 5),
    operations=OPERATIONS,
)
def test_equals_the_reference(
    kind: type[NgramProposer],
    sizes: tuple[int, int, int, int],
    prompt: bytes,
    repeats: int,
    operations: list[Operation],
) -> None:
    """Runs at least 250 * 50 operations, each followed by a proposal."""
    pair = ProposerPair(kind, *sizes)
    pair.begin([token % pair.alphabet for token in prompt] * repeats)
    for operation in operations:
        pair.apply(operation)
        pair.propose(operation.limit)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_shifts(kind: type[NgramProposer]) -> None:
    pair, chance = ProposerPair(kind, 2, 4, 1, alphabet=2), random.Random(7)
    pair.begin([chance.randrange(2) for _ in range(100)])
    for _ in range(100):
        pair.shift(keep=chance.randrange(20), discard=chance.randrange(1, 50))
        while len(pair.naive.history) < 90:
            pair.follow(limit=5, cut=0, right=chance.randrange(6), other=chance.randrange(2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_history_fed_in_batches_gives_the_same_state(kind: type[NgramProposer]) -> None:
    chance = random.Random(3)
    tokens = [chance.randrange(3) for _ in range(2000)]
    whole, pieces = kind(3, 5), kind(3, 5)
    whole.begin(tokens)
    pieces.begin(tokens[:1])
    pieces.observe(tokens[1:2])
    pieces.observe(tokens[2:1500])
    pieces.observe([])
    pieces.observe(tokens[1500:])
    assert state(whole) == state(pieces)


@pytest.mark.parametrize("kind", [NgramSimpleProposer, NgramMapKProposer])
def test_a_periodic_text_is_continued_periodically(kind: type[NgramProposer]) -> None:
    """The latest occurrence has few tokens after it, so the copy repeats."""
    proposer = kind(size_n=4, size_m=20)
    proposer.begin([1, 2, 3] * 3)
    assert list(proposer.propose(20).tokens) == [1, 2, 3] * 6 + [1, 2]


def test_a_run_of_one_token_goes_on() -> None:
    index = NgramIndex(2)
    index.extend([9, 5, 5, 5])
    assert index.occurrences(10) == [3]
    assert list(index.continuation(3, 4)) == [5, 5, 5, 5]


def test_occurrences_are_latest_first_and_have_enough_following_tokens() -> None:
    index = NgramIndex(1)
    index.extend([4, 0, 4, 0, 0, 4, 0])
    assert index.occurrences(10) == [5, 4, 2]
    assert index.occurrences(2) == [5, 4]
    assert index.occurrences(2, min_following=3) == [4, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_drafted_before_min_hits(kind: type[NgramProposer]) -> None:
    proposer = kind(size_n=2, size_m=1, min_hits=3)
    proposer.begin([1, 2, 3] * 3 + [1, 2])
    assert list(proposer.propose(4).tokens) == [3]
    proposer.truncate(8)
    assert not proposer.propose(4).tokens
    proposer.observe([3, 4, 1, 2])
    assert list(proposer.propose(4).tokens) == [3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("history", [[], [1], [1, 2], [1, 2, 3, 4]])
def test_a_history_without_repetition_has_no_draft(kind: type[NgramProposer], history: list[int]) -> None:
    proposer = kind(size_n=2)
    proposer.begin(history)
    assert not proposer.propose(8).tokens


def test_ngram_simple_copies_after_the_latest_match() -> None:
    proposer = NgramSimpleProposer(size_n=1, size_m=2)
    proposer.begin([1, 7, 7, 1, 7, 7, 1, 8, 9, 1])
    assert list(proposer.propose(5).tokens) == [8, 9]
    assert list(proposer.propose(1).tokens) == [8]


def test_map_k_follows_the_majority_of_agreeing_occurrences() -> None:
    """Token 1 is followed twice by 2 and once by 3; of the occurrences followed by 2 the latest decides the tie."""
    proposer = NgramMapKProposer(size_n=1, size_m=2)
    proposer.begin([1, 2, 5, 1, 2, 6, 1, 3, 5, 1])
    assert list(proposer.propose(2).tokens) == [2, 6]


def learner() -> NgramMapKProposer:
    """Returns a proposer whose history ends with 1, 2; twenty other tokens follow the earlier 1, 2."""
    proposer = NgramMapKProposer(size_n=2, size_m=12)
    proposer.begin([1, 2, *range(10, 30), 1, 2])
    return proposer


def verify(proposer: NgramMapKProposer, right: int) -> int:
    """Verifies a draft, accepts at most `right` tokens of it and appends 1, 2. Returns the length of the draft."""
    draft = list(proposer.propose(100).tokens)
    right = min(right, len(draft))
    proposer.observe([*draft[:right], 99], len(draft), right)
    proposer.observe([50, 1, 2])
    return len(draft)


def test_the_length_shrinks_and_grows_back() -> None:
    proposer = learner()
    assert [verify(proposer, right) for right in (3, 0, 100, 100, 100, 100, 100)] == [12, 3, 1, 2, 4, 8, 12]


def test_a_right_truncated_draft_does_not_shorten_later_drafts() -> None:
    proposer = learner()
    assert len(proposer.propose(100).tokens) == 12
    proposer.observe([10, 99, 1, 2], drafted=1, accepted=1)
    assert verify(proposer, right=8) == 12
    assert len(proposer.propose(100).tokens) == 8
    proposer.observe([10, 11, 99, 1, 2], drafted=2, accepted=2)
    assert len(proposer.propose(100).tokens) == 8


@pytest.mark.parametrize("edit", ["truncate", "shift"])
def test_an_edit_drops_the_lengths(edit: str) -> None:
    proposer = learner()
    assert verify(proposer, right=3) == 12
    assert len(proposer.propose(100).tokens) == 3
    if edit == "truncate":
        proposer.truncate(24)
    else:
        proposer.shift(keep=2, discard=1)
    assert len(proposer.propose(100).tokens) == 12


def test_the_length_learnt_longest_ago_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_map, "MAX_LEARNT_LENGTHS", 2)
    proposer = NgramMapKProposer(size_n=1, size_m=4)
    proposer.begin([1, 2, 3] * 9)
    for key, right in ((1, 1), (2, 1), (1, 1), (3, 1)):
        proposer.observe([key])
        proposer.observe([], drafted=4, accepted=right)
    sizes = []
    for key in (1, 2, 3):
        proposer.observe([key])
        sizes.append(len(proposer.propose(9).tokens))
    assert sizes == [1, 4, 1]


def test_k4v_drafts_the_winner_and_not_the_latest() -> None:
    proposer = NgramMapK4vProposer(size_n=1, size_m=2)
    proposer.begin([1, 7, 8] * 2 + [1, 5, 6, 1])
    assert list(proposer.propose(9).tokens) == [7, 8]
    assert list(proposer.propose(1).tokens) == [7]


def test_k4v_drafts_nothing_without_a_clear_winner() -> None:
    proposer = NgramMapK4vProposer(size_n=1, size_m=2)
    proposer.begin([1, 7, 8] * 3 + [1, 5, 6] * 2 + [1])
    assert not proposer.propose(9).tokens
    proposer.observe([7, 8, 1])
    assert list(proposer.propose(9).tokens) == [7, 8]


def test_k4v_weighs_the_four_most_recent_values() -> None:
    """The most frequent value is the fifth most recent one and does not count."""
    proposer = NgramMapK4vProposer(size_n=1, size_m=1)
    proposer.begin([1, 9] * 9 + [1, 2, 1, 3, 1, 4] + [1, 5] * 6 + [1])
    assert list(proposer.propose(1).tokens) == [5]


def test_k4v_counts_the_latest_32_occurrences() -> None:
    proposer = NgramMapK4vProposer(size_n=1, size_m=1)
    proposer.begin([1, 5] + [1, 7] * 21 + [1, 5] * 10 + [1])
    assert not proposer.propose(1).tokens, "21 against 11"
    proposer.observe([7, 1])
    assert list(proposer.propose(1).tokens) == [7], "22 against 10: the first occurrence no longer counts"


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_frees_the_history(kind: type[NgramProposer]) -> None:
    proposer = kind()
    proposer.begin(range(100))
    proposer.end()
    assert not proposer.index.history
