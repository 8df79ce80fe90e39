"""The model that computes nothing behaves as one: what it says depends on what a row can see, and on nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import SIM, Engine, EngineConfig, Finished, ModelError, Request, SamplingParams, Speculation
from engine.backend import NoFreeCells
from engine.contract import Tokens
from engine.pace import Measured
from engine.sim.context import COSTS, SimContext, cost_of, free
from engine.sim.speculator import SimSpeculator
from engine.sim.words import END, WORD, SimVocab

VOCAB = SimVocab()
GREEDY = SamplingParams(temperature=0.0)


def opened(cells: int = 1024) -> SimContext:
    """A context in which a step takes no time."""
    return SimContext(EngineConfig.of(path=SIM, slots=4, context=cells, sim={"on": True}), free)


def said(context: SimContext, seq: int, tokens: Sequence[int]) -> int:
    """What follows after `tokens`, the last of which are computed now."""
    start = context.length(seq)
    context.batch.clear()
    context.batch.add(seq, start, tokens[start:], 1)
    return int(context.decode()[0].argmax())


@given(st.text())
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    tokens = VOCAB.tokenize(text, special=True)
    assert b"".join(map(VOCAB.piece, tokens)) == text.encode("utf-8", "replace")


def test_words_are_tokens() -> None:
    assert len(VOCAB.tokenize(" the time of them", special=False)) == 4
    assert VOCAB.piece(END) == b""


def test_what_follows_depends_on_all_before() -> None:
    context = opened()
    alone = said(context, 0, [5, 6, 7, 8])
    assert said(context, 1, [5, 6, 7, 8]) == alone
    others = {said(opened(), 0, [first, 6, 7, 8]) for first in range(20)}
    assert len(others) > 10


def test_a_shared_and_a_loaded_prefix_are_the_same_as_a_computed_one() -> None:
    context = opened()
    tokens = [*range(1, 40)]
    whole = said(context, 0, tokens)
    context.copy(0, 1, 20)
    assert said(context, 1, tokens) == whole
    state = context.save(0, 10, 30)
    assert state is not None
    context.cut(1, 10)
    assert context.load(1, state, 10, 30)
    assert said(context, 1, tokens) == whole


def test_cells_are_shared_counted_and_freed() -> None:
    context = opened(cells=64)
    said(context, 0, [*range(1, 51)])
    context.copy(0, 1, 50)
    with pytest.raises(NoFreeCells):
        said(context, 1, [*range(1, 101)])
    assert context.length(1) == 50
    context.cut(0, 0)
    with pytest.raises(NoFreeCells):
        said(context, 2, [*range(1, 21)])
    context.cut(1, 10)
    assert said(context, 2, [*range(1, 21)]) >= END
    context.clear()
    assert all(context.length(seq) == 0 for seq in range(context.sequences))


def test_the_speculator_is_right_as_often_as_asked() -> None:
    context, speculator = opened(), SimSpeculator(0, 0.7)
    tokens, right = [1], 0
    speculator.begin(tokens)
    for _ in range(900):
        (guess,) = speculator.propose(1).tokens
        tokens.append(said(context, 0, tokens))
        right += guess == tokens[-1]
        speculator.observe(tokens[-1:])
    assert 0.65 < right / 900 < 0.75
    assert min(tokens[1:]) == END < WORD  # it ends now and then


@given(st.lists(st.integers(0, 999), min_size=1), st.integers(0, 20), st.integers(0, 20))
def test_the_speculator_is_the_same_after_edits(tokens: list[int], keep: int, discard: int) -> None:
    speculator, fresh = SimSpeculator(0, 0.5), SimSpeculator(0, 0.5)
    speculator.begin([*tokens, 7, 8])
    speculator.truncate(len(tokens))
    speculator.shift(keep, discard)
    fresh.begin([*tokens[:keep], *tokens[keep + discard :]])
    assert speculator.propose(8) == fresh.propose(8)


def test_rows_hold_nothing_of_the_last_step() -> None:
    context = opened()
    context.batch.clear()
    for seq in range(4):
        context.batch.add(seq, 0, [seq + 1, seq + 2], 2)
    assert np.count_nonzero(context.decode()) >= 8
    said(context, 0, [1, 2, 3])
    assert np.count_nonzero(context._rows) <= 2


def test_costs_are_named_or_read(tmp_path: Path) -> None:
    assert cost_of("flat") is COSTS["flat"]
    path = tmp_path / "cost.json"
    path.write_bytes(msgspec.json.encode(Measured({1: 0.01, 4: 0.02}, 1e-6, 0.003)))
    assert cost_of(str(path))(4, 1000) == pytest.approx(0.024)
    with pytest.raises(ModelError, match="one of free, flat, linear or a file"):
        cost_of("round")


async def generated(engine: Engine, prompt: str, speculation: Speculation | None = None) -> tuple[list[int], Finished]:
    """All tokens of a greedy answer, and its end."""
    tokens: list[int] = []
    request = Request(
        prompt=tuple(engine.vocab.tokenize(prompt, special=True)),
        max_tokens=60,
        sampling=GREEDY,
        ignore_eos=True,
        speculation=speculation,
    )
    async with engine.generate(request) as updates:
        async for update in updates:
            if isinstance(update, Tokens):
                tokens += update.ids
            else:
                return tokens, update
    raise AssertionError("every request ends")


async def test_an_engine_serves_it_with_drafts_and_without() -> None:
    simulated = EngineConfig.of(
        path=SIM, slots=4, context=1024, warmup=False, sim={"on": True, "cost": "free", "accept": 0.8}
    )
    drafts = msgspec.convert({"type": ["auto"], "n_max": 4, "order": "fixed"}, Speculation)
    async with Engine.open(simulated) as engine:
        prompts = [f"Tell me of number {n}." for n in range(8)]
        alone = [await generated(engine, prompt, Speculation()) for prompt in prompts]
        beside = await asyncio.gather(*(generated(engine, prompt, drafts) for prompt in prompts))
    assert [tokens for tokens, _ in alone] == [tokens for tokens, _ in beside]
    assert sum(end.usage.accepted for _, end in beside) > 100
