"""A toy draft model with a toy target: no token is computed twice, and drafts change no token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
from msgspec import structs

from engine.backend import Aborted, Logits, NativeFault, NoFreeCells
from engine.config import SpeculationConfig
from engine.contract import Finished, Request, SamplingParams, Speculation
from engine.speculate import DraftBounds, DraftModel, vocabulary_mismatch
from engine.speculate.draft_model import DraftSequence
from engine.speculate.proposer import BatchedDraftRequest
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, alone, context_of
from tests.toy import VOCABULARY, ToyBackend, ToyContext, ToyVocab

CONFIG = SpeculationConfig(types=("draft",))

both = pytest.mark.parametrize("unified", LAYOUTS)
GREEDY = SamplingParams(temperature=0.0)


def greedy_request(key: int = 0, tokens: int = 30, **more: object) -> Request:
    """Returns a greedy request whose last prompt token depends on `key`."""
    prompt = (*range(1, 11), key + 1)
    return Request(prompt=prompt, max_tokens=tokens, ignore_eos=True, sampling=GREEDY, **more)  # type: ignore[arg-type]


def draft_bench(draft: ToyContext, slots: int = 4) -> CoreBench:
    """Returns a bench with a draft model, both models in the KV layout of `draft`."""
    bench = CoreBench(context_of(draft.unified, 400), slots, speculation=CONFIG, draft=draft)
    cast("Any", bench.speculative_decoding.draft_model)._cost.prompt_rows = lambda *_: 1000
    return bench


def end_of(bench: CoreBench, key: int) -> Finished:
    end = bench.ends[key]
    assert isinstance(end, Finished)
    return end


def draft_context(bench: CoreBench) -> ToyContext:
    assert bench.speculative_decoding.draft_model is not None
    context = bench.speculative_decoding.draft_model.context
    assert isinstance(context, ToyContext)
    return context


def check_draft_model(bench: CoreBench) -> None:
    """Asserts that the draft model's KV cache is consistent and has no allocation."""
    assert bench.speculative_decoding.draft_model is not None
    bench.speculative_decoding.draft_model.kv.check()
    assert bench.speculative_decoding.draft_model.active == []


@both
def test_an_equal_draft_model_is_always_right_and_computes_each_token_once(unified: bool) -> None:
    bench = draft_bench(context_of(unified, 400))
    before = draft_context(bench).computed
    bench.submit(0, greedy_request())
    bench.run()
    assert bench.outputs[0] == alone(greedy_request(), 400)[0]
    usage = end_of(bench, 0).usage
    assert usage.accepted == usage.drafted >= 22
    assert bench.backend.context.decodes < 10
    assert draft_context(bench).computed - before <= 11 + 30
    check_draft_model(bench)


@both
@pytest.mark.parametrize("other", [0.2, 1.0])
def test_a_wrong_draft_is_rolled_back_in_both(other: float, unified: bool) -> None:
    bench = draft_bench(context_of(unified, 400, other=other))
    bench.submit(0, greedy_request())
    while bench.core.lifecycle.busy:
        bench.core.step()
        bench.core.kv.check()
    bench.run()
    assert bench.outputs[0] == alone(greedy_request(), 400)[0]
    assert end_of(bench, 0).usage.accepted < end_of(bench, 0).usage.drafted
    check_draft_model(bench)


@both
def test_all_slots_share_one_batch_for_each_draft_position(unified: bool) -> None:
    bench = draft_bench(context_of(unified, 400))
    for key in range(4):
        bench.submit(key, greedy_request(key, tokens=80))
    for _ in range(3):
        bench.core.step()
    before, steps = draft_context(bench).decodes, bench.core.counters.steps
    for _ in range(3):
        bench.core.step()
    assert len(bench.core.running) == 4
    assert draft_context(bench).decodes - before <= 6 * (bench.core.counters.steps - steps)
    bench.run()
    for key in range(4):
        assert bench.outputs[key] == alone(greedy_request(key, tokens=80), 400)[0]
    check_draft_model(bench)


@both
def test_a_prefix_is_prefilled_once_by_the_draft_model_too(unified: bool) -> None:
    bench = draft_bench(context_of(unified, 400))
    before = draft_context(bench).computed
    for key in range(3):
        bench.submit(key, greedy_request(key, tokens=10))
        bench.run()
    assert draft_context(bench).computed - before <= 11 + 10 + 2 * (1 + 10)


def test_a_request_without_drafts_is_not_prefilled() -> None:
    bench = draft_bench(ToyContext(cells=400))
    before = draft_context(bench).computed
    bench.submit(0, greedy_request(speculation=Speculation()))
    bench.run()
    assert draft_context(bench).computed == before
    assert end_of(bench, 0).usage.drafted == 0


@both
@pytest.mark.parametrize("cells", [12, 24, 40])
def test_too_few_cells_mean_fewer_drafts_and_the_same_tokens(cells: int, unified: bool) -> None:
    bench = draft_bench(context_of(unified, cells))
    for key in range(4):
        bench.submit(key, greedy_request(key))
    bench.run()
    for key in range(4):
        assert bench.outputs[key] == alone(greedy_request(key), 400)[0]
    check_draft_model(bench)


@both
def test_decodes_of_the_draft_model_that_find_no_cells(unified: bool) -> None:
    bench = draft_bench(context_of(unified, 400, other=0.3))
    context = draft_context(bench)
    context.faults = lambda n: NoFreeCells() if n % 3 == 0 else None
    for key in range(4):
        bench.submit(key, greedy_request(key))
    bench.run()
    for key in range(4):
        assert bench.outputs[key] == alone(greedy_request(key), 400)[0]
    check_draft_model(bench)


@both
@pytest.mark.parametrize("fault", [NativeFault("injected"), Aborted()])
def test_a_draft_model_that_fails_fails_no_request(fault: Exception, unified: bool) -> None:
    bench = draft_bench(context_of(unified, 400))
    draft_context(bench).faults = lambda n: fault if n > 8 else None
    for key in range(2):
        bench.submit(key, greedy_request(key))
    bench.run()
    for key in range(2):
        assert bench.outputs[key] == alone(greedy_request(key), 400)[0]
    assert bench.speculative_decoding.draft_model is not None
    assert bool(bench.speculative_decoding.draft_model.fault) == isinstance(fault, NativeFault)


@both
def test_preempted_requests_release_their_draft_cells_and_continue(unified: bool) -> None:
    bench = draft_bench(context_of(unified, 400, other=0.2))
    for key in range(3):
        bench.submit(key, greedy_request(key))
    for turn in range(60):
        bench.core.step()
        if turn % 4 == 3 and bench.core.running:
            bench.core.lifecycle.preempt(list(bench.core.running.values())[-1])
    bench.run()
    for key in range(3):
        assert bench.outputs[key] == alone(greedy_request(key), 400)[0]
    check_draft_model(bench)


@pytest.mark.parametrize(("n_max", "most"), [(1, 1), (2, 2), (5, 5)])
def test_the_request_bounds_the_draft(n_max: int, most: int) -> None:
    bench = draft_bench(ToyContext(cells=400))
    bench.submit(0, greedy_request(speculation=Speculation(type=("draft",), n_max=n_max)))
    bench.run()
    (drafts,) = end_of(bench, 0).drafts
    assert len(drafts.by_accepted) == most + 1
    assert drafts.accepted == drafts.drafted


def test_unlikely_tokens_end_a_draft() -> None:
    bench = draft_bench(ToyContext(cells=400))
    bench.submit(0, greedy_request(speculation=Speculation(type=("draft",), p_min=1.0)))
    bench.run()
    assert end_of(bench, 0).usage.drafted == 0
    assert bench.outputs[0] == alone(greedy_request(), 400)[0]
    check_draft_model(bench)


def test_nothing_is_drafted_after_tokens_the_draft_model_lacks() -> None:
    model = DraftModel(ToyBackend(ToyContext()), VOCABULARY + 5)
    sequence = DraftSequence(model, "", DraftBounds())
    sequence.begin([1, 2, VOCABULARY + 1])
    model.draft([BatchedDraftRequest(sequence, 3)], 1.0)
    assert sequence.propose(3).tokens == ()
    sequence = DraftSequence(model, "", DraftBounds())
    sequence.begin([1, 2, 3])
    model.draft([BatchedDraftRequest(sequence, 3)], 1.0)
    assert len(sequence.propose(3).tokens) == 3


@both
def test_pending_tokens_of_the_draft_model_fit_its_batch(unified: bool) -> None:
    bench = draft_bench(context_of(unified, 400, rows=16, outputs=16))
    for key in range(4):
        bench.submit(key, structs.replace(greedy_request(key), prompt=(1, 2, 3, 4, 5, 6, key + 7)))
    bench.run()
    for key in range(4):
        request = structs.replace(greedy_request(key), prompt=(1, 2, 3, 4, 5, 6, key + 7))
        assert bench.outputs[key] == alone(request, 400)[0]


def test_a_draft_that_was_not_verified_leaves_nothing() -> None:
    bench = draft_bench(ToyContext(cells=400))
    assert bench.speculative_decoding.draft_model is not None
    sequence = DraftSequence(bench.speculative_decoding.draft_model, "", DraftBounds())
    sequence.begin([1, 2, 3])
    for _ in range(2):
        bench.speculative_decoding.draft_model.draft([BatchedDraftRequest(sequence, 4)], 1.0)
        assert len(sequence.propose(4).tokens) == 4
        assert sequence.allocation is not None
        assert draft_context(bench).length(sequence.seq) == 3 + 3
    held = sequence.allocation
    sequence.end_draft()
    assert held is not None
    assert draft_context(bench).length(held.seq) == 3


def test_a_request_cannot_delay_the_others_by_a_long_draft() -> None:
    bench = draft_bench(ToyContext(cells=400))
    bench.submit(0, greedy_request(tokens=90, speculation=Speculation(type=("draft",), n_max=1024, order="fixed")))
    bench.run()
    (drafts,) = end_of(bench, 0).drafts
    assert len(drafts.by_accepted) == 16 + 1


class OtherVocab(ToyVocab):
    """The toy's vocabulary with some attributes changed."""

    def __init__(self, **changes: object) -> None:
        self.spelled: dict[int, str] = {}
        vars(self).update(changes)

    def text(self, token: int) -> str:
        return self.spelled.get(token, super().text(token))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"spelled": {3: "x"}}, ""),  # the first tokens are special and may differ
        ({"spelled": {30: "x"}}, "its token 30 is 'x', the model's is '^'"),
        ({"size": VOCABULARY + 129}, "its vocabulary has 179 tokens, the model's 50; they may differ by at most 128"),
        ({"size": VOCABULARY + 128}, ""),
        ({"kind": 2}, "its vocabulary is of type 2, the model's of type 0"),
        ({"added": (1, -1)}, "its BOS and EOS tokens around a text are (1, -1), the model's are (-1, -1) (-1 is none)"),
    ],
)
def test_vocabulary_mismatches(changes: dict[str, object], message: str) -> None:
    assert vocabulary_mismatch(ToyVocab(), OtherVocab(**changes)) == message


@pytest.mark.parametrize("noise", ["shared", "greedy", "off"])
def test_a_draft_with_the_same_noise_agrees_at_any_temperature(noise: Any) -> None:
    sampling = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.2, seed=9)
    fixed = Speculation(type=("draft",), order="fixed")
    request = structs.replace(greedy_request(tokens=60), sampling=sampling, speculation=fixed)
    bench = CoreBench(ToyContext(cells=400), speculation=CONFIG, draft=ToyContext(cells=400), noise=noise)
    bench.submit(0, request)
    bench.run()
    assert bench.outputs[0] == alone(request, 400)[0]
    usage = end_of(bench, 0).usage
    assert usage.drafted > 30
    assert (usage.accepted == usage.drafted) == (noise == "shared")


def test_shared_noise_counts_discarded_tokens_and_a_smaller_vocabulary() -> None:
    picks: list[tuple[int, list[int], int]] = []

    def pick(row: Logits, history: Sequence[int], discarded: int) -> int:
        picks.append((len(row), [*history], discarded))
        return 7

    model = DraftModel(ToyBackend(ToyContext()), VOCABULARY + 5)
    sequence = DraftSequence(model, "", DraftBounds(), pick)
    sequence.begin([1, 2, 3, 4, 5])
    sequence.shift(1, 2)
    model.draft([BatchedDraftRequest(sequence, 2)], 1.0)
    assert sequence.propose(2).tokens == (7, 7)
    assert picks == [(VOCABULARY + 5, [1, 4, 5], 2), (VOCABULARY + 5, [1, 4, 5, 7], 2)]


# ── cost ──


def test_a_draft_model_whose_passes_cost_more_than_they_save_is_not_used() -> None:
    draft = ToyContext(cells=400)
    bench = draft_bench(draft)
    cast("Any", bench.speculative_decoding.draft_model)._cost.curve.put(
        1, 100.0
    )  # a step of the target takes one second
    bench.submit(0, greedy_request(tokens=30))
    bench.run()
    assert draft.decodes == 0
    assert end_of(bench, 0).usage.drafted == 0


def test_a_draft_model_on_trial_prefills_to_the_end_and_drafts() -> None:
    draft = ToyContext(cells=400)
    bench = draft_bench(draft)
    cost = cast("Any", bench.speculative_decoding.draft_model)._cost
    cost.curve.put(1, 0.5)  # drafting pays if the drafts are right, which is unknown at first
    cast("Any", cost).observe = lambda *_: None
    cost.prompt_rows = lambda *_: 5
    cast("Any", bench.speculative_decoding.chooser)._trial_seconds = 2.5
    request = structs.replace(greedy_request(tokens=80), prompt=tuple(1 + position % 40 for position in range(60)))
    bench.submit(0, request)
    bench.run()
    assert bench.outputs[0] == alone(request, 400)[0]
    usage = end_of(bench, 0).usage
    assert usage.accepted == usage.drafted > 20


def test_drafts_shorter_than_n_min_are_not_made() -> None:
    draft = ToyContext(cells=400)
    bench = draft_bench(draft)
    bench.submit(0, greedy_request(tokens=60, speculation=Speculation(type=("draft",), n_min=5)))
    bench.run()
    (drafts,) = end_of(bench, 0).drafts
    assert drafts.accepted > 0
    assert sum(drafts.by_accepted[1:5]) <= 1, "only the last draft may be shorter"


@both
@pytest.mark.parametrize("length", [11, 60, 200])
def test_drafts_begin_in_the_second_step_after_prefill(length: int, unified: bool) -> None:
    """Although a draft model as slow as the target reads hardly a token in half of a step without prompts."""
    bench = draft_bench(ToyContext(cells=400) if unified else context_of(False, 400))
    cast("Any", bench.speculative_decoding.draft_model)._cost.prompt_rows = lambda *_: 1
    request = structs.replace(
        greedy_request(tokens=40, speculation=Speculation(type=("draft",), order="fixed")),
        prompt=tuple(1 + position % 40 for position in range(length)),
    )
    bench.submit(0, request)
    while len(bench.outputs.get(0, ())) < 1:
        bench.core.step()
    bench.core.step()
    bench.core.step()
    assert bench.core.counters.drafted_tokens > 0
    bench.run()
    assert bench.outputs[0] == alone(request, 400)[0]


def test_a_history_that_cannot_be_complete_before_the_end_is_not_prefilled() -> None:
    draft = ToyContext(cells=400)
    bench = draft_bench(draft)
    bench.submit(0, greedy_request(tokens=30))
    bench.run()
    cached = structs.replace(greedy_request(tokens=2), prompt=tuple(1 + position % 40 for position in range(200)))
    bench.submit(1, structs.replace(cached, speculation=Speculation(type=())))
    bench.run()
    before = draft.computed
    bench.submit(2, structs.replace(cached, speculation=Speculation(type=("draft",), order="fixed")))
    bench.run()
    assert draft.computed == before, "16 rows a step for two steps are fewer than 200"


def test_second_choices_of_the_draft_model_are_adopted_with_unified_kv() -> None:
    bench = draft_bench(context_of(True, 400, other=0.5))
    sampled = SamplingParams(temperature=0.5, seed=3)
    for key in range(3):
        bench.submit(key, structs.replace(greedy_request(key, 60), sampling=sampled))
    bench.run()
    for key in range(3):
        assert bench.outputs[key] == alone(structs.replace(greedy_request(key, 60), sampling=sampled), 400)[0]
    assert bench.backend.context.adopted > 0
    check_draft_model(bench)
