"""One request's proposers: what they are shown, whose draft is taken, and what is counted."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, cast

import pytest

from engine.config import DraftConfig, SpeculationConfig
from engine.contract import PROPOSER_TYPES, Drafts, ProposerType, Request, Speculation
from engine.pace import Acceptance, Verified
from engine.speculate import Bounds, Draft, Drafter, Drafting, Proposer, Shared
from engine.speculate.guesser import Book
from engine.speculate.tally import Tally
from tests.toy import ToyVocab

SMALL = SpeculationConfig(types=("auto",), size_n=2, size_m=5, mod_match=2, mod_min=1, pool_scope="slot")


class Guess:
    """Always drafts the same."""

    def __init__(self, tokens: Sequence[int], chances: Sequence[float] = ()) -> None:
        self.draft = Draft(tokens, chances)
        self.heard: list[tuple[object, ...]] = []

    def begin(self, tokens: Sequence[int]) -> None:
        self.heard.append(("begin", *tokens))

    def propose(self, limit: int) -> Draft:
        return Draft(self.draft.tokens[:limit], self.draft.chances[:limit])

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        self.heard.append(("observe", *emitted, drafted, accepted))

    def truncate(self, length: int) -> None:
        self.heard.append(("truncate", length))

    def shift(self, keep: int, discard: int) -> None:
        self.heard.append(("shift", keep, discard))

    def end(self) -> None:
        self.heard.append(("end",))


def step(drafter: Drafter, tokens: array[int], emitted: Sequence[int], limit: int = 8) -> Draft:
    """One step: a proposal, and what came of it."""
    drafter.propose(limit)
    draft = drafter.choose()
    right = next((i for i, pair in enumerate(zip(draft.tokens, emitted, strict=False)) if pair[0] != pair[1]), None)
    accepted = min(len(draft.tokens), len(emitted)) if right is None else right
    tokens.extend(emitted)
    drafter.observe(tokens, emitted, Verified(len(draft.tokens), accepted))
    return draft


def test_a_long_history_is_fed_in_batches() -> None:
    guess = Guess([1])
    drafter = Drafter({"guess": guess})
    tokens = array("i", [1, 2, 3, 4, 5])
    assert drafter.learn(tokens, 2) == 2
    assert not drafter.knows(tokens)
    tokens.append(6)
    drafter.observe(tokens, [6], Verified(0, 0))  # a token came meanwhile: it is shown in its turn
    assert drafter.learn(tokens, 3) == 3
    assert drafter.learn(tokens, 0) == 0
    assert drafter.learn(tokens, 9) == 1
    assert drafter.knows(tokens)
    assert guess.heard == [("begin", 1, 2), ("observe", 3, 4, 5, 0, 0), ("observe", 6, 0, 0)]


def test_the_draft_that_promises_most_is_taken_by_what_became_of_all() -> None:
    good, bad = Guess([1, 2]), Guess([9, 9, 9, 9])
    drafter = Drafter({"bad": bad, "good": good})
    tokens = array("i", [0])
    drafter.learn(tokens, 9)
    assert step(drafter, tokens, [1]).tokens == [9, 9, 9, 9], "longer, and nothing is known yet"
    for _ in range(4):
        drafted = step(drafter, tokens, [1, 2, 3])
    assert drafted.tokens == [1, 2]
    assert {drafts.type: drafts.drafted for drafts in drafter.drafts}["bad"] < 4 * 4


def test_a_fixed_order_takes_the_first_that_answers() -> None:
    silent, first, second = Guess([]), Guess([9]), Guess([1, 2, 3])
    drafter = Drafter({"silent": silent, "first": first, "second": second}, fixed=True)
    tokens = array("i", [0])
    drafter.learn(tokens, 9)
    for _ in range(3):
        assert step(drafter, tokens, [1, 2, 3, 4]).tokens == [9]


def test_the_next_request_knows_what_was_wrong_in_the_last() -> None:
    books = {name: Book.new(name) for name in ("bad", "good")}
    tokens = array("i", [0])
    first = Drafter({"bad": Guess([9, 9, 9, 9]), "good": Guess([1, 2])}, books=books)
    first.learn(tokens, 9)
    for _ in range(10):
        step(first, tokens, [1, 2, 3])
    second = Drafter({"bad": Guess([9, 9, 9, 9]), "good": Guess([1, 2])}, books=books)
    second.learn(tokens, 99)
    assert step(second, tokens, [1, 2, 3]).tokens == [1, 2]


@pytest.mark.parametrize(
    ("bounds", "tokens"),
    [
        (Bounds(), [1, 2, 3]),
        (Bounds(n_max=2), [1, 2]),
        (Bounds(n_min=4), []),
        (Bounds(n_min=3), [1, 2, 3]),
        (Bounds(p_min=0.5), [1]),
        (Bounds(p_min=0.5, n_min=2), []),
        (Bounds(p_min=0.95), []),
    ],
)
def test_bounds(bounds: Bounds, tokens: list[int]) -> None:
    assert [*bounds.trim(Draft([1, 2, 3], [0.9, 0.4, 0.8])).tokens] == tokens


def test_counts_and_the_line_in_the_log() -> None:
    total = Tally("ngram-mod")
    tally = Tally("ngram-mod", total)
    tally.learnt(0.002, first=True)
    tally.learnt(0.001, first=False)
    for _ in range(3):
        tally.proposed(0.0005)
    tally.verified(Verified(4, 4, 0.4, 0.1), 3.5, 0.00001)
    tally.verified(Verified(3, 0, 0.0, 0.1), 0.5, 0.00001)
    assert tally.drafts == Drafts("ngram-mod", 7, (1, 0, 0, 0, 1), 4.0, 0.4, 0.2 + 3 * 0.0005)
    assert (
        str(tally)
        == str(total)
        == (
            "statistics ngram_mod: #calls(b,g,a) = 1 3 2, #gen drafts = 2, #acc drafts = 1, #gen tokens = 7, "
            "#acc tokens = 4, dur(b,g,a) = 3.000, 1.500, 0.020 ms"
        )
    )


def alone(kind: ProposerType, prompt: Sequence[int]) -> Proposer:
    request = Request(
        prompt=tuple(prompt), prediction=(1, 2, 3, 1, 2, 2), salt="x", speculation=Speculation(type=(kind,))
    )
    return Drafting(Shared(SMALL, ToyVocab()), SMALL, DraftConfig()).proposers(request)[kind]


@pytest.mark.parametrize("kind", [kind for kind in PROPOSER_TYPES if kind not in ("draft", "grammar")])
@pytest.mark.parametrize("seed", range(20))
def test_a_shift_before_all_was_shown(kind: ProposerType, seed: int) -> None:
    """What is shown after it follows what is left, as if the rest had never been in the history."""
    random = Random(seed)
    prompt = [random.randint(1, 3) for _ in range(20)]
    shown, keep = random.randint(1, 20), random.randint(0, 15)
    discard = random.randint(1, 20 - keep)
    edited = alone(kind, prompt)
    edited.begin(prompt[:shown])
    edited.shift(keep, discard)
    edited.observe(
        prompt[max(shown, keep + discard) :] if shown >= keep else prompt[shown:keep] + prompt[keep + discard :]
    )
    left = prompt[:keep] + prompt[keep + discard :]
    fresh = alone(kind, left)
    fresh.begin(left)
    for output in (1, 2, 3):
        if kind != "ngram-mod":  # its pool remembers what was truly said before
            assert [*edited.propose(8).tokens] == [*fresh.propose(8).tokens]
        edited.observe([output])
        fresh.observe([output])


# ── who is asked ──


def test_those_with_nothing_to_say_are_asked_in_turns_where_asking_all_takes_too_long() -> None:
    useful, mute, wrong = Guess([1, 1, 1]), Guess([]), Guess([9])
    drafter = Drafter({"useful": useful, "mute": mute, "wrong": wrong})
    tokens = array("i", [1])
    drafter.learn(tokens, 9)
    asked = {"mute": 0, "wrong": 0, "useful": 0}
    for name, guess in (("mute", mute), ("wrong", wrong), ("useful", useful)):
        inner = guess.propose

        def propose(limit: int, name: str = name, inner: Callable[[int], Draft] = inner) -> Draft:
            asked[name] += 1
            return inner(limit)

        cast("Any", guess).propose = propose
    for _ in range(20):
        drafter.propose(8)
        tokens.append(1)
        drafter.observe(tokens, [1], Verified(0, 0))
    assert asked == {"mute": 20, "wrong": 20, "useful": 20}, "nobody counts the time"
    for _ in range(160):
        drafter.propose(8, budget=1e-9)
        tokens.append(1)
        drafter.observe(tokens, [1], Verified(0, 0))
    assert asked == {"mute": 30, "wrong": 30, "useful": 180}


def test_tokens_emitted_between_two_drafts_are_fed_in_one_batch() -> None:
    guess = Guess([])
    drafter = Drafter({"guess": guess})
    tokens = array("i", [1])
    drafter.learn(tokens, 9)
    for token in (2, 3):
        tokens.append(token)
        drafter.observe(tokens, [token], Verified(0, 0))
    drafter.propose(8)
    tokens.append(4)
    drafter.observe(tokens, [4], Verified(0, 0))
    drafter.shift(0, 1)
    drafter.end()
    heard = [("begin", 1), ("observe", 2, 3, 0, 0), ("observe", 4, 0, 0), ("shift", 0, 1), ("end",)]
    assert guess.heard == heard


def test_a_draft_that_is_not_verified_is_compared_until_it_fails() -> None:
    guess = Guess([1, 2, 3, 9])
    drafter = Drafter({"guess": guess})
    tokens = array("i", [0])
    drafter.learn(tokens, 9)
    for token in (1, 2, 3, 4):
        drafter.propose(8)
        tokens.append(token)
        drafter.observe(tokens, [token], Verified(0, 0))
    (offer,) = drafter._guessers.values()
    chances = [offer.book.acceptance.chance(place) for place in range(4)]
    assert chances[0] > Acceptance().chance(0)
    assert chances[2] > chances[3]
