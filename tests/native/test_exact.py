"""Nothing that happens beside a request changes its text, on the real model: a part of `python -m bench.exactness`.

In the deterministic profile tokens and log probabilities must be equal to the bit, not only likely so, with noise and
penalties and without.
"""

from __future__ import annotations

import asyncio

import pytest

from bench.exactness import ALONE, Outcome, Series, Way, config, in_way, request_of
from engine import Engine, Finished, Tokens
from engine.engine import open_vocabulary
from tests.native.conftest import MODEL

COUNT = (
    "Count with me, slowly and in words: one, two, three, four, five, six, seven, eight, nine, ten. One, two, three,"
)
TEXTS = (
    "Once upon a time",
    "def fibonacci(n):",
    COUNT,
    "The three largest oceans are",
    f"{COUNT} four, five,",
    "It was the best of times, it was the worst of times, it was the age of wisdom, and so the story went",
)


@pytest.fixture(scope="module")
def series() -> Series:
    """What every text is continued with alone, to compare with."""
    with open_vocabulary(MODEL) as vocab:
        prompts = [tuple(vocab.tokenize(text, special=True)) for text in TEXTS]
    made = Series(MODEL, None, True, [request_of(prompt, number, 12) for number, prompt in enumerate(prompts)])
    alone = asyncio.run(made.run(ALONE))
    assert alone.cached == alone.drafted == alone.retractions == 0
    return made


async def in_the_same_words(series: Series, way: Way) -> Outcome:
    """What came of a way, in which every request says what it says alone."""
    outcome = await series.run(way)
    assert outcome.differing == {}
    assert outcome.equal == len(TEXTS), "log probabilities are equal too"
    return outcome


async def test_a_draft_with_errors(series: Series) -> None:
    outcome = await in_the_same_words(series, Way("predicted", types=("prediction",)))
    assert 20 < outcome.accepted < outcome.drafted


async def test_many_clients_everybody_guesses_and_requests_are_retracted(series: Series) -> None:
    outcome = await in_the_same_words(series, Way("retracted", clients=8, types=("auto",), retract=0.3))
    assert outcome.drafted > 0
    assert outcome.retractions > 0


async def test_cells_that_run_out_of_order_are_freed_all_at_once(series: Series) -> None:
    way = Way("few cells", clients=8, cells=256, types=("auto",), shares=False, times=2)
    outcome = await in_the_same_words(series, way)
    assert outcome.restarts > 0
    assert outcome.retractions > 0


async def test_a_prompt_in_small_pieces(series: Series) -> None:
    await in_the_same_words(series, Way("pieces", clients=3, rows=5))


async def test_a_prefix_that_is_found_instead_of_computed(series: Series) -> None:
    outcome = await in_the_same_words(series, Way("twice", times=2))
    assert outcome.cached >= sum(len(asked.prompt) - 1 for asked in series.requests)


async def test_log_probabilities_of_one_who_reads_at_the_end(series: Series) -> None:
    way = Way("at the end", types=("prediction",))
    asked = in_way(way, series.requests, series.reference)[0]
    opened = Engine.open(config(way, MODEL, None, deterministic=True))
    async with opened as engine, engine.generate(asked) as updates:
        await engine.drain(60.0)
        said, end = [update async for update in updates]
    assert isinstance(said, Tokens)
    assert isinstance(end, Finished)
    assert end.usage.accepted > 0
    assert (said.ids, said.logprobs) == (series.reference[0].ids, series.reference[0].logprobs)
    for token in said.logprobs:
        likeliest = [chance for _, chance in token.top]
        assert 0.0 > token.logprob == likeliest[0] > likeliest[1] > likeliest[2], "greedy, without penalties"
