"""The suffix tree and the `suffix` proposer against references made of bytes and scans of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from operator import mul

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculate.suffix import SharedOutputs, SuffixProposer
from engine.speculate.suffix_tree import SuffixTree, TreeText
from tests.sizes import sized

DEPTH = 5
BOUND = 24
SALTS = ["", "tenant"]
FACTOR = 1.5
P_MIN = 0.3

# A draft: tokens and their chances.
Drafted = tuple[bytes, list[float]]
# An operation: its name, the index of the request, two numbers and tokens.
Operation = tuple[str, int, int, int, list[int]]


class NaiveTree:
    """A reference tree: the texts, and the settled suffixes as pairs of text and start, in the order of settling."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.texts: list[bytes] = []
        self.settled: list[tuple[int, int]] = []

    def begin(self) -> int:
        self.texts.append(b"")
        return len(self.texts) - 1

    def tokens_of(self, suffix: tuple[int, int]) -> bytes:
        text, start = suffix
        return self.texts[text][start : start + self.depth]

    def append(self, text: int, token: int) -> None:
        before, token_ = self.texts[text], bytes([token])
        for start in range(len(before) + 1):
            if (text, start) in self.settled:
                continue
            suffix = before[start:]
            if any(suffix + token_ in other for other in self.texts):
                break
            self.settled = [s for s in self.settled if self.tokens_of(s) != suffix]
            self.settled.append((text, start))
        self.texts[text] += token_
        whole = (text, len(before) + 1 - self.depth)
        if whole[1] >= 0 and whole not in self.settled:
            self.settled.append(whole)

    def count(self, tokens: bytes) -> int:
        return sum(self.tokens_of(suffix).startswith(tokens) for suffix in self.settled)

    def longest(self, query: bytes) -> int:
        for length in range(min(len(query), self.depth - 1), 0, -1):
            if any(query[-length:] in text[:-1] for text in self.texts):
                return length
        return 0

    def continuation(self, match: bytes, limit: int, p_min: float, own: int | None) -> Drafted:
        draft, chances, together = b"", list[float](), 1.0
        copied: tuple[int, int] | None = None
        while len(draft) < limit:
            here = match + draft
            passing = [suffix for suffix in self.settled if self.tokens_of(suffix).startswith(here[: self.depth])]
            options = [
                self.tokens_of(suffix)[len(here)] for suffix in passing if len(self.tokens_of(suffix)) > len(here)
            ]
            if options:
                _, _, token = max((options.count(token), position, token) for position, token in enumerate(options))
                chance = options.count(token) / len(options)
            else:
                copied = copied or passing[-1]
                text = self.texts[copied[0]] + (draft if copied[0] == own else b"")
                if copied[1] + len(here) >= len(text):
                    break
                token, chance = text[copied[1] + len(here)], 1.0
            together *= chance
            if together < p_min:
                break
            draft += bytes([token])
            chances.append(chance)
        return draft, chances


class NaiveOutputs:
    """The trees of each salt, newest first; the last salt is the most recently used."""

    def __init__(self, bound: int, depth: int) -> None:
        self.bound, self.depth = bound, depth
        self.trees: dict[str, list[NaiveTree]] = {}

    def use(self, salt: str) -> list[NaiveTree]:
        self.trees[salt] = self.trees.pop(salt)
        return self.trees[salt]

    def size(self) -> int:
        return sum(len(text) for trees in self.trees.values() for tree in trees for text in tree.texts)

    def append(self, salt: str, output: NaiveOutput, token: int) -> None:
        self.trees.setdefault(salt, [])
        trees = self.use(salt)
        if not trees or sum(map(len, trees[0].texts)) >= self.bound // 2:
            trees[:] = [NaiveTree(self.depth), *trees[:1]]
        if output.tree is not trees[0]:
            output.tree, output.text = trees[0], trees[0].begin()
        trees[0].append(output.text, token)
        while self.size() > self.bound:
            del self.trees[next(iter(self.trees))]


class NaiveOutput:
    def __init__(self) -> None:
        self.tree: NaiveTree | None = None
        self.text = 0


class NaiveSuffix:
    def __init__(self, shared: NaiveOutputs, salt: str, prompt_length: int) -> None:
        self.shared, self.salt, self.prompt_length = shared, salt, prompt_length
        self.output = NaiveOutput()
        self.learn(b"")

    def learn(self, history: Iterable[int]) -> None:
        self.tree = NaiveTree(DEPTH)
        self.tree.begin()
        for token in history:
            self.tree.append(0, token)

    @property
    def history(self) -> bytes:
        return self.tree.texts[0]

    def observe(self, emitted: list[int]) -> None:
        for token in emitted:
            if len(self.history) >= self.prompt_length:
                self.shared.append(self.salt, self.output, token)
            self.tree.append(0, token)

    def shift(self, keep: int, discard: int) -> None:
        history = self.history
        if discard:
            self.prompt_length -= sum(keep <= position < keep + discard for position in range(self.prompt_length))
            self.output = NaiveOutput()
            self.learn(history[:keep] + history[keep + discard :])

    def propose(self, limit: int) -> Drafted:
        trees = [self.tree, *(self.shared.use(self.salt) if self.salt in self.shared.trees else [])]
        best: Drafted = (b"", [])
        raw: list[float] = []
        for tree in trees:
            if length := tree.longest(self.history):
                most, own = min(limit, max(1, int(FACTOR * length))), 0 if tree is self.tree else None
                drafted = tree.continuation(self.history[-length:], most, P_MIN, own)
                if sum(accumulate(drafted[1], mul)) > sum(accumulate(raw, mul)):
                    best = (
                        drafted[0],
                        [chance * (1 - 1 / position) for position, chance in enumerate(drafted[1], length + 1)],
                    )
                    raw = drafted[1]
        return best


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), TOKENS), min_size=5, max_size=16), TOKENS, st.integers(1, 9))
def test_tree_equals_the_reference(growth: list[tuple[int, list[int]]], query: list[int], depth: int) -> None:
    tree, naive = SuffixTree(depth), NaiveTree(depth)
    texts = [TreeText() for _ in range(3)]
    assert [naive.begin() for _ in texts] == [0, 1, 2]
    for i, tokens in growth:
        tree.extend(texts[i], tokens)
        for token in tokens:
            naive.append(i, token)
        assert tree.size == sum(map(len, naive.texts))
        known = {text[a:b] for text in naive.texts for a in range(len(text)) for b in range(a + 1, a + 2 + depth)}
        for run in {b"", *known}:
            assert tree.count(list(run)) == naive.count(run)
        for i, text in enumerate(naive.texts):
            ended = bytes([*text, *query])
            for end in (text, ended):
                locus = tree.longest(list(end), hint=len(query))
                assert locus.length == naive.longest(end)
                if locus.length:
                    drafted = tree.continuation(locus, 12, 0.2, texts[i] if end is text else None)
                    expected = naive.continuation(end[-locus.length :], 12, 0.2, i if end is text else None)
                    assert (bytes(drafted.tokens), drafted.chances) == expected


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 9))
def test_active_suffix_of_the_only_text_is_its_longest_match(tokens: list[int], depth: int) -> None:
    tree, text = SuffixTree(depth), TreeText()
    tree.extend(text, tokens)
    assert tree.active(text) == tree.longest(tokens)


class RequestPairs:
    """Three concurrent requests, each with its reference; an ended request is replaced by a new one."""

    def __init__(self) -> None:
        self.shared, self.naive_shared = SharedOutputs(BOUND, DEPTH), NaiveOutputs(BOUND, DEPTH)
        self.pairs = [self.new("", 2), self.new("", 0), self.new("tenant", 3)]

    def new(self, salt: str, prompt_length: int) -> tuple[SuffixProposer, NaiveSuffix]:
        suffix = SuffixProposer(self.shared, salt, prompt_length, depth=DEPTH, factor=FACTOR, p_min=P_MIN)
        return suffix, NaiveSuffix(self.naive_shared, salt, prompt_length)

    def apply(self, name: str, which: int, first: int, second: int, tokens: list[int]) -> None:
        suffix, naive = self.pairs[which]
        length = len(naive.history)
        match name:
            case "observe":
                suffix.observe(tokens)
                naive.observe(tokens)
            case "truncate":
                suffix.truncate(min(first, length))
                naive.shift(min(first, length), max(0, length - first))
            case "shift":
                keep = min(first, length)
                discard = min(second, length - keep)
                suffix.shift(keep, discard)
                naive.shift(keep, discard)
            case "end":
                suffix.end()
                suffix, naive = self.pairs[which] = self.new(SALTS[first % 2], second % 7)
                suffix.begin(tokens)
                naive.observe(tokens)
        limit = 1 + second % 8
        draft, expected = suffix.propose(limit), naive.propose(limit)
        assert (bytes(draft.tokens), list(draft.chances)) == expected
        assert self.shared.size == self.naive_shared.size() <= BOUND


NAMES = ["observe"] * 8 + ["truncate", "shift", "end"]


def operations(drawn: bytes) -> list[Operation]:
    """Decodes ten bytes each, as hypothesis takes several times as long to draw every part on its own."""
    return [
        (NAMES[name % 11], which % 3, first % 31, second % 13, [token % 3 for token in tokens[: 1 + size % 5]])
        for name, which, first, second, size, *tokens in zip(*[iter(drawn)] * 10, strict=False)
    ]


@settings(max_examples=sized(120, 2000), deadline=None)
@given(st.binary(min_size=400, max_size=600).map(operations))
def test_proposer_equals_the_reference(operations: list[Operation]) -> None:
    requests = RequestPairs()
    for operation in operations:
        requests.apply(*operation)


def suffix(
    shared: SharedOutputs | None = None, salt: str = "", prompt_length: int = 0, **options: float
) -> SuffixProposer:
    return SuffixProposer(shared or SharedOutputs(), salt, prompt_length, **options)  # type: ignore[arg-type]


def test_draft_is_as_long_as_the_match() -> None:
    proposer = suffix()
    proposer.begin([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3])
    assert proposer.propose(9).tokens == [4, 5, 6]
    assert proposer.propose(2).tokens == [4, 5]


def test_a_short_match_drafts_one_token() -> None:
    proposer = suffix(factor=0.1)
    proposer.begin([1, 2, 3, 4, 5, 1, 2])
    assert proposer.propose(9).tokens == [3]


def test_most_frequent_continuation_is_drafted_with_its_chance() -> None:
    proposer = suffix()
    proposer.begin([1, 2, 7, 1, 2, 8, 1, 2, 8, 1, 2, 9, 1, 2])
    draft = proposer.propose(1)
    assert (draft.tokens, draft.chances) == ([8], [0.5 * (1 - 1 / 3)])


def test_the_latest_of_equally_frequent_continuations_is_drafted() -> None:
    proposer = suffix()
    proposer.begin([1, 2, 8, 1, 2, 7, 1, 2])
    draft = proposer.propose(1)
    assert (draft.tokens, draft.chances) == ([7], [0.5 * (1 - 1 / 3)])


def test_draft_ends_before_it_gets_unlikely() -> None:
    history = [1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2]
    for p_min, length in ((0.4, 0), (0.3, 2)):
        proposer = suffix(p_min=p_min)
        proposer.begin(history)
        assert len(proposer.propose(9).tokens) == length


def test_a_period_is_continued_beyond_the_history() -> None:
    proposer = suffix()
    proposer.begin([1, 2, 3] * 30)
    assert proposer.propose(50).tokens == ([1, 2, 3] * 30)[:50]


def test_nothing_is_drafted_without_a_match() -> None:
    proposer = suffix()
    proposer.begin([1, 2, 3])
    assert proposer.propose(4).tokens == ()


def test_another_requests_output_is_drafted_within_a_salt() -> None:
    shared = SharedOutputs()
    suffix(shared, "a").begin([1, 2, 3, 4, 5, 6])
    drafts = []
    for salt in ("a", "b"):
        proposer = suffix(shared, salt)
        proposer.begin([2, 3])
        drafts.append(list(proposer.propose(9).tokens))
    assert drafts == [[4, 5], []]


def test_prompts_are_not_shared() -> None:
    shared = SharedOutputs()
    first = suffix(shared, prompt_length=4)
    first.begin([1, 2])
    first.observe([3, 4])
    first.observe([5, 6])
    assert shared.size == 2
    second = suffix(shared)
    second.begin([1, 2])
    assert second.propose(9).tokens == ()


def test_history_is_preferred_to_outputs_of_others() -> None:
    shared = SharedOutputs()
    suffix(shared).begin([1, 2, 8])
    proposer = suffix(shared, prompt_length=9)
    proposer.begin([1, 2, 7, 1, 2])
    assert proposer.propose(1).tokens == [7]


def test_no_sequence_across_an_edit_is_shared() -> None:
    shared = SharedOutputs()
    first = suffix(shared)
    first.begin([1, 2, 3, 4, 5])
    first.truncate(2)
    first.observe([6, 7])
    assert shared.size == 7
    second = suffix(shared, prompt_length=1)
    second.begin([2])
    draft = second.propose(1)
    assert (draft.tokens, draft.chances) == ([3], [0.5])


def test_a_shift_shortens_the_prompt() -> None:
    shared = SharedOutputs()
    proposer = suffix(shared, prompt_length=4)
    proposer.begin([1, 2, 3, 4, 5])
    proposer.shift(1, 2)
    proposer.observe([6])
    assert shared.size == 2
    proposer.truncate(1)
    proposer.observe([7])
    assert shared.size == 3


def test_half_of_the_bound_always_stays() -> None:
    shared = SharedOutputs(8)
    first = suffix(shared)
    first.begin([1, 2, 3, 4, 5, 6])
    assert shared.size == 6
    first.observe([7, 8, 9])
    assert shared.size == 5
    for token, expected in ((2, []), (5, [6]), (8, [])):
        late = suffix(shared, prompt_length=1)
        late.begin([token])
        assert list(late.propose(1).tokens) == expected


def test_the_salt_unused_longest_is_dropped() -> None:
    shared = SharedOutputs(8)
    for salt in ("a", "b"):
        suffix(shared, salt).begin([1, 2, 3])
    late = suffix(shared, "a", prompt_length=1)
    late.begin([1])
    assert late.propose(1).tokens == [2]
    suffix(shared, "c").begin([1, 2, 3])
    assert shared.size == 6
    assert late.propose(1).tokens == [2]
    assert not shared.trees("b")


@pytest.mark.parametrize("bound", [0, 1])
def test_a_bound_of_zero_or_one_shares_nothing(bound: int) -> None:
    shared = SharedOutputs(bound)
    proposer = suffix(shared)
    proposer.begin([1, 2, 3, 1, 2])
    assert shared.size == 0
    assert proposer.propose(1).tokens == [3]


def test_outputs_stay_when_their_request_ends() -> None:
    shared = SharedOutputs()
    first = suffix(shared)
    first.begin([1, 2, 3])
    first.end()
    second = suffix(shared)
    second.begin([1, 2])
    assert second.propose(1).tokens == [3]
