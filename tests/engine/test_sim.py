"""Output, cells and costs of the simulated model; the output depends only on the tokens that a row attends to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import SIMULATED_MODEL, Engine, EngineConfig, Finished, ModelError, Request, SamplingParams, Speculation
from engine.backend import NoFreeCells, StatePart
from engine.contract import Tokens
from engine.pace import Calibration, StepShape
from engine.sim.context import SimContext
from engine.sim.costs import SIM_COSTS, SimCost, read_cost
from engine.sim.hashing import history_hashes, next_hash
from engine.sim.proposer import SimProposer
from engine.sim.vocab import END_TOKEN, FIRST_WORD_TOKEN, SimVocab

VOCAB = SimVocab()
GREEDY = SamplingParams(temperature=0.0)


LAYOUTS = pytest.mark.parametrize("unified", [True, False])


def opened(cells: int = 1024, *, unified: bool = True) -> SimContext:
    """Returns a context whose steps take no time."""
    config = EngineConfig.of(path=SIMULATED_MODEL, slots=4, context=cells, kv_unified=unified, sim={"on": True})
    return SimContext(config, SIM_COSTS["free"])


def output(context: SimContext, seq: int, tokens: Sequence[int]) -> int:
    """Computes the `tokens` that are not in cells yet and returns the next token."""
    start = context.length(seq)
    context.batch.clear()
    context.batch.add(seq, start, tokens[start:], 1)
    return int(context.decode()[0].argmax())


@given(st.text())
def test_tokens_decode_to_the_text(text: str) -> None:
    tokens = VOCAB.tokenize(text, special=True)
    assert b"".join(map(VOCAB.piece, tokens)) == text.encode("utf-8", "replace")


def test_words_are_tokens() -> None:
    assert len(VOCAB.tokenize(" the time of them", special=False)) == 4
    assert VOCAB.piece(END_TOKEN) == b""


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**31 - 1), min_size=1)), min_size=1))
def test_hashes_of_a_batch_are_those_of_its_tokens_one_by_one(histories: list[tuple[int, list[int]]]) -> None:
    firsts, tokens = zip(*histories, strict=True)
    found = history_hashes(np.array([*chain(*tokens)], np.int32), firsts, [*map(len, tokens)])
    expected = [accumulate(own, next_hash, initial=first) for first, own in histories]
    assert found.tolist() == [each for own in expected for each in [*own][1:]]


def test_the_next_token_depends_on_the_whole_history() -> None:
    context = opened()
    alone = output(context, 0, [5, 6, 7, 8])
    assert output(context, 1, [5, 6, 7, 8]) == alone
    others = {output(opened(), 0, [first, 6, 7, 8]) for first in range(20)}
    assert len(others) > 10


def test_an_alternative_follows_the_tokens_before_it_in_the_same_step() -> None:
    context = opened()
    context.batch.add(0, 0, [5, 6, 7, 9], 1)
    context.batch.make_alternative(3, 2, 0)
    assert int(context.decode()[0].argmax()) == output(context, 1, [5, 6, 9])
    context.adopt(0, 2)
    assert output(context, 0, [5, 6, 9, 3]) == output(context, 2, [5, 6, 9, 3])


@LAYOUTS
def test_a_copied_and_a_loaded_prefix_are_the_same_as_a_computed_one(unified: bool) -> None:
    context = opened(unified=unified)
    tokens = [*range(1, 40)]
    whole = output(context, 0, tokens)
    context.copy(0, 1, 20)
    assert output(context, 1, tokens) == whole
    snapshot = context.save(0)
    assert snapshot is not None
    assert snapshot.cut(10, 50) is None
    early, late = snapshot.cut(0, 25), snapshot.cut(15, 39)
    assert early is not None
    assert late is not None
    context.cut(1, 10)
    assert context.load(1, [StatePart(early, 10, 20), StatePart(late, 20, 30)])
    assert output(context, 1, tokens) == whole
    context.cut(1, 10)
    assert not context.load(1, [StatePart(early, 10, 20), StatePart(early, 20, 30)]), "a state that is too short"
    assert context.length(1) == 10


def test_cells_are_shared_counted_and_freed_with_unified_kv() -> None:
    context = opened(cells=64)
    output(context, 0, [*range(1, 51)])
    context.copy(0, 1, 50)
    with pytest.raises(NoFreeCells):
        output(context, 1, [*range(1, 101)])
    assert context.length(1) == 50
    context.cut(0, 0)
    with pytest.raises(NoFreeCells):
        output(context, 2, [*range(1, 21)])
    context.cut(1, 10)
    assert output(context, 2, [*range(1, 21)]) >= END_TOKEN
    context.clear()
    assert all(context.length(seq) == 0 for seq in range(context.sequences))


def test_each_sequence_has_its_own_cells_with_per_slot_kv() -> None:
    context = opened(cells=64, unified=False)
    assert (context.sequences, context.sequence_cells) == (4, 16)
    for seq in range(4):
        output(context, seq, [*range(1, 17)])
        with pytest.raises(NoFreeCells):
            output(context, seq, [*range(1, 18)])
    context.cut(1, 0)
    context.copy(0, 1, 16)
    context.cut(0, 15)
    assert context.length(1) == 16
    assert output(context, 0, [*range(1, 17)]) >= END_TOKEN


def test_kv_is_per_slot_where_each_slot_gets_enough_tokens() -> None:
    contexts = [
        SimContext(EngineConfig.of(path=SIMULATED_MODEL, slots=4, context=cells), SIM_COSTS["free"])
        for cells in (4095, 4096)
    ]
    assert [context.unified for context in contexts] == [True, False]


@LAYOUTS
def test_a_step_costs_its_passes(unified: bool) -> None:
    found: list[StepShape] = []

    class Recorded(SimCost):
        def seconds(self, shape: StepShape) -> float:
            found.append(shape)
            return 0.0

    config = EngineConfig.of(path=SIMULATED_MODEL, slots=4, context=8192, kv_unified=unified)
    context = SimContext(config, Recorded(SIM_COSTS["free"].pass_seconds))
    for rows in ((10, 1, 1, 1), (1, 3, 1, 1)):
        context.batch.clear()
        for seq, count in enumerate(rows):
            context.batch.add(seq, context.length(seq), [1] * count, 1)
        context.decode()
    assert found == (
        [StepShape((13,), 0), StepShape((6,), 78)] if unified else [StepShape((4, 9), 0), StepShape((4, 2), 15)]
    )


def test_the_acceptance_rate_is_the_configured_one() -> None:
    context, proposer = opened(), SimProposer(0, 0.7)
    tokens, right = [1], 0
    proposer.begin(tokens)
    for _ in range(900):
        (drafted,) = proposer.propose(1).tokens
        tokens.append(output(context, 0, tokens))
        right += drafted == tokens[-1]
        proposer.observe(tokens[-1:])
    assert 0.65 < right / 900 < 0.75
    assert min(tokens[1:]) == END_TOKEN < FIRST_WORD_TOKEN  # some outputs end


@given(st.lists(st.integers(0, 999), min_size=1), st.integers(0, 20), st.integers(0, 20))
def test_the_proposer_is_the_same_after_edits(tokens: list[int], keep: int, discard: int) -> None:
    proposer, fresh = SimProposer(0, 0.5), SimProposer(0, 0.5)
    proposer.begin([*tokens, 7, 8])
    proposer.truncate(len(tokens))
    proposer.shift(keep, discard)
    fresh.begin([*tokens[:keep], *tokens[keep + discard :]])
    assert proposer.propose(8) == fresh.propose(8)


def test_logits_of_the_last_step_are_cleared() -> None:
    context = opened()
    context.batch.clear()
    for seq in range(4):
        context.batch.add(seq, 0, [seq + 1, seq + 2], 2)
    logits = context.decode()
    assert np.count_nonzero(logits) >= 8
    logits[:, 5] = 100.0  # as a bias
    alone = output(opened(), 0, [1, 2, 3])
    context.cut(0, 0)
    assert output(context, 0, [1, 2, 3]) == alone
    assert np.count_nonzero(context._rows[0]) <= 2


def test_costs_have_a_name_or_a_file(tmp_path: Path) -> None:
    assert read_cost("flat") is SIM_COSTS["flat"]
    assert SIM_COSTS["linear"].seconds(StepShape((3, 2), 1000)) == pytest.approx(0.1)
    path = tmp_path / "cost.json"
    path.write_bytes(msgspec.json.encode(Calibration({1: 0.01, 4: 0.02}, 1e-6, 0.003)))
    assert read_cost(str(path)).seconds(StepShape((4,), 4000)) == pytest.approx(0.024)
    with pytest.raises(ModelError, match="one of free, flat, linear or a file"):
        read_cost("round")


async def generated(engine: Engine, prompt: str, speculation: Speculation | None = None) -> tuple[list[int], Finished]:
    """Returns all tokens of a greedy output, and its end."""
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


@LAYOUTS
async def test_drafts_do_not_change_the_output_of_an_engine(unified: bool) -> None:
    simulated = EngineConfig.of(
        path=SIMULATED_MODEL,
        slots=4,
        context=1024,
        kv_unified=unified,
        warmup=False,
        sim={"on": True, "cost": "free", "accept": 0.8},
    )
    drafts = msgspec.convert({"type": ["auto"], "n_max": 4, "order": "fixed"}, Speculation)
    async with Engine.open(simulated) as engine:
        prompts = [f"Tell me of number {n}." for n in range(8)]
        alone = [await generated(engine, prompt, Speculation()) for prompt in prompts]
        together = await asyncio.gather(*(generated(engine, prompt, drafts) for prompt in prompts))
    assert [tokens for tokens, _ in alone] == [tokens for tokens, _ in together]
    assert sum(end.usage.accepted for _, end in together) > 100
