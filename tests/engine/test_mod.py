"""`ngram-mod` against a reference made of a dict of indices and a list."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checksummed import DamagedFile
from engine.speculate import ngram_mod
from engine.speculate.ngram_mod import MAX_LOOP_TOKENS, NgramModProposer, NgramPool, scope_of
from tests.sizes import sized

KEY = bytes(range(32))
OTHER_KEY = bytes(32)


@cache
def index_of(scope: int, ngram: tuple[int, ...], entries: int) -> int:
    """Returns the index of an n-gram's entry, as the pool's docstring defines it."""
    size = len(ngram)
    total = sum(token * 6364136223846793005 ** (size - 1 - at) for at, token in enumerate(ngram))
    bits = int(total) % 2**64 ^ scope
    bits = (bits ^ bits // 2**30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits // 2**27) * 0x94D049BB133111EB % 2**64
    return (bits ^ bits // 2**31) % entries


class NaivePool:
    """A dict that holds the last scope, n-gram and token at each index."""

    def __init__(self, n: int, entries: int) -> None:
        self.n, self.entries = n, entries
        self.held: dict[int, tuple[int, tuple[int, ...], int]] = {}

    def put(self, scope: int, ngram: tuple[int, ...], token: int) -> None:
        self.held[index_of(scope, ngram, self.entries)] = (scope, ngram, token)

    def get(self, scope: int, ngram: tuple[int, ...]) -> int | None:
        found = self.held.get(index_of(scope, ngram, self.entries))
        return found[2] if found is not None and found[:2] == (scope, ngram) else None


class NaiveModProposer:
    """A reference proposer whose history is a list."""

    def __init__(self, pool: NaivePool, scope: int, n_min: int, n_max: int) -> None:
        self.pool, self.scope, self.n_min, self.n_max = pool, scope, n_min, n_max
        self.history: list[int] = []

    def observe(self, emitted: list[int]) -> None:
        for token in emitted:
            if len(self.history) >= self.pool.n:
                self.pool.put(self.scope, tuple(self.history[-self.pool.n :]), token)
            self.history.append(token)

    def propose(self, limit: int) -> list[int]:
        n, tokens = self.pool.n, list(self.history)
        while len(tokens) - len(self.history) < self.n_max and len(tokens) >= n:
            token = self.pool.get(self.scope, tuple(tokens[-n:]))
            if token is None:
                break
            tokens.append(token)
        drafted = tokens[len(self.history) :]
        return drafted[:limit] if len(drafted) >= self.n_min else []


SLOTS = 4
STEPS = 40
NAMES = ["observe", "observe", "observe", "propose", "propose", "propose", "truncate", "shift"]


@settings(max_examples=sized(150, 2000), deadline=None)
@given(
    st.binary(min_size=10 * STEPS, max_size=10 * STEPS),
    st.integers(1, 4),
    st.sampled_from([8, 64, 2**14]),
    st.integers(0, 6),
    st.integers(1, 8),
    st.binary(min_size=2 * SLOTS, max_size=2 * SLOTS * (MAX_LOOP_TOKENS + 20)),
)
def test_equals_the_naive_reference(
    script: bytes, n: int, entries: int, n_min: int, n_max: int, prompts: bytes
) -> None:
    """Runs 12,000 operations, ten bytes each, of four slots in two scopes; all drafts are compared after each
    operation."""
    pool, plain = NgramPool(n, entries), NaivePool(n, entries)
    scopes = [scope_of("one"), scope_of("two")]
    slots = [NgramModProposer(pool, scopes[at % 2], n_min, n_max) for at in range(SLOTS)]
    naive = [NaiveModProposer(plain, scopes[at % 2], n_min, n_max) for at in range(SLOTS)]
    for at, (slot, other) in enumerate(zip(slots, naive, strict=True)):
        prompt = [byte % 4 for byte in prompts[at :: 2 * SLOTS]]
        slot.begin(prompt)
        other.observe(prompt)
    for step in range(STEPS):
        kind, at, limit, first, second, *tokens = script[10 * step : 10 * step + 10]
        slot, other = slots[at % SLOTS], naive[at % SLOTS]
        size = len(other.history)
        keep = first * size // 255
        match NAMES[kind % len(NAMES)]:
            case "observe":
                emitted = [token % 4 for token in tokens[: 1 + limit % 5]]
                slot.observe(emitted)
                other.observe(emitted)
            case "propose":
                assert slot.propose(1 + limit % 10).tokens == (other.propose(1 + limit % 10) or ())
            case "truncate":
                slot.truncate(keep)
                del other.history[keep:]
            case "shift":
                discard = second * (size - keep) // 255
                slot.shift(keep, discard)
                del other.history[keep : keep + discard]
        assert len(pool) == len(plain.held)
        for each, reference in zip(slots, naive, strict=True):
            assert each.propose(n_max).tokens == (reference.propose(n_max) or ())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 6), st.integers(0, 300))
def test_one_by_one_or_all_at_once_gives_the_same_table(drawn: bytes, n: int, cut: int) -> None:
    tokens = [byte % 5 for byte in drawn]
    whole, parts = NgramPool(n, 1024), NgramPool(n, 1024)
    one, other = NgramModProposer(whole, 7), NgramModProposer(parts, 7)
    one.begin(tokens)
    other.begin(tokens[:cut])
    for token in tokens[cut:]:
        other.observe([token])
    assert whole._table.tobytes() == parts._table.tobytes()


# ── differences from llama-server ──


def test_a_token_is_known_at_once_and_not_32_tokens_later() -> None:
    slot = NgramModProposer(NgramPool(2), 1, n_min=1)
    slot.begin([1, 2])
    slot.observe([3])
    slot.observe([1])
    slot.observe([2])
    assert slot.propose(1).tokens == [3]


def test_a_slot_with_bad_drafts_wipes_nothing() -> None:
    pool = NgramPool(2)
    good, bad = NgramModProposer(pool, 1, n_min=1), NgramModProposer(pool, 1, n_min=1)
    good.begin([1, 2, 3, 4, 1, 2])
    bad.begin([7, 8, 9, 7, 8])
    for token in range(10, 60):
        bad.propose(4)
        bad.observe([token, 7, 8], drafted=1, accepted=0)
    assert good.propose(2).tokens == [3, 4]
    assert bad.propose(1).tokens == [59], "the emitted token replaced the wrong entry"


def test_no_occupancy_wipes_the_pool() -> None:
    pool = NgramPool(2, 1024)
    tokens = random.Random(1).choices(range(1000), k=40_000)
    slot = NgramModProposer(pool, 1, n_min=1)
    slot.begin(tokens)
    assert len(pool) == 1024
    other = NgramModProposer(pool, 1, n_min=1)
    other.begin(tokens[-3:-1])
    assert other.propose(1).tokens == tokens[-1:]


def test_an_entry_of_another_ngram_is_not_used() -> None:
    pool = NgramPool(2, 8)
    NgramModProposer(pool, 1, n_min=1).begin(random.Random(2).choices(range(50), k=2000))
    strangers = NgramModProposer(pool, 1, n_min=1)
    strangers.begin([100])
    for token in range(101, 200):
        strangers.observe([token])
        assert strangers.propose(1).tokens == ()


def test_scopes_do_not_share_entries() -> None:
    pool = NgramPool(2)
    NgramModProposer(pool, scope_of("alice"), n_min=1).begin([1, 2, 3])
    for name, found in (("alice", [3]), ("bob", ())):
        slot = NgramModProposer(pool, scope_of(name), n_min=1)
        slot.begin([1, 2])
        assert slot.propose(1).tokens == found


def test_the_limit_does_not_affect_the_minimum_length() -> None:
    slot = NgramModProposer(NgramPool(1), 1, n_min=5, n_max=8)
    slot.begin([1, 2, 3, 4, 5, 1])
    assert slot.propose(2).tokens == [2, 3]
    assert slot.propose(100).tokens == [2, 3, 4, 5, 1, 2, 3, 4]
    slot.observe([9])
    assert slot.propose(2).tokens == ()


def test_a_shift_adds_no_entries_and_later_tokens_are_learnt_at_once() -> None:
    pool = NgramPool(2)
    slot = NgramModProposer(pool, 1, n_min=1)
    slot.begin([1, 2, 3, 4, 5])
    before = len(pool)
    slot.shift(2, 2)  # 1 2 | 5
    assert len(pool) == before
    slot.observe([6])
    other = NgramModProposer(pool, 1, n_min=1)
    other.begin([1, 2])
    assert other.propose(1).tokens == [3], "5 never followed 1 2"
    other.observe([5])
    assert other.propose(1).tokens == [6]


def test_truncating_a_history_keeps_the_entries() -> None:
    slot = NgramModProposer(NgramPool(2), 1, n_min=1)
    slot.begin([1, 2, 3, 4])
    slot.truncate(2)
    assert slot.propose(2).tokens == [3, 4]
    slot.truncate(1)
    assert slot.propose(2).tokens == ()


# ── files ──


def pool_of(tokens: list[int], n: int = 3) -> NgramPool:
    pool = NgramPool(n, 64)
    NgramModProposer(pool, 5).begin(tokens)
    return pool


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "pool"
    pool_of(random.Random(3).choices(range(90), k=40)).save(path, KEY)
    return path


def refused(path: Path, n: int = 3, key: bytes = KEY, n_vocab: int = 90, entries: int = 64) -> str:
    """Returns the error message; the pool is unchanged."""
    pool = NgramPool(n, entries)
    NgramModProposer(pool, 1).begin([1, 2, 3, 4, 5, 6])
    before = pool._table.tobytes()
    with pytest.raises(DamagedFile) as caught:
        pool.load(path, key, n_vocab)
    assert pool._table.tobytes() == before
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("length", [0, 3, 4, 40, 400])
def test_a_saved_pool_comes_back(tmp_path: Path, length: int) -> None:
    pool = pool_of(random.Random(4).choices(range(90), k=length))
    pool.save(tmp_path / "pool", KEY)
    loaded = pool_of([9] * 50)
    loaded.load(tmp_path / "pool", KEY, 90)
    assert loaded._table.tobytes() == pool._table.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]


def test_a_full_size_pool_is_saved_small(tmp_path: Path) -> None:
    pool = NgramPool(2)
    NgramModProposer(pool, 1, n_min=1).begin([1, 2, 3])
    pool.save(tmp_path / "pool", KEY)
    assert (tmp_path / "pool").stat().st_size < 300_000
    loaded = NgramPool(2)
    loaded.load(tmp_path / "pool", KEY, 4)
    assert len(loaded) == 1


def test_a_torn_file_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        assert "torn" in refused(saved)
    saved.write_bytes(content + b"\0")
    assert "damaged" in refused(saved)


def test_a_flipped_byte_is_refused(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    for at in range(len(content)):
        content[at] ^= 0x10
        saved.write_bytes(content)
        refused(saved)
        content[at] ^= 0x10


def test_files_that_belong_elsewhere_are_refused(saved: Path) -> None:
    assert "another vocabulary" in refused(saved, key=OTHER_KEY)
    assert "of 3 tokens, not 4" in refused(saved, n=4)
    assert "64 entries, not 128" in refused(saved, entries=128)
    assert "vocabulary of 50 tokens" in refused(saved, n_vocab=50)
    saved.write_bytes(ngram_mod.POOL_FORMAT._replace(magic=b"OTHERONE").seal(KEY, b"payload"))
    assert "another kind" in refused(saved)


def test_a_file_of_another_version_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_mod, "POOL_FORMAT", ngram_mod.POOL_FORMAT._replace(version=2))
    assert "version 1 of its format, not 2" in refused(saved)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no msgpack",
        msgspec.msgpack.encode({"n_match": 3, "used": b""}),
        msgspec.msgpack.encode(ngram_mod._Saved(3, bytes(7) + b"\1", b"")),
        msgspec.msgpack.encode(ngram_mod._Saved(3, bytes(8), bytes(8))),
        msgspec.msgpack.encode(ngram_mod._Saved(3, bytes(7) + b"\1", np.array([7], "<u8").tobytes())),
    ],
    ids=["empty", "noise", "fields", "fewer", "more", "untagged"],
)
def test_a_sound_file_with_nonsense_in_it_is_refused(saved: Path, body: bytes) -> None:
    ngram_mod.POOL_FORMAT.write(saved, KEY, body)
    refused(saved)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        NgramPool(3, 64).load(tmp_path / "none", KEY, 90)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_keeps_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = saved.read_bytes()
    monkeypatch.setattr(f"os.{step}", failing)
    with pytest.raises(OSError, match="disk full"):
        pool_of([1] * 9).save(saved, KEY)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["pool"]


def failing(*_: object) -> None:
    raise OSError("disk full")


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pool_of([]).save(tmp_path / "none" / "pool", KEY)


@pytest.mark.parametrize("make", [list, tuple, lambda tokens: array("i", tokens)], ids=["list", "tuple", "array"])
def test_any_sequence_type_is_accepted(make: Callable[[list[int]], list[int]]) -> None:
    slot = NgramModProposer(NgramPool(2), 1, n_min=1)
    slot.begin(make([1, 2, 3]))
    slot.observe(make([1, 2]))
    assert slot.propose(1).tokens == [3]
