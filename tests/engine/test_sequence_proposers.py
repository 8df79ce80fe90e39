"""The proposers of one sequence: the tokens fed to them, the draft that is chosen, and their statistics."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, cast

import pytest

from engine.config import DraftConfig, SpeculationConfig
from engine.contract import PROPOSER_TYPES, DraftStats, ProposerType, Request, Speculation
from engine.pace import AcceptanceEstimate, VerifiedDraft
from engine.pace.acceptance import PRIOR_CHANCE
from engine.speculate import Draft, DraftBounds, Proposer, SequenceProposers, SharedDraftData, SpeculativeDecoding
from engine.speculate.planner import poll
from engine.speculate.proposer_stats import ProposerStats
from tests.toy import ToyVocab

SMALL = SpeculationConfig(types=("auto",), size_n=2, size_m=5, mod_match=2, mod_min=1, pool_scope="slot")


class FixedDraft:
    """A proposer that always makes the same draft."""

    def __init__(self, tokens: Sequence[int], chances: Sequence[float] = ()) -> None:
        self.draft = Draft(tokens, chances)
        self.calls: list[tuple[object, ...]] = []

    def begin(self, tokens: Sequence[int]) -> None:
        self.calls.append(("begin", *tokens))

    def propose(self, limit: int) -> Draft:
        return Draft(self.draft.tokens[:limit], self.draft.chances[:limit])

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        self.calls.append(("observe", *emitted, drafted, accepted))

    def truncate(self, length: int) -> None:
        self.calls.append(("truncate", length))

    def shift(self, keep: int, discard: int) -> None:
        self.calls.append(("shift", keep, discard))

    def end(self) -> None:
        self.calls.append(("end",))


def step(proposers: SequenceProposers, tokens: array[int], emitted: Sequence[int], limit: int = 8) -> Draft:
    """Runs one step and returns its draft."""
    poll(proposers, limit)
    draft = proposers.choose_longest()
    right = next((i for i, pair in enumerate(zip(draft.tokens, emitted, strict=False)) if pair[0] != pair[1]), None)
    accepted = min(len(draft.tokens), len(emitted)) if right is None else right
    tokens.extend(emitted)
    proposers.observe(tokens, emitted, VerifiedDraft(len(draft.tokens), accepted))
    return draft


def test_a_long_history_is_fed_in_batches() -> None:
    proposer = FixedDraft([1])
    proposers = SequenceProposers({"fixed": proposer})
    tokens = array("i", [1, 2, 3, 4, 5])
    assert proposers.feed(tokens, 2) == 2
    assert not proposers.can_draft(tokens)
    tokens.append(6)
    proposers.observe(tokens, [6], VerifiedDraft(0, 0))  # a token emitted before the feed is complete is fed in order
    assert proposers.feed(tokens, 3) == 3
    assert proposers.feed(tokens, 0) == 0
    assert proposers.feed(tokens, 9) == 1
    assert proposers.can_draft(tokens)
    assert proposer.calls == [("begin", 1, 2), ("observe", 3, 4, 5, 0, 0), ("observe", 6, 0, 0)]


def test_the_draft_with_most_expected_tokens_is_chosen() -> None:
    good, bad = FixedDraft([1, 2]), FixedDraft([9, 9, 9, 9])
    proposers = SequenceProposers({"bad": bad, "good": good})
    tokens = array("i", [0])
    proposers.feed(tokens, 9)
    assert step(proposers, tokens, [1]).tokens == [9, 9, 9, 9], "the longer draft, as nothing is observed yet"
    for _ in range(4):
        drafted = step(proposers, tokens, [1, 2, 3])
    assert drafted.tokens == [1, 2]
    assert {drafts.type: drafts.drafted for drafts in proposers.draft_stats}["bad"] < 4 * 4


def test_a_fixed_order_takes_the_first_draft() -> None:
    silent, first, second = FixedDraft([]), FixedDraft([9]), FixedDraft([1, 2, 3])
    proposers = SequenceProposers({"silent": silent, "first": first, "second": second}, fixed=True)
    tokens = array("i", [0])
    proposers.feed(tokens, 9)
    for _ in range(3):
        assert step(proposers, tokens, [1, 2, 3, 4]).tokens == [9]


def test_acceptance_of_one_request_is_the_prior_of_the_next() -> None:
    totals = {name: ProposerStats(name) for name in ("bad", "good")}
    tokens = array("i", [0])
    first = SequenceProposers({"bad": FixedDraft([9, 9, 9, 9]), "good": FixedDraft([1, 2])}, totals=totals)
    first.feed(tokens, 9)
    for _ in range(10):
        step(first, tokens, [1, 2, 3])
    second = SequenceProposers({"bad": FixedDraft([9, 9, 9, 9]), "good": FixedDraft([1, 2])}, totals=totals)
    second.feed(tokens, 99)
    assert step(second, tokens, [1, 2, 3]).tokens == [1, 2]


@pytest.mark.parametrize(
    ("bounds", "tokens"),
    [
        (DraftBounds(), [1, 2, 3]),
        (DraftBounds(n_max=2), [1, 2]),
        (DraftBounds(n_min=4), []),
        (DraftBounds(n_min=3), [1, 2, 3]),
        (DraftBounds(p_min=0.5), [1]),
        (DraftBounds(p_min=0.5, n_min=2), []),
        (DraftBounds(p_min=0.95), []),
    ],
)
def test_bounds(bounds: DraftBounds, tokens: list[int]) -> None:
    assert [*bounds.trim(Draft([1, 2, 3], [0.9, 0.4, 0.8])).tokens] == tokens


def test_counts_and_the_line_in_the_log() -> None:
    total = ProposerStats("ngram-mod")
    stats = ProposerStats("ngram-mod", total)
    stats.record_feed(0.002, first=True)
    stats.record_feed(0.001, first=False)
    for _ in range(3):
        stats.record_proposal(0.0005, 0.0)
    stats.record_verification(VerifiedDraft(4, 4, 0.4, 0.1), 3.5, 0.00001)
    stats.record_verification(VerifiedDraft(3, 0, 0.0, 0.1), 0.5, 0.00001)
    assert stats.draft_stats == DraftStats("ngram-mod", 7, (1, 0, 0, 0, 1), 4.0, 0.4, 0.2 + 3 * 0.0005, PRIOR_CHANCE)
    assert str(total) == (
        "statistics ngram_mod: #calls(b,g,a) = 1 3 2, #gen drafts = 2, #acc drafts = 1, #gen tokens = 7, "
        "#acc tokens = 4, dur(b,g,a) = 3.000, 1.500, 0.020 ms"
    )


def new_proposer(kind: ProposerType, prompt: Sequence[int]) -> Proposer:
    request = Request(
        prompt=tuple(prompt), prediction=(1, 2, 3, 1, 2, 2), salt="x", speculation=Speculation(type=(kind,))
    )
    return SpeculativeDecoding(SharedDraftData(SMALL, ToyVocab()), SMALL, DraftConfig()).proposers(request)[kind]


@pytest.mark.parametrize("kind", [kind for kind in PROPOSER_TYPES if kind not in ("draft", "draft-mtp", "grammar")])
@pytest.mark.parametrize("seed", range(20))
def test_a_shift_before_the_whole_history_was_fed(kind: ProposerType, seed: int) -> None:
    """Tokens fed after the shift follow the remaining history, as if the discarded tokens had never been in the
    history."""
    random = Random(seed)
    prompt = [random.randint(1, 3) for _ in range(20)]
    fed, keep = random.randint(1, 20), random.randint(0, 15)
    discard = random.randint(1, 20 - keep)
    edited = new_proposer(kind, prompt)
    edited.begin(prompt[:fed])
    edited.shift(keep, discard)
    edited.observe(prompt[max(fed, keep + discard) :] if fed >= keep else prompt[fed:keep] + prompt[keep + discard :])
    left = prompt[:keep] + prompt[keep + discard :]
    fresh = new_proposer(kind, left)
    fresh.begin(left)
    for output in (1, 2, 3):
        if kind != "ngram-mod":  # the pool keeps tokens that were emitted earlier
            assert [*edited.propose(8).tokens] == [*fresh.propose(8).tokens]
        edited.observe([output])
        fresh.observe([output])


# ── polls ──


def test_proposers_without_useful_drafts_take_turns_if_polling_all_takes_too_long() -> None:
    useful, mute, wrong = FixedDraft([1, 1, 1]), FixedDraft([]), FixedDraft([9])
    proposers = SequenceProposers({"useful": useful, "mute": mute, "wrong": wrong})
    tokens = array("i", [1])
    proposers.feed(tokens, 9)
    polls = {"mute": 0, "wrong": 0, "useful": 0}
    for name, proposer in (("mute", mute), ("wrong", wrong), ("useful", useful)):
        inner = proposer.propose

        def propose(limit: int, name: str = name, inner: Callable[[int], Draft] = inner) -> Draft:
            polls[name] += 1
            return inner(limit)

        cast("Any", proposer).propose = propose
    for _ in range(20):
        poll(proposers, 8)
        tokens.append(1)
        proposers.observe(tokens, [1], VerifiedDraft(0, 0))
    assert polls == {"mute": 20, "wrong": 20, "useful": 20}, "without a budget"
    for _ in range(160):
        poll(proposers, 8, 1e-9)
        tokens.append(1)
        proposers.observe(tokens, [1], VerifiedDraft(0, 0))
    assert polls == {"mute": 30, "wrong": 30, "useful": 180}


def test_tokens_emitted_between_two_drafts_are_fed_in_one_batch() -> None:
    proposer = FixedDraft([])
    proposers = SequenceProposers({"fixed": proposer})
    tokens = array("i", [1])
    proposers.feed(tokens, 9)
    for token in (2, 3):
        tokens.append(token)
        proposers.observe(tokens, [token], VerifiedDraft(0, 0))
    poll(proposers, 8)
    tokens.append(4)
    proposers.observe(tokens, [4], VerifiedDraft(0, 0))
    proposers.shift(0, 1)
    proposers.end()
    calls = [("begin", 1), ("observe", 2, 3, 0, 0), ("observe", 4, 0, 0), ("shift", 0, 1), ("end",)]
    assert proposer.calls == calls


def test_a_draft_that_is_not_verified_is_compared_until_it_fails() -> None:
    proposer = FixedDraft([1, 2, 3, 9])
    proposers = SequenceProposers({"fixed": proposer})
    tokens = array("i", [0])
    proposers.feed(tokens, 9)
    for token in (1, 2, 3, 4):
        poll(proposers, 8)
        tokens.append(token)
        proposers.observe(tokens, [token], VerifiedDraft(0, 0))
    (tracked,) = proposers.unbatched
    chances = [tracked.stats.acceptance.chance(position) for position in range(4)]
    assert chances[0] > AcceptanceEstimate().chance(0)
    assert chances[2] > chances[3]
