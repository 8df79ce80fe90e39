"""The property: whatever else runs, a request's tokens are those it gets alone.

Requests arrive, are cancelled, share prefixes, have drafts verified that are right or wrong, are retracted when
cells run out and meet decodes that fail for lack of cells. The toy context's logits depend on every token that a
row can see, so any slip shows.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from random import Random
from typing import Any, Literal, cast

import pytest
from msgspec import structs

from engine.backend import NoFreeCells
from engine.config import DraftConfig, SpeculationConfig
from engine.contract import SPECULATOR_TYPES, Failed, Finished, FinishReason, Request, SamplingParams
from engine.memory import Ordered, Store
from engine.memory.idle import IDLE_STEPS
from engine.outbox import News, Outbox
from engine.pace import Pace, StepCost
from engine.runner import Runner
from engine.speculate import Draft, Drafting, DraftModel, Shared, Speculator
from engine.streams import Stream
from tests.toy import VOCABULARY, ToyBackend, ToyContext


class Direct:
    """An event loop that delivers at once."""

    def is_closed(self) -> bool:
        return False

    def call_soon_threadsafe(self, function: Callable[..., None], *arguments: object) -> None:
        function(*arguments)


class Oracle:
    """Drafts from the tokens that the request will have, each wrong with chance `wrong`."""

    def __init__(self, request: Request, truth: Sequence[int], wrong: float, random: Random) -> None:
        self.truth, self.wrong, self.random = truth, wrong, random
        self.emitted = -len(request.prompt)
        self.ended = False

    def begin(self, tokens: Sequence[int]) -> None:
        self.emitted += len(tokens)

    def propose(self, limit: int) -> Draft:
        rest = self.truth[self.emitted :][: self.random.randint(0, limit)]
        return Draft([token if self.random.random() >= self.wrong else (token + 1) % VOCABULARY for token in rest])

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        assert 0 <= accepted <= drafted
        assert accepted <= len(emitted) <= accepted + 1 or not drafted
        self.emitted += len(emitted)

    def truncate(self, length: int) -> None:
        raise AssertionError("nothing is cut here")

    def shift(self, keep: int, discard: int) -> None:
        raise AssertionError("nothing is shifted here")

    def end(self) -> None:
        assert not self.ended, "ended twice"
        self.ended = True


def flat() -> StepCost:
    """Steps that cost the same whatever they hold, so that every draft is worth verifying."""
    cost = StepCost()
    cost.curve.put(1, 1.0)
    cost.curve.put(1000, 1.0)
    cast("Any", cost).observe = lambda *_: None
    return cost


class Bench:
    """A runner without a thread, and what its readers got."""

    def __init__(
        self,
        context: Any,
        slots: int = 4,
        prompt_rows: int = 1000,
        *,
        speculation: SpeculationConfig | None = None,
        draft: ToyContext | None = None,
        noise: Literal["shared", "greedy", "off"] = "shared",
        store: int = 0,
        reuse: int = 0,
        kept: Store | None = None,
        backend: Any = None,
    ) -> None:
        self.backend: Any = backend or ToyBackend(context)
        self.got: dict[int, list[int]] = {}
        self.ends: dict[int, Finished | Failed] = {}
        outbox = Outbox(cast("Any", Direct()), self.deliver)
        self.next: dict[str, Speculator] = {}
        self.drafting = Drafting(
            Shared(speculation or SpeculationConfig(), self.backend.vocab),
            speculation or SpeculationConfig(),
            DraftConfig(n_max=6, noise=noise),
            DraftModel(ToyBackend(draft), VOCABULARY) if draft else None,
            None if speculation else lambda _: self.next,
            flat(),
        )
        kept = kept or (Store(store, whole=not context.partial) if store else None)
        self.runner = Runner(self.backend, slots, Pace(0.0, 0.5), outbox, self.drafting, kept, reuse)
        cast("Any", self.runner.cost).prompt_rows = lambda *_: prompt_rows
        self.streams: dict[int, Stream] = {}

    def deliver(self, items: list[News]) -> None:
        for key, ids, _, end in items:
            assert key not in self.ends, "nothing follows the terminal update"
            self.got[key] += ids
            if isinstance(end, Finished | Failed):
                self.ends[key] = end

    def submit(self, key: int, request: Request, speculator: Speculator | None = None) -> None:
        seed = request.sampling.seed or 0
        context = self.backend.context
        stream = Stream(key, request, seed, self.backend.vocab, context.cells)
        self.next = {"oracle": speculator} if speculator else {}
        self.got[key], self.streams[key] = [], stream
        self.runner.submit(stream)

    def check(self) -> None:
        """Tree, cells and store agree."""
        self.runner.cells.check()
        for stream in self.runner.running.values():
            assert stream.held.length == self.runner.cells.tree.length(stream.held.seq), "lease and tree agree"
            assert stream.held.seq not in self.runner.cells._idle
        if self.runner.cells.store is not None:
            self.runner.cells.store.check()

    def rest(self) -> None:
        """All that is idle is saved, as when nothing runs for a while."""
        while self.runner.tidy():
            pass

    def run(self, most: int = 5000) -> None:
        while self.runner.busy:
            self.runner.step()
            most -= 1
            assert most, "no end in sight"
        self.runner.step()
        self.runner.rest()
        self.check()

    def compare(
        self, wanted: Mapping[int, tuple[Sequence[int], FinishReason]], cancelled: Container[int], *, faults: bool
    ) -> None:
        """Every request got what it gets alone, and ended as it does; what was cancelled got the beginning."""
        for key, (tokens, reason) in wanted.items():
            end = self.ends[key]
            if isinstance(end, Failed):
                assert faults, "no request fails unless decodes do"
            elif end.reason is FinishReason.CANCELLED:
                assert key in cancelled
                assert self.got[key] == tokens[: len(self.got[key])]
            else:
                assert (self.got[key], end.reason) == (tokens, reason)


def alone(request: Request, cells: int) -> tuple[list[int], FinishReason]:
    """Tokens and reason of a request that has everything to itself."""
    bench = Bench(ToyContext(cells=cells), slots=1)
    bench.submit(0, request)
    bench.run()
    end = bench.ends[0]
    assert isinstance(end, Finished)
    return bench.got[0], end.reason


def draw_request(random: Random, prefixes: list[list[int]], longest: int) -> Request:
    start = random.choice(prefixes)[: random.randint(1, 40)]
    prompt = [*start, *(random.randrange(1, VOCABULARY) for _ in range(random.randint(0, 8)))][: longest - 1]
    sampling = random.choice(
        [
            SamplingParams(temperature=0.0),
            SamplingParams(temperature=0.8, seed=random.randrange(1000)),
            SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=random.randrange(1000)),
            SamplingParams(temperature=0.7, seed=5, repeat_penalty=1.3, presence_penalty=0.5, dry_multiplier=0.8),
        ]
    )
    return Request(
        prompt=tuple(prompt),
        max_tokens=random.choice([0, 1, 2, 10, 30, None]),
        min_tokens=random.choice([0, 0, 5]),
        sampling=sampling,
        stop_tokens=random.choice([(), (3, 4)]),
        ignore_eos=random.random() < 0.3,
        salt=random.choice(["", "", "tenant"]),
    )


@pytest.mark.parametrize("seed", range(60))
def test_random_interleavings(seed: int) -> None:
    random = Random(seed)
    cells = random.choice([64, 90, 300])
    context = ToyContext(cells=cells, sequences=random.choice([5, 12]), rows=random.choice([16, 64]), outputs=16)
    bench = Bench(context, slots=4, prompt_rows=random.choice([1, 5, 100]))
    chance = random.choice([0.0, 0.0, 0.1])
    context.faults = lambda _: NoFreeCells() if random.random() < chance else None
    prefixes = [[random.randrange(1, VOCABULARY) for _ in range(40)] for _ in range(3)]
    wanted: dict[int, tuple[list[int], FinishReason]] = {}
    cancelled: set[int] = set()
    for key in range(12):
        request = draw_request(random, prefixes, cells)
        wanted[key] = alone(request, cells)
        oracle = Oracle(request, wanted[key][0], random.choice([0.0, 0.3, 1.0]), random)
        bench.submit(key, request, oracle if random.random() < 0.5 else None)
        for _ in range(random.randint(0, 6)):
            bench.runner.step()
            bench.runner.cells.check()
        if random.random() < 0.2:
            victim = random.randrange(key + 1)
            bench.runner.end(victim, FinishReason.CANCELLED)
            cancelled.add(victim)
        if bench.runner.running and random.random() < 0.15:
            bench.runner._retract(random.choice(list(bench.runner.running.values())))
    bench.run()
    bench.compare(wanted, cancelled, faults=chance > 0)
    assert context.used() == bench.runner.cells.tree.cells
    bench.runner.cells.reclaim(cells)
    assert context.used() == 0


FREE = tuple(kind for kind in SPECULATOR_TYPES if kind != "grammar")
"""Types for requests without a grammar; for the others see test_grammar_exact.py."""
LOOPS = SamplingParams(temperature=0.0, logit_bias=tuple((token, 8.0) for token in range(1, 5)))
"""Says only four tokens, and so repeats itself: n-grams recur."""


@pytest.mark.parametrize("kind", [*FREE, "auto", "fixed"])
@pytest.mark.parametrize("seed", range(6))
def test_every_type_of_speculator_leaves_the_text_alone(kind: Any, seed: int) -> None:
    random = Random(seed)
    order: Any = "measured" if kind == "auto" else "fixed"
    types: Any = ("auto",) if kind == "fixed" else (kind,)
    speculation = SpeculationConfig(
        types=types, order=order, size_n=2, size_m=5, mod_match=2, mod_min=1, suffix_tokens=100
    )
    draft = ToyContext(cells=random.choice([60, 400]), other=0.3)
    bench = Bench(
        ToyContext(cells=random.choice([90, 300]), rows=random.choice([16, 64]), outputs=random.choice([8, 16])),
        prompt_rows=random.choice([1, 5, 100]),
        speculation=speculation,
        draft=draft,
    )
    prefixes = [[random.randrange(1, VOCABULARY) for _ in range(20)] for _ in range(2)]
    wanted: dict[int, list[int]] = {}
    for key in range(8):
        request = structs.replace(draw_request(random, prefixes, 60), max_tokens=random.choice([1, 10, 40]))
        if key < 2 or random.random() < 0.5:
            request = structs.replace(request, sampling=LOOPS, ignore_eos=True, max_tokens=50)
        wanted[key] = alone(request, 300)[0]
        if kind in ("prediction", "auto", "fixed"):
            guess = tuple(token if random.random() < 0.8 else 7 for token in wanted[key])
            request = structs.replace(request, prediction=guess)
        bench.submit(key, request)
        for _ in range(random.randint(0, 6)):
            bench.runner.step()
            bench.runner.cells.check()
        if bench.runner.running and random.random() < 0.15:
            bench.runner._retract(random.choice(list(bench.runner.running.values())))
    bench.run()
    assert bench.got == wanted
    guessed = FREE if kind in ("auto", "fixed") else (kind,)
    assert {drafts.type for drafts in bench.drafting.drafts} == set(guessed)
    assert any(drafts.drafted for drafts in bench.drafting.drafts), "somebody guessed"
    assert bench.drafting.model is not None
    bench.drafting.model.cells.check()


def in_order(cells: int) -> Ordered:
    """Cells whose order can be seen in every logit, kept in order."""
    return Ordered(ToyContext(cells=cells, rows=64, outputs=16, by_place=True))


def run_in_order(seed: int, context: ToyContext | Ordered) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """What requests that come and go, share prefixes and have wrong drafts got, and what they get alone."""
    random = Random(seed)
    bench = Bench(cast("Any", context), slots=4, prompt_rows=random.choice([1, 5, 100]))
    prefixes = [[random.randrange(1, VOCABULARY) for _ in range(40)] for _ in range(3)]
    wanted: dict[int, list[int]] = {}
    for key in range(14):
        request = draw_request(random, prefixes, 60)
        single = Bench(cast("Any", in_order(context.cells)), slots=1)
        single.submit(0, request)
        single.run()
        wanted[key] = single.got[0]
        bench.submit(key, request, Oracle(request, wanted[key], random.choice([0.0, 0.3, 1.0]), random))
        for _ in range(random.randint(0, 6)):
            bench.runner.step()
            bench.runner.cells.check()
        if bench.runner.running and random.random() < 0.15:
            bench.runner._retract(random.choice(list(bench.runner.running.values())))
    bench.run(most=20_000)
    bench.runner.cells.clear()
    assert context.wasted == 0
    return bench.got, wanted


@pytest.mark.parametrize("seed", range(20))
def test_cells_that_are_kept_in_order(seed: int) -> None:
    got, wanted = run_in_order(seed, in_order([64, 90, 300][seed % 3]))
    assert got == wanted


def test_cells_that_are_not_kept_in_order_can_change_the_text() -> None:
    """Else the test above would prove nothing."""
    got, wanted = run_in_order(2, ToyContext(cells=300, rows=64, outputs=16, by_place=True))
    assert got != wanted


@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_right_and_wrong_drafts_leave_the_text_alone(wrong: float) -> None:
    request = Request(prompt=(1, 2, 3), max_tokens=24, ignore_eos=True, sampling=SamplingParams(seed=4))
    tokens, _ = alone(request, 200)
    context = ToyContext()
    bench = Bench(context, slots=2)
    bench.submit(0, request, Oracle(request, tokens, wrong, Random(0)))
    bench.run()
    end = bench.ends[0]
    assert bench.got[0] == tokens
    assert isinstance(end, Finished)
    assert end.usage.drafted > 0
    assert end.usage.accepted == (end.usage.drafted if wrong == 0 else 0)
    assert (context.decodes < 24) == (wrong == 0), "right drafts save steps, wrong ones save none"


def test_a_prefix_that_is_being_read_is_computed_once() -> None:
    context = ToyContext(cells=200)
    bench = Bench(context, prompt_rows=7)
    shared = tuple(range(1, 41))
    for key in range(4):
        bench.submit(key, Request(prompt=(*shared, 41 + key), max_tokens=3, ignore_eos=True))
    bench.run()
    assert context.computed == 40 + 4 * (1 + 2)
    cached = [end.usage.cached for end in bench.ends.values() if isinstance(end, Finished)]
    assert sorted(cached) == [0, 40, 40, 40]


def test_who_waits_for_a_prefix_goes_on_when_its_reader_is_cancelled() -> None:
    context = ToyContext(cells=200)
    bench = Bench(context, prompt_rows=10)
    shared = tuple(range(1, 41))
    bench.submit(0, Request(prompt=(*shared, 41), max_tokens=3))
    bench.submit(1, Request(prompt=(*shared, 42), max_tokens=3, ignore_eos=True))
    bench.runner.step()
    bench.runner.step()
    assert list(bench.runner.running) == [0]
    bench.runner.end(0, FinishReason.CANCELLED)
    bench.run()
    assert context.computed == 20 + (41 - 20) + 2
    end = bench.ends[1]
    assert isinstance(end, Finished)
    assert end.usage.cached == 20


def test_the_next_turn_of_a_conversation_computes_only_what_is_new() -> None:
    context = ToyContext(cells=200)
    bench = Bench(context)
    first = Request(prompt=tuple(range(1, 21)), max_tokens=10, ignore_eos=True)
    bench.submit(0, first)
    bench.run()
    before = context.computed
    bench.submit(1, Request(prompt=(*first.prompt, *bench.got[0], 7, 8), max_tokens=1))
    bench.run()
    assert context.computed - before == 3, "the last token of the answer was never fed, and two are new"


def test_cancelling_a_queued_request_frees_nothing_and_ends_once() -> None:
    bench = Bench(ToyContext(), slots=1)
    bench.submit(0, Request(prompt=(1,), max_tokens=5, ignore_eos=True))
    bench.submit(1, Request(prompt=(2,), max_tokens=5))
    bench.runner.step()
    bench.runner.end(1, FinishReason.CANCELLED)
    bench.runner.end(1, FinishReason.CANCELLED)
    bench.run()
    end = bench.ends[1]
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.CANCELLED
    assert len(bench.got[0]) == 5


def test_a_model_that_cannot_share_still_serves() -> None:
    context = ToyContext(partial=False)
    bench = Bench(context)
    request = Request(prompt=(1, 2, 3, 4), max_tokens=6, ignore_eos=True, sampling=SamplingParams(temperature=0))
    tokens, _ = alone(request, 200)
    for key in range(3):
        bench.submit(key, request, Oracle(request, tokens, 0.0, Random(0)))
    bench.run()
    assert [bench.got[key] for key in range(3)] == [tokens] * 3
    assert context.computed == 3 * (4 + 5)


def test_a_failed_step_fails_its_streams_and_nobody_else() -> None:
    from engine.backend import NativeFault

    context = ToyContext()
    bench = Bench(context, slots=1)
    bench.submit(0, Request(prompt=(1, 2), max_tokens=9, ignore_eos=True))
    bench.submit(1, Request(prompt=(1, 2), max_tokens=9, ignore_eos=True))
    context.faults = lambda n: NativeFault("told to") if n == 3 else None
    bench.run()
    assert isinstance(bench.ends[0], Failed)
    assert isinstance(bench.ends[1], Finished)
    assert len(bench.got[1]) == 9


@pytest.mark.parametrize("faults", [1, 2, 4])
def test_decodes_that_find_no_cells_are_tried_with_less(faults: int) -> None:
    """However often in a row: nobody fails while more than a row was tried."""
    request = Request(prompt=tuple(range(1, 20)), max_tokens=9, ignore_eos=True)
    tokens, _ = alone(request, 200)
    context = ToyContext()
    bench = Bench(context)
    for key in range(3):
        bench.submit(key, request, Oracle(request, tokens, 0.5, Random(1)))
    context.faults = lambda n: NoFreeCells() if n % 10 < faults and context.batch.rows > 1 else None
    bench.run()
    assert [bench.got[key] for key in range(3)] == [tokens] * 3


def test_two_sequences_that_never_fit_together_run_one_after_the_other() -> None:
    request = Request(prompt=(1, 2, 3), max_tokens=6, ignore_eos=True)
    tokens, _ = alone(request, 200)
    context = ToyContext()
    bench = Bench(context)
    for key in range(2):
        bench.submit(key, request)
    context.faults = lambda n: NoFreeCells() if len(set(context.batch.seq[: context.batch.rows])) > 1 else None
    bench.run()
    assert [bench.got[key] for key in range(2)] == [tokens] * 2


def test_a_request_that_fits_not_even_alone_fails_and_no_other() -> None:
    context = ToyContext()
    bench = Bench(context)
    bench.submit(0, Request(prompt=(1, 2, 3), max_tokens=6, ignore_eos=True))
    bench.runner.step()
    bench.submit(1, Request(prompt=(4, 5, 6), max_tokens=6, ignore_eos=True))
    context.faults = lambda n: NoFreeCells() if 0 in context.batch.seq[: context.batch.rows] else None
    bench.run()
    assert isinstance(bench.ends[0], Failed)
    assert isinstance(bench.ends[1], Finished)


def test_a_source_that_lost_cells_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a sliding window: the prompt is computed then."""
    context = ToyContext()
    monkeypatch.setattr(context, "copy", lambda source, target, length: False)
    bench = Bench(context)
    request = Request(prompt=tuple(range(1, 45)), max_tokens=3, ignore_eos=True)
    for key in range(2):
        bench.submit(key, request)
        bench.run()
    assert bench.got[0] == bench.got[1]
    assert context.computed == 2 * (44 + 2)


def test_an_idle_prefix_leaves_when_keeping_it_has_cost_enough() -> None:
    context = ToyContext(cells=2000)
    bench = Bench(context)
    idle = Request(prompt=tuple(range(1, 41)), max_tokens=1)
    bench.submit(0, idle)
    bench.run()
    bench.submit(1, Request(prompt=(45,), max_tokens=IDLE_STEPS - 5, ignore_eos=True))
    bench.run()
    before = context.computed
    bench.submit(2, idle)
    bench.run()
    assert context.computed == before + 1, "still there"
    bench.submit(3, Request(prompt=(46,), max_tokens=IDLE_STEPS + 5, ignore_eos=True))
    bench.run()
    before = context.computed
    bench.submit(4, idle)
    bench.run()
    assert context.computed == before + 40, "gone"


def test_a_prompt_that_grows_by_a_token_each_time() -> None:
    """As an editor asks for completions: each request parts from the last at another place."""
    context = ToyContext(cells=3000, rows=2048, sequences=12)
    bench = Bench(context, prompt_rows=2048)
    document = [1 + n % (VOCABULARY - 2) for n in range(1500)]
    for size in range(1, 1500, 1):
        bench.submit(size, Request(prompt=(*document[:size], VOCABULARY - 1), max_tokens=0))
        bench.runner.step()
    bench.run()
    assert context.computed < 1500 * 3
    assert sum(1 for _ in bench.runner.cells.tree.runs()) <= 2 * context.sequences


def test_a_stop_string_counts_as_a_stop() -> None:
    bench = Bench(ToyContext())
    bench.submit(0, Request(prompt=(1,), ignore_eos=True))
    bench.runner.step()
    bench.runner.end(0, FinishReason.STOP)
    bench.run()
    assert bench.runner.counters.finished == {"stop": 1, "length": 0, "cancelled": 0, "error": 0}
