"""Context shift: a request that fills its context discards half of it and continues, and so does every proposer."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from engine.batch import Batch
from engine.config import SpeculationConfig
from engine.contract import Finished, FinishReason, ReasoningBudget, Request, SamplingParams
from engine.sequence import Sequence
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, context_of
from tests.sizes import sized
from tests.toy import ToyContext, ToyVocab

LIMIT = 40
SHIFTS = sized(25, 100)
LOOPING = SamplingParams(temperature=0.7, seed=3, logit_bias=tuple((token, 9.0) for token in range(1, 4)))


def looping_request(tokens: int) -> Request:
    return Request(prompt=tuple(range(5, 25)), max_tokens=tokens, ignore_eos=True, sampling=LOOPING)


def submit(bench: CoreBench, key: int, request: Request, keep: int) -> Sequence:
    """Submits a request as `CoreBench.submit` does, with context shift."""
    sequence = Sequence(key, request, 3, ToyVocab(), LIMIT, keep)
    bench.outputs[key], bench.sequences[key] = [], sequence
    bench.core.lifecycle.submit(sequence)
    return sequence


def expected_output(request: Request, keep: int) -> list[int]:
    """Returns the expected output: each token is picked from the whole current history, recomputed from scratch."""
    sampler = Sequence(0, request, 3, ToyVocab(), LIMIT, keep).sampler
    history, discarded = list(request.prompt), 0
    got: list[int] = []
    while len(got) < (request.max_tokens or 0):
        context = ToyContext(cells=LIMIT)
        context.batch = Batch(LIMIT)
        context.batch.add(0, 0, history, 1)
        got.append(sampler.pick(context.decode()[0], history, len(request.prompt), discarded))
        history.append(got[-1])
        if len(history) == LIMIT:
            first = min(keep, LIMIT - 2) if keep >= 0 else len(request.prompt)
            half = (len(history) - first + 1) // 2
            del history[first : first + half]
            discarded += half
    return got


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("keep", [0, 4, -1])
def test_discarded_tokens_change_nothing_afterwards(keep: int, unified: bool) -> None:
    bench = CoreBench(context_of(unified, 150))
    request = looping_request(200)
    submit(bench, 0, request, keep)
    bench.run()
    assert bench.outputs[0] == expected_output(request, keep)
    end = bench.ends[0]
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.LENGTH
    assert end.usage.completion == 200
    assert end.discarded > 0


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("kind", ["ngram-map-k", "suffix", "draft", "auto"])
def test_every_proposer_survives_many_shifts(kind: Any, unified: bool) -> None:
    speculation = SpeculationConfig(
        types=(kind,), order="fixed", size_n=2, size_m=6, mod_match=2, mod_min=0, suffix_tokens=500
    )
    draft = context_of(unified, 150, other=0.3)
    bench = CoreBench(context_of(unified, 150), speculation=speculation, draft=draft)
    request = looping_request(SHIFTS * LIMIT // 2 + 200)
    sequences = [submit(bench, key, request, 4) for key in range(2)]
    bench.run()
    plain = CoreBench(ToyContext(cells=150))
    submit(plain, 0, request, 4)
    plain.run()
    assert bench.outputs[0] == bench.outputs[1] == plain.outputs[0]
    assert all(sequence.discarded >= SHIFTS * (LIMIT - 4) // 2 for sequence in sequences)
    assert sum(drafts.accepted for drafts in bench.speculative_decoding.draft_stats) > SHIFTS


def test_without_context_shift_a_full_context_ends_the_request() -> None:
    bench = CoreBench(ToyContext(cells=LIMIT))
    bench.submit(0, looping_request(200))
    bench.run()
    end = bench.ends[0]
    assert isinstance(end, Finished)
    assert (end.reason, end.usage.completion, end.discarded) == (FinishReason.LENGTH, LIMIT - 20, 0)


def test_discarded_tokens_count_for_the_reasoning_budget() -> None:
    """The budget has more tokens than the context."""
    closing = (30, 31, 32)
    bound = ReasoningBudget(70, "", "never written", closing)
    bench = CoreBench(ToyContext(cells=150))
    sequence = submit(bench, 0, structs.replace(looping_request(120), reasoning=bound), 4)
    bench.run()
    assert sequence.discarded > len(sequence.request.prompt)
    assert [position for position in range(120) if tuple(bench.outputs[0][position : position + 3]) == closing] == [70]
