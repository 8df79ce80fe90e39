"""`ngram-cache` against a reference made of lists, scans of them and counters of tuples."""

from __future__ import annotations

import random
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checksummed import DamagedFile
from engine.config import SpeculationConfig
from engine.contract import ModelError
from engine.speculate import SharedDraftData, check_draft_files
from engine.speculate.ngram_cache import NgramCacheProposer
from engine.speculate.ngram_counts import (
    COUNTS_FORMAT,
    NGRAM_SIZES,
    STATIC_NGRAM_SIZES,
    NgramCounts,
    count_corpus,
    ngram_keys,
)
from engine.speculate.proposer import Draft
from tests.sizes import sized
from tests.toy import ToyVocab

KEY = bytes(range(32))
OTHER_KEY = bytes(32)
NOTHING = NgramCounts(limit=0)

FollowerCounter = Callable[[tuple[int, ...]], Counter[int]]
CONTEXT_THRESHOLDS = {1: (2, 66), 2: (2, 50), 3: (1, 50), 4: (1, 50)}
DYNAMIC_THRESHOLDS = {1: (4, 75), 2: (3, 66), 3: (2, 66), 4: (2, 66)}


def scanned(history: Sequence[int]) -> FollowerCounter:
    """Returns a function that counts the followers of an n-gram in `history` by a scan."""

    def find(ngram: tuple[int, ...]) -> Counter[int]:
        size = len(ngram)
        places = range(len(history) - size)
        return Counter(history[at + size] for at in places if tuple(history[at : at + size]) == ngram)

    return find


class NaiveCounts:
    """A reference of NgramCounts without a limit."""

    def __init__(self, sizes: Sequence[int] = NGRAM_SIZES) -> None:
        self.sizes = sizes
        self.counts: dict[tuple[int, ...], Counter[int]] = {}

    def add(self, history: Sequence[int], start: int) -> None:
        for size in self.sizes:
            for at in range(max(start, size), len(history)):
                self.counts.setdefault(tuple(history[at - size : at]), Counter())[history[at]] += 1

    def find(self, ngram: tuple[int, ...]) -> Counter[int]:
        return self.counts.get(ngram, Counter())


def next_token(
    history: list[int], context: FollowerCounter, dynamic: FollowerCounter, static: FollowerCounter
) -> tuple[int, float] | None:
    static_counts = static(tuple(history[-2:])) if len(history) >= 2 else Counter[int]()
    for find, thresholds in ((context, CONTEXT_THRESHOLDS), (dynamic, DYNAMIC_THRESHOLDS)):
        for size in (4, 3, 2, 1):
            if len(history) < size or not (found := find(tuple(history[-size:]))):
                continue
            samples, percent = thresholds[size]
            weight = {token: number * (100 * static_counts[token] or 1) for token, number in found.items()}
            _, number, token = max((weight[token], number, -token) for token, number in found.items())
            if found.total() >= samples and 100 * number >= percent * found.total():
                return -token, number / found.total()
    if static_counts:
        number, token = max((number, -token) for token, number in static_counts.items())
        if static_counts.total() >= 2 and 100 * number >= 50 * static_counts.total():
            return -token, number / static_counts.total()
    return None


def naive_draft(history: list[int], max_tokens: int, dynamic: FollowerCounter, static: FollowerCounter) -> Draft:
    context, known = scanned(history), len(history)
    history, chances = list(history), list[float]()
    while len(chances) < max_tokens and (found := next_token(history, context, dynamic, static)):
        history.append(found[0])
        chances.append(found[1])
    return Draft(history[known:], chances) if chances else Draft()


SLOTS = 3
STEPS = 40
NAMES = ["observe", "observe", "observe", "propose", "propose", "truncate", "shift", "restart"]


@settings(max_examples=sized(150, 2000), deadline=None)
@given(
    st.binary(min_size=10 * STEPS, max_size=10 * STEPS),
    st.integers(2, 5),
    st.integers(1, 9),
    st.booleans(),
    st.binary(max_size=40),
    st.binary(max_size=60),
)
def test_equals_the_naive_reference(
    script: bytes, alphabet: int, n_max: int, alone: bool, corpus: bytes, prompts: bytes
) -> None:
    """Runs 12,000 operations, ten bytes each, of three slots that share dynamic counts unless `alone`."""
    static, plain_static = count_corpus([[byte % alphabet for byte in corpus]]), NaiveCounts(STATIC_NGRAM_SIZES)
    plain_static.add([byte % alphabet for byte in corpus], 0)
    dynamic, plain = NOTHING if alone else NgramCounts(), NaiveCounts(() if alone else NGRAM_SIZES)
    slots, histories = [], []
    for at in range(SLOTS):
        slots.append(NgramCacheProposer(dynamic, static, n_max))
        histories.append([byte % alphabet for byte in prompts[at::SLOTS]])
        slots[at].begin(histories[at])
        plain.add(histories[at], 0)
    for step in range(STEPS):
        kind, at, limit, first, second, *tokens = script[10 * step : 10 * step + 10]
        slot, history = slots[at % SLOTS], histories[at % SLOTS]
        size = len(history)
        keep = first * size // 255
        match NAMES[kind % len(NAMES)]:
            case "observe":
                emitted = [token % alphabet for token in tokens[: 1 + limit % 5]]
                slot.observe(emitted)
                history += emitted
                plain.add(history, size)
            case "propose":
                most = min(1 + limit % 10, n_max)
                assert slot.propose(1 + limit % 10) == naive_draft(history, most, plain.find, plain_static.find)
            case "truncate":
                slot.truncate(keep)
                del history[keep:]
            case "shift":
                discard = second * (size - keep) // 255
                slot.shift(keep, discard)
                del history[keep : keep + discard]
            case "restart":
                slot.end()
                slots[at % SLOTS] = slot = NgramCacheProposer(dynamic, static, n_max)
                history[:] = [token % alphabet for token in tokens]
                slot.begin(history)
                plain.add(history, 0)
        assert slot.propose(n_max) == naive_draft(history, n_max, plain.find, plain_static.find)
        check(slot._context, history)
    assert len(dynamic) == len(plain.counts)


def check(counts: NgramCounts, history: list[int]) -> None:
    """Asserts that the counts are exactly those of `history`, without n-grams that have no counts."""
    plain = NaiveCounts()
    plain.add(history, 0)
    assert len(counts) == len(plain.counts)
    for ngram, followers in plain.counts.items():
        assert counts.followers(ngram) == followers


class NaiveBoundedCounts(NaiveCounts):
    """A reference with a limit: a dict holds the n-grams from oldest to newest, in the order of NgramCounts."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def add(self, history: Sequence[int], start: int) -> None:
        super().add(history, start)
        while (excess := len(self.counts) - self.limit) > 0:
            oldest = sorted(list(self.counts)[: 2 * excess], key=lambda ngram: self.counts[ngram].total())
            for ngram in oldest[: len(oldest) // 2]:
                del self.counts[ngram]
            for ngram in oldest[len(oldest) // 2 :]:
                followers = self.counts.pop(ngram)
                halves = Counter({token: number // 2 for token, number in followers.items() if number > 1})
                self.counts[ngram] = halves or Counter({min(followers): 1})


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.integers(1, 30), st.lists(st.integers(1, 60), max_size=30))
def test_bounded_counts_equal_the_naive_reference(drawn: bytes, limit: int, sizes: list[int]) -> None:
    tokens = [byte % 5 for byte in drawn]
    counts, plain = NgramCounts(limit=limit), NaiveBoundedCounts(limit)
    for size in [*sizes, len(tokens)]:
        part, tokens = tokens[:size], tokens[size:]
        counts.add(part, 0)
        plain.add(part, 0)
        assert len(counts) == len(plain.counts) <= limit
        for ngram, followers in plain.counts.items():
            assert counts.followers(ngram) == followers


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3) | st.integers(2**24 - 4, 2**24 - 1), min_size=20, max_size=40), st.integers(0, 20))
def test_no_two_ngrams_have_the_same_number(history: list[int], start: int) -> None:
    keys, tokens = ngram_keys(history, start)
    ngrams = [tuple(history[at - size : at]) for size in NGRAM_SIZES for at in range(max(start, size), len(history))]
    assert len(set(zip(ngrams, keys, strict=True))) == len(set(keys)) == len(set(ngrams))
    assert len(tokens) == len(keys)


# ── differences from llama-server ──


def test_single_tokens_are_learnt() -> None:
    slot = NgramCacheProposer(NOTHING, NOTHING)
    slot.begin([1])
    for token in (2, 3, 4, 5, 1, 2, 3, 4):
        slot.observe([token])
    assert slot.propose(4).tokens == [5, 1, 2, 3]


def test_the_next_request_does_not_inherit_the_context() -> None:
    first = NgramCacheProposer(NOTHING, NOTHING)
    first.begin([1, 2, 3, 4, 5, 1, 2, 3, 4])
    first.end()
    second = NgramCacheProposer(NOTHING, NOTHING)
    second.begin([1, 2, 3, 4])
    assert second.propose(4) == Draft()


def test_outputs_of_others_enter_the_dynamic_counts_at_once() -> None:
    dynamic = NgramCounts()
    for _ in range(2):
        other = NgramCacheProposer(dynamic, NOTHING)
        other.begin([1, 2])
        other.observe([3, 4, 5])
    slot = NgramCacheProposer(dynamic, NOTHING)
    slot.begin([1, 2, 3, 4])
    assert slot.propose(4) == Draft([5], [1.0])


@pytest.mark.parametrize("history", [[], [1], [1, 2], [1, 2, 3]])
def test_short_histories_use_only_existing_ngrams(history: list[int]) -> None:
    dynamic = NgramCounts()
    for _ in range(4):
        dynamic.add([*history, 7], 0)
    slot = NgramCacheProposer(dynamic, count_corpus([[1, 2, 9]] * 2))
    slot.begin(history)
    assert slot.propose(1).tokens == ([7] if history else ())


def test_a_truncated_or_shifted_history_is_dropped_and_the_dynamic_counts_are_not() -> None:
    dynamic = NgramCounts()
    slot = NgramCacheProposer(dynamic, NOTHING)
    slot.begin([1, 2, 3, 4, 5, 6])
    learnt = len(dynamic)
    slot.truncate(4)
    check(slot._context, [1, 2, 3, 4])
    slot.shift(1, 1)
    check(slot._context, [1, 3, 4])
    slot.truncate(0)
    assert len(slot._context) == 0
    assert len(dynamic) == learnt


def test_a_corpus_weighs_the_candidates_and_drafts_without_other_counts() -> None:
    slot = NgramCacheProposer(NOTHING, NOTHING)
    slot.begin([1, 2, 3, 9, 1, 2, 4, 8, 1, 2])
    assert slot.propose(1) == Draft([3], [0.5]), "the smaller of two equally frequent tokens"
    slot = NgramCacheProposer(NOTHING, count_corpus([[1, 2, 4, 4], [2, 4]]))
    slot.begin([1, 2, 3, 9, 1, 2, 4, 8, 1, 2])
    assert slot.propose(1) == Draft([4], [0.5])
    slot = NgramCacheProposer(NOTHING, count_corpus([[1, 2, 3], [1, 2, 3], [1, 2, 7]]))
    slot.begin([1, 2])
    assert slot.propose(2) == Draft([3], [2 / 3])


def test_a_rare_token_that_the_corpus_prefers_stops_the_draft() -> None:
    history = [2, 3, 2, 3, 2, 3, 2, 4, 2]  # token 2 is followed three times by 3 and once by 4
    slot = NgramCacheProposer(NOTHING, NOTHING)
    slot.begin(history)
    assert slot.propose(1) == Draft([3], [0.75])
    slot = NgramCacheProposer(NOTHING, count_corpus([[4, 2, 4]]))
    slot.begin(history)
    assert slot.propose(1) == Draft()


def test_counts_of_a_corpus_are_bigrams_within_a_text() -> None:
    counts = count_corpus([[1, 2], [3, 1, 2, 3]])
    assert len(counts) == 2
    assert counts.followers([3, 1]) == {2: 1}
    assert counts.followers([1, 2]) == {3: 1}


def test_frequent_ngrams_outlive_rare_ones() -> None:
    counts = NgramCounts(limit=400)
    fresh = random.Random(1)
    for _ in range(100):
        counts.add([1, 2, 3, 4, 5], 0)
        counts.add(fresh.choices(range(10, 100_000), k=20), 0)
    assert counts.followers([1, 2, 3, 4]).keys() == {5}
    assert len(counts) <= 400


def test_a_limit_of_zero_keeps_nothing(tmp_path: Path) -> None:
    counts = NgramCounts(limit=0)
    counts.add([1, 2, 3], 0)
    count_corpus([[1, 2, 3]]).save(tmp_path / "counts", KEY)
    counts.load(tmp_path / "counts", KEY, 10)
    assert len(counts) == 0


# ── files ──


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "counts"
    counts = NgramCounts()
    counts.add(random.Random(3).choices(range(90), k=30), 0)
    counts.save(path, KEY)
    return path


def refused(path: Path, key: bytes = KEY, n_vocab: int = 90, sizes: Sequence[int] = NGRAM_SIZES) -> str:
    """Returns the error message; the counts are unchanged."""
    counts, history = NgramCounts(sizes), [1, 2, 3, 1, 2]
    counts.add(history, 0)
    with pytest.raises(DamagedFile) as caught:
        counts.load(path, key, n_vocab)
    if sizes == NGRAM_SIZES:
        check(counts, history)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 5, 300])
def test_saved_counts_come_back(tmp_path: Path, length: int) -> None:
    history = random.Random(4).choices(range(5), k=length)
    counts, loaded = NgramCounts(), NgramCounts()
    counts.add(history, 0)
    counts.save(tmp_path / "counts", KEY)
    loaded.load(tmp_path / "counts", KEY, 5)
    check(loaded, history)
    assert [path.name for path in tmp_path.iterdir()] == ["counts"]


def test_loading_adds_to_existing_counts(tmp_path: Path) -> None:
    counts = count_corpus([[1, 2, 3]])
    counts.save(tmp_path / "counts", KEY)
    counts.load(tmp_path / "counts", KEY, 5)
    assert counts.followers([1, 2]) == {3: 2}


def test_bigram_counts_load_into_counts_of_more_sizes(tmp_path: Path) -> None:
    count_corpus([[1, 2, 3]]).save(tmp_path / "counts", KEY)
    counts = NgramCounts()
    counts.load(tmp_path / "counts", KEY, 5)
    assert counts.followers([1, 2]) == {3: 1}


def test_bounded_counts_stay_bounded_and_keep_their_order_in_a_file(tmp_path: Path) -> None:
    counts, loaded = NgramCounts(limit=50), NgramCounts(limit=50)
    counts.add(random.Random(5).choices(range(9), k=200), 0)
    counts.save(tmp_path / "counts", KEY)
    loaded.load(tmp_path / "counts", KEY, 9)
    assert list(loaded._ages) == list(counts._ages)
    unbounded = NgramCounts()
    unbounded.add(random.Random(5).choices(range(9), k=200), 0)
    unbounded.save(tmp_path / "counts", KEY)
    loaded.load(tmp_path / "counts", KEY, 9)
    assert len(loaded) <= 50


def test_a_torn_file_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        assert "torn" in refused(saved)


def test_a_flipped_byte_is_refused(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    for at in range(len(content)):
        content[at] ^= 0x10
        saved.write_bytes(content)
        refused(saved)
        content[at] ^= 0x10


def test_files_that_belong_elsewhere_are_refused(saved: Path) -> None:
    assert "another vocabulary" in refused(saved, key=OTHER_KEY)
    assert "outside this vocabulary of 50 tokens" in refused(saved, n_vocab=50)
    assert "other sizes" in refused(saved, sizes=STATIC_NGRAM_SIZES)
    saved.write_bytes(COUNTS_FORMAT._replace(magic=b"OTHERONE").seal(KEY, b"payload"))
    assert "another kind" in refused(saved)


@pytest.mark.parametrize(
    "row",
    [
        [-1, -1, -1, -1, 1, 1],
        [-1, 1, -1, 1, 1, 1],
        [-2, -1, -1, 1, 1, 1],
        [-1, -1, -1, 90, 1, 1],
        [-1, -1, -1, 1, 90, 1],
        [-1, -1, -1, 1, -1, 1],
        [-1, -1, -1, 1, 1, 0],
        [-1, -1, -1, 1, 1],
    ],
    ids=["no n-gram", "hole", "negative", "n-gram", "token", "no token", "count", "short"],
)
def test_a_sound_file_with_nonsense_in_it_is_refused(saved: Path, row: list[int]) -> None:
    COUNTS_FORMAT.write(saved, KEY, zlib.compress(np.array(row, "<i4").tobytes()))
    refused(saved)


@pytest.mark.parametrize("body", [b"", b"no archive", zlib.compress(b"odd")], ids=["empty", "noise", "odd"])
def test_a_sound_file_with_noise_in_it_is_refused(saved: Path, body: bytes) -> None:
    COUNTS_FORMAT.write(saved, KEY, body)
    assert "damaged" in refused(saved)


def test_a_failed_save_keeps_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError("disk full")

    before = saved.read_bytes()
    monkeypatch.setattr("os.replace", failing)
    with pytest.raises(OSError, match="disk full"):
        NgramCounts().save(saved, KEY)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["counts"]


@pytest.mark.parametrize("make", [list, tuple, lambda tokens: array("i", tokens)], ids=["list", "tuple", "array"])
def test_any_sequence_type_is_accepted(make: Callable[[list[int]], list[int]]) -> None:
    slot = NgramCacheProposer(NgramCounts(), count_corpus([make([1, 2, 3])]))
    slot.begin(make([4, 1, 2, 3]))
    slot.observe(make([4, 1, 2]))
    assert slot.propose(1).tokens == [3]


@pytest.mark.parametrize("content", [b"GGUF\x03\0\0\0 a model", b"short", b"PLNGMOD\0" + bytes(100)])
def test_a_file_of_another_kind_is_never_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "theirs"
    path.write_bytes(content)
    config = SpeculationConfig(lookup_dynamic=str(path))
    with pytest.raises(ModelError, match=r"--lookup-cache-dynamic: .*another kind of file.*; name another file"):
        check_draft_files(config)
    shared = SharedDraftData(config, ToyVocab())
    shared.save()
    assert path.read_bytes() == content


def test_files_that_can_be_replaced(tmp_path: Path, saved: Path) -> None:
    vocab = ToyVocab()
    (tmp_path / "empty").touch()
    for name in ("new", "empty"):
        config = SpeculationConfig(lookup_dynamic=str(tmp_path / name), pool_file=str(tmp_path / f"{name}-pool"))
        check_draft_files(config, vocab)
        SharedDraftData(config, vocab).save()
        check_draft_files(config, vocab)
    check_draft_files(SpeculationConfig(lookup_dynamic=str(saved)))
    for path, error in (
        (saved, "for a model with another vocabulary"),
        (tmp_path, "no regular file"),
        (Path("/dev/null"), "no regular file"),
        (tmp_path / "no" / "file", "no such folder"),
    ):
        with pytest.raises(ModelError, match=error):
            check_draft_files(SpeculationConfig(lookup_dynamic=str(path)), vocab)
