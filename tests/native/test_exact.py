"""On the first layers of the real model, other requests, drafts and preemption do not change a request's output.

The tests are a part of `python -m bench.exactness`. In the deterministic profile tokens and log probabilities are equal
to the bit, with and without noise and penalties.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench.exactness import ALONE, ServingSetup, SetupComparison, SetupResult, config, request_of, requests_for
from engine import Engine, Finished, Tokens, open_vocabulary

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
def comparison(short_model: Path) -> SetupComparison:
    """Returns a comparison whose reference is the completion of each prompt alone."""
    with open_vocabulary(short_model) as vocab:
        prompts = [tuple(vocab.tokenize(text, special=True)) for text in TEXTS]
    new_comparison = SetupComparison(
        short_model, None, True, [request_of(prompt, number, 12) for number, prompt in enumerate(prompts)]
    )
    alone = asyncio.run(new_comparison.run(ALONE))
    assert alone.cached == alone.drafted == alone.preemptions == 0
    return new_comparison


async def equal_outputs(comparison: SetupComparison, setup: ServingSetup) -> SetupResult:
    """Returns the outcome of `setup`, and asserts that every request has the output that it has alone."""
    outcome = await comparison.run(setup)
    assert outcome.differing == {}
    assert outcome.equal == len(TEXTS), "log probabilities are equal too"
    return outcome


async def test_a_draft_with_errors(comparison: SetupComparison) -> None:
    outcome = await equal_outputs(comparison, ServingSetup("predicted", types=("prediction",)))
    assert 20 < outcome.accepted < outcome.drafted


async def test_many_clients_with_all_drafts_and_preemption(comparison: SetupComparison) -> None:
    outcome = await equal_outputs(comparison, ServingSetup("preempted", clients=8, types=("auto",), preempt=0.3))
    assert outcome.drafted > 0
    assert outcome.preemptions > 0


async def test_chunked_prefill(comparison: SetupComparison) -> None:
    await equal_outputs(comparison, ServingSetup("chunks", clients=3, rows=5))


async def test_a_prefix_that_is_found_instead_of_computed(comparison: SetupComparison) -> None:
    outcome = await equal_outputs(comparison, ServingSetup("twice", times=2))
    assert outcome.cached >= sum(len(request.prompt) - 1 for request in comparison.requests)


async def test_log_probabilities_of_a_consumer_that_waits_for_the_end(
    comparison: SetupComparison, short_model: Path
) -> None:
    setup = ServingSetup("at the end", types=("prediction",))
    request = requests_for(setup, comparison.requests, comparison.reference)[0]
    opened = Engine.open(config(setup, short_model, None, deterministic=True))
    async with opened as engine, engine.generate(request) as updates:
        await engine.drain(60.0)
        output, end = [update async for update in updates]
    assert isinstance(output, Tokens)
    assert isinstance(end, Finished)
    assert end.usage.accepted > 0
    assert (output.ids, output.logprobs) == (comparison.reference[0].ids, comparison.reference[0].logprobs)
    for token in output.logprobs:
        likeliest = [chance for _, chance in token.top]
        assert 0.0 > token.logprob == likeliest[0] > likeliest[1] > likeliest[2], "greedy, without penalties"
