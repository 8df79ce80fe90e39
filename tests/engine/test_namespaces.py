"""No request changes the computed rows or the tokens of a request with another salt."""

from __future__ import annotations

from array import array
from pathlib import Path
from random import Random
from typing import Any

import pytest
from msgspec import structs

from engine.config import DraftConfig, SpeculationConfig
from engine.contract import Finished, Request, Speculation
from engine.kv import Offload
from engine.kv.disk import Disk
from engine.speculate import SharedDraftData, SpeculativeDecoding
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, context_of
from tests.toy import VOCABULARY, ToyContext, ToyVocab

PROMPT = tuple(Random(0).randrange(1, VOCABULARY) for _ in range(200))


def request(salt: str, tokens: int = 1) -> Request:
    return Request(prompt=PROMPT, max_tokens=tokens, ignore_eos=True, salt=salt)


def cost(bench: CoreBench, key: int, salt: str) -> tuple[int, int]:
    """Returns the number of rows that a request computes, and its count of cached tokens."""
    before = bench.backend.context.computed
    bench.submit(key, request(salt))
    bench.run()
    end = bench.ends[key]
    assert isinstance(end, Finished)
    return bench.backend.context.computed - before, end.usage.cached


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("where", ["cells", "RAM", "disk"])
def test_a_prefix_of_another_salt_saves_nothing(tmp_path: Path, where: str, partial: bool, unified: bool) -> None:
    def bench() -> CoreBench:
        disk = Disk(tmp_path, "toy") if where == "disk" else None
        offload = Offload(10**6, whole=not partial, disk=disk, disk_bytes=10**6)
        context = context_of(unified, 2000, rows=512, partial=partial)
        return CoreBench(context, offload=offload, prompt_rows=50)

    first = second = bench()
    assert cost(first, 0, "private") == (200, 0)
    if where != "cells":
        first.core.kv.drop_idle()
        assert first.backend.context.used() == 0
    if where == "disk":
        first.core.close()
        second = bench()
    for key, salt in enumerate(["", "privat", "private ", "Private"], 1):
        assert cost(second, key, salt) == (200, 0)
    found = 199 if partial else 196
    assert cost(second, 9, "private") == (200 - found, found), "the same salt finds the prefix"
    second.core.close()


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("partial", [True, False])
def test_no_request_is_held_for_rows_of_another_salt(partial: bool, unified: bool) -> None:
    bench = CoreBench(context_of(unified, 2000, partial=partial), ram=10**6, prompt_rows=20)
    bench.submit(0, request("private"))
    bench.core.step()
    for key, salt in enumerate(["private", "", "public"], 1):
        bench.submit(key, request(salt))
    bench.core.step()
    assert sorted(bench.core.running) == [0, 2, 3], "only the request of the same salt is held"
    bench.run()
    assert bench.backend.context.computed == 3 * 200 + 1


def test_slot_states_show_neither_tokens_nor_salts() -> None:
    bench = CoreBench(ToyContext(cells=2000), ram=10**6)
    cost(bench, 0, "private")
    shown = repr(bench.core.slots.states())
    assert "private" not in shown
    assert str(PROMPT[0]) + ", " + str(PROMPT[1]) not in shown


# ── speculation ──


CONFIG = SpeculationConfig(types=("auto",), size_n=2, size_m=5, mod_match=2, mod_min=1)
EMITTED = PROMPT[:120]


def speculative_decoding() -> SpeculativeDecoding:
    return SpeculativeDecoding(SharedDraftData(CONFIG, ToyVocab()), CONFIG, DraftConfig())


def draft_of(speculative_decoding: SpeculativeDecoding, kind: Any, salt: str, known: int) -> tuple[int, ...]:
    """Returns the draft of a request whose history is the first `known` tokens of EMITTED; the request then emits the
    rest."""
    request_of_type = Request(prompt=EMITTED[:20], salt=salt, speculation=Speculation(type=(kind,), n_min=0))
    proposer = speculative_decoding.proposers(request_of_type)[kind]
    proposer.begin(EMITTED[:20])
    for token in EMITTED[20:known]:
        proposer.observe([token])
    draft = tuple(proposer.propose(4).tokens)
    for token in EMITTED[known:]:
        proposer.observe([token])
    proposer.end()
    return draft


@pytest.mark.parametrize("kind", ["ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache", "suffix"])
def test_no_draft_comes_from_outputs_of_another_salt(kind: Any) -> None:
    shared = speculative_decoding()
    fresh = draft_of(speculative_decoding(), kind, "public", 60)
    draft_of(shared, kind, "private", 60)
    for salt in ("public", "", "privat"):
        assert draft_of(shared, kind, salt, 60) == fresh
    learnt = draft_of(shared, kind, "private", 60)
    if kind in ("ngram-mod", "suffix"):
        assert learnt == EMITTED[60:64], "outputs of the same salt are drafted"
    if kind == "ngram-cache":
        assert draft_of(shared, kind, "", 60) == EMITTED[60:64], "requests without a salt share their outputs"


def test_the_draft_model_shares_nothing_across_salts() -> None:
    bench = CoreBench(
        ToyContext(cells=2000, rows=512),
        speculation=SpeculationConfig(types=("draft",)),
        draft=ToyContext(cells=2000, rows=512),
    )
    bench.submit(0, request("private", tokens=60))
    bench.run()
    model = bench.speculative_decoding.draft_model
    assert model is not None
    assert model.kv.match(array("i", PROMPT), "private").known_length == 199
    assert model.kv.match(array("i", PROMPT), "public").known_length == 0


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize(("partial", "window"), [(True, 0), (True, 150), (False, 0)])
def test_a_request_that_is_not_cached_keeps_nothing(partial: bool, window: int, unified: bool) -> None:
    context = context_of(unified, 2000, rows=512, partial=partial)
    context.window, context.shifts = window, context.divisible and not window
    bench = CoreBench(context, offload=Offload(10**6, whole=not partial), prompt_rows=50)
    uncached = structs.replace(request("", 40), cache=False)
    bench.submit(0, uncached)
    bench.core.step()
    bench.core.lifecycle.preempt(bench.sequences[0])
    bench.submit(1, uncached)
    bench.run()
    assert bench.outputs[0] == bench.outputs[1]
    assert context.used() == 0
    assert bench.core.kv.stats().saved_tokens == 0
    assert [state.tokens for state in bench.core.slots.states()] == [0] * len(bench.core.slots)
    assert cost(bench, 2, "") == (200, 0), "the next request finds nothing"
    bench.submit(3, uncached)
    bench.run()
    end = bench.ends[3]
    assert isinstance(end, Finished)
    assert end.usage.cached == 0, "the request itself uses no cached prefix"


def test_the_draft_model_keeps_nothing_of_a_request_that_is_not_cached() -> None:
    draft = ToyContext(cells=2000, rows=512)
    speculation = SpeculationConfig(types=("draft",), order="fixed")
    bench = CoreBench(ToyContext(cells=2000, rows=512), draft=draft, speculation=speculation)
    bench.submit(0, structs.replace(request("", 20), cache=False))
    bench.run()
    assert draft.computed > 200, "the draft model computed the prompt"
    assert draft.used() == 0
