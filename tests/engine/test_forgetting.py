"""Context shift: a request that fills its context forgets half of it and goes on, and every speculator with it."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from engine.batch import Batch
from engine.config import SpeculationConfig
from engine.contract import Finished, FinishReason, ReasoningBudget, Request, SamplingParams
from engine.streams import Stream
from tests.engine.test_same_as_alone import Bench
from tests.toy import ToyContext, ToyVocab

LIMIT = 40
LOOPS = SamplingParams(temperature=0.7, seed=3, logit_bias=tuple((token, 9.0) for token in range(1, 4)))


def asked(tokens: int) -> Request:
    return Request(prompt=tuple(range(5, 25)), max_tokens=tokens, ignore_eos=True, sampling=LOOPS)


def submit(bench: Bench, key: int, request: Request, keep: int) -> Stream:
    """As `Bench.submit`, with a context that is forgotten."""
    stream = Stream(key, request, 3, ToyVocab(), LIMIT, keep)
    bench.got[key], bench.streams[key] = [], stream
    bench.runner.submit(stream)
    return stream


def naive(request: Request, keep: int) -> list[int]:
    """The same by its definition: every token from the whole history as it is then, computed anew."""
    sampler = Stream(0, request, 3, ToyVocab(), LIMIT, keep).sampler
    history, forgotten = list(request.prompt), 0
    got: list[int] = []
    while len(got) < (request.max_tokens or 0):
        context = ToyContext(cells=LIMIT)
        context.batch = Batch(LIMIT)
        context.batch.add(0, 0, history, 1)
        got.append(sampler.pick(context.decode()[0], history, len(request.prompt), forgotten))
        history.append(got[-1])
        if len(history) == LIMIT:
            first = min(keep, LIMIT - 2) if keep >= 0 else len(request.prompt)
            half = (len(history) - first + 1) // 2
            del history[first : first + half]
            forgotten += half
    return got


@pytest.mark.parametrize("keep", [0, 4, -1])
def test_what_is_forgotten_is_as_if_it_had_never_been_there(keep: int) -> None:
    bench = Bench(ToyContext(cells=150))
    request = asked(200)
    submit(bench, 0, request, keep)
    bench.run()
    assert bench.got[0] == naive(request, keep)
    end = bench.ends[0]
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.LENGTH
    assert end.usage.completion == 200
    assert end.forgotten > 0


@pytest.mark.parametrize("kind", ["ngram-map-k", "suffix", "draft", "auto"])
def test_every_speculator_survives_a_hundred_shifts(kind: Any) -> None:
    speculation = SpeculationConfig(
        types=(kind,), order="fixed", size_n=2, size_m=6, mod_match=2, mod_min=0, suffix_tokens=500
    )
    draft = ToyContext(cells=150, other=0.3)
    bench = Bench(ToyContext(cells=150), speculation=speculation, draft=draft)
    request = asked(100 * LIMIT // 2 + 200)
    streams = [submit(bench, key, request, 4) for key in range(2)]
    bench.run()
    plain = Bench(ToyContext(cells=150))
    submit(plain, 0, request, 4)
    plain.run()
    assert bench.got[0] == bench.got[1] == plain.got[0]
    assert all(stream.forgotten >= 100 * (LIMIT - 4) // 2 for stream in streams)
    assert sum(drafts.accepted for drafts in bench.drafting.drafts) > 100


def test_a_context_that_is_not_forgotten_ends_the_request() -> None:
    bench = Bench(ToyContext(cells=LIMIT))
    bench.submit(0, asked(200))
    bench.run()
    end = bench.ends[0]
    assert isinstance(end, Finished)
    assert (end.reason, end.usage.completion, end.forgotten) == (FinishReason.LENGTH, LIMIT - 20, 0)


def test_reasoning_is_bounded_by_what_was_emitted_whatever_is_forgotten() -> None:
    """By more tokens than the context holds."""
    closing = (30, 31, 32)
    bound = ReasoningBudget(70, "", "never written", closing)
    bench = Bench(ToyContext(cells=150))
    stream = submit(bench, 0, structs.replace(asked(120), reasoning=bound), 4)
    bench.run()
    assert stream.forgotten > len(stream.request.prompt)
    assert [place for place in range(120) if tuple(bench.got[0][place : place + 3]) == closing] == [70]
