"""Nothing that a request of one salt left, or is doing, shows in the time or the tokens of a request of another."""

from __future__ import annotations

from array import array
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine.config import DraftConfig, SpeculationConfig
from engine.contract import Finished, Request, Speculation
from engine.memory import Store
from engine.memory.disk import Disk
from engine.speculate import Drafting, Shared
from tests.engine.test_same_as_alone import Bench
from tests.toy import VOCABULARY, ToyContext, ToyVocab

PROMPT = tuple(Random(0).randrange(1, VOCABULARY) for _ in range(200))


def request(salt: str, tokens: int = 1) -> Request:
    return Request(prompt=PROMPT, max_tokens=tokens, ignore_eos=True, salt=salt)


def cost(bench: Bench, key: int, salt: str) -> tuple[int, int]:
    """How many rows a request computes, and how many tokens it says it found."""
    before = bench.backend.context.computed
    bench.submit(key, request(salt))
    bench.run()
    end = bench.ends[key]
    assert isinstance(end, Finished)
    return bench.backend.context.computed - before, end.usage.cached


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("where", ["cells", "RAM", "disk"])
def test_anothers_text_saves_nothing(tmp_path: Path, where: str, partial: bool) -> None:
    def bench() -> Bench:
        disk = Disk(tmp_path, "toy") if where == "disk" else None
        kept = Store(10**6, whole=not partial, disk=disk, disk_most=10**6)
        return Bench(ToyContext(cells=2000, rows=512, partial=partial), kept=kept, prompt_rows=50)

    first = second = bench()
    assert cost(first, 0, "private") == (200, 0)
    if where != "cells":
        first.runner.cells.reclaim(2000)
        assert first.backend.context.used() == 0
    if where == "disk":
        first.runner.close()
        second = bench()
    for key, salt in enumerate(["", "privat", "private ", "Private"], 1):
        assert cost(second, key, salt) == (200, 0)
    found = 199 if partial else 196
    assert cost(second, 9, "private") == (200 - found, found), "its own is found"
    second.runner.close()


@pytest.mark.parametrize("partial", [True, False])
def test_nobody_waits_for_anothers_rows(partial: bool) -> None:
    bench = Bench(ToyContext(cells=2000, partial=partial), store=10**6, prompt_rows=20)
    bench.submit(0, request("private"))
    bench.runner.step()
    for key, salt in enumerate(["private", "", "public"], 1):
        bench.submit(key, request(salt))
    bench.runner.step()
    assert sorted(bench.runner.running) == [0, 2, 3], "only the one of its own salt waits for its rows"
    bench.run()
    assert bench.backend.context.computed == 3 * 200 + 1


def test_nobody_sees_in_slots_what_was_said() -> None:
    bench = Bench(ToyContext(cells=2000), store=10**6)
    cost(bench, 0, "private")
    shown = repr(bench.runner.slots.states())
    assert "private" not in shown
    assert str(PROMPT[0]) + ", " + str(PROMPT[1]) not in shown


# ── guessing ──


CONFIG = SpeculationConfig(types=("auto",), size_n=2, size_m=5, mod_match=2, mod_min=1)
SAID = PROMPT[:120]


def drafting() -> Drafting:
    return Drafting(Shared(CONFIG, ToyVocab()), CONFIG, DraftConfig())


def guesses(drafting: Drafting, kind: Any, salt: str, told: int) -> tuple[int, ...]:
    """What is guessed for a request that has `told` tokens of SAID; it then says the others."""
    asked = Request(prompt=SAID[:20], salt=salt, speculation=Speculation(type=(kind,), n_min=0))
    speculator = drafting.speculators(asked)[kind]
    speculator.begin(SAID[:20])
    for token in SAID[20:told]:
        speculator.observe([token])
    draft = tuple(speculator.propose(4).tokens)
    for token in SAID[told:]:
        speculator.observe([token])
    speculator.end()
    return draft


@pytest.mark.parametrize("kind", ["ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache", "suffix"])
def test_nobody_guesses_by_what_another_said(kind: Any) -> None:
    shared = drafting()
    fresh = guesses(drafting(), kind, "public", 60)
    guesses(shared, kind, "private", 60)
    for salt in ("public", "", "privat"):
        assert guesses(shared, kind, salt, 60) == fresh
    learnt = guesses(shared, kind, "private", 60)
    if kind in ("ngram-mod", "suffix"):
        assert learnt == SAID[60:64], "requests of its own salt do"
    if kind == "ngram-cache":
        assert guesses(shared, kind, "", 60) == SAID[60:64], "those without a salt learn from each other"


def test_the_draft_models_cells_are_apart_too() -> None:
    bench = Bench(
        ToyContext(cells=2000, rows=512),
        speculation=SpeculationConfig(types=("draft",)),
        draft=ToyContext(cells=2000, rows=512),
    )
    bench.submit(0, request("private", tokens=60))
    bench.run()
    model = bench.drafting.model
    assert model is not None
    assert model.cells.find(array("i", PROMPT), "private").reach == 199
    assert model.cells.find(array("i", PROMPT), "public").reach == 0
