"""The property: whatever else runs, a request's tokens are those it gets alone, in both KV layouts.

Requests arrive, are cancelled, share prefixes, have images, accepted and rejected drafts, are preempted when cells run
out, and are part of decodes that fail for lack of cells. The toy context's logits depend on every token that a row
attends to, so any bookkeeping error changes an output.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Container, Mapping
from random import Random
from typing import Any, Literal, cast

import pytest
from msgspec import structs

from engine.backend import NativeFault, NoFreeCells
from engine.config import DraftConfig, SpeculationConfig
from engine.contract import (
    PROPOSER_TYPES,
    Failed,
    Finished,
    FinishReason,
    Logprob,
    Request,
    SamplingParams,
    Speculation,
)
from engine.kv import Offload
from engine.kv.idle import UNPRICED_STEPS
from engine.media import without_runs
from engine.outbox import Outbox, StepOutput
from engine.pace import Layout, StepCost, StepTargets
from engine.sequence import Sequence
from engine.speculate import Draft, DraftModel, MtpProposer, Proposer, SharedDraftData, SpeculativeDecoding
from engine.step import EngineCore
from tests.sizes import sized
from tests.toy import VOCABULARY, ToyBackend, ToyContext, ToyHeadContext
from tests.toy_media import BlockingEncoder, ToyChunk, ToyProjector, request_of


class Oracle:
    """Drafts the tokens that the request will emit; each draft token is wrong with probability `wrong`. The second
    choice for a wrong token is right if `second` returns True for the right one."""

    def __init__(
        self,
        request: Request,
        truth: abc.Sequence[int],
        wrong: float,
        random: Random,
        second: abc.Callable[[int], bool] = lambda token: token % 2 == 0,
    ) -> None:
        self.truth, self.wrong, self.random, self.second = truth, wrong, random, second
        self.emitted = -len(without_runs(request.prompt, request.media))
        self.ended = False

    def begin(self, tokens: abc.Sequence[int]) -> None:
        self.emitted += len(tokens)

    def propose(self, limit: int) -> Draft:
        rest = self.truth[self.emitted :][: self.random.randint(0, limit)]
        tokens = [token if self.random.random() >= self.wrong else (token + 1) % VOCABULARY for token in rest]
        pairs = zip(tokens, rest, strict=True)
        return Draft(tokens, (), [right if right != token and self.second(right) else -1 for token, right in pairs])

    def observe(self, emitted: abc.Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
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


def equal_cost(context: Any) -> StepCost:
    """Returns equal costs for all steps, so that every draft is worth verifying."""
    cost = StepCost(layout=Layout.of(context))
    cost.curve.put(1, 1.0)
    cost.curve.put(1000, 1.0)
    cast("Any", cost).observe = lambda *_, **__: None
    return cost


LAYOUTS = [pytest.param(True, id="unified"), pytest.param(False, id="per-slot")]


def context_of(
    unified: bool, cells: int, slots: int = 4, *, sequences: int = 12, head: bool = False, **settings: Any
) -> ToyContext:
    """Returns a context for `slots` slots in which a request can have `cells` cells in either layout. With `head` the
    context drafts."""
    kind = ToyHeadContext if head else ToyContext
    return kind(cells=cells, sequences=sequences if unified else slots, unified=unified, **settings)


class CoreBench:
    """An engine core without a thread, and the tokens and terminal updates of its requests."""

    def __init__(
        self,
        context: Any,
        slots: int = 4,
        prompt_rows: int = 1000,
        *,
        speculation: SpeculationConfig | None = None,
        draft: ToyContext | None = None,
        noise: Literal["shared", "greedy", "off"] = "shared",
        ram: int = 0,
        reuse: int = 0,
        offload: Offload | None = None,
        backend: Any = None,
        faulty: bool = False,
        queue_timeout: float = 0.0,
        media_bytes: int | None = None,
        mtp: bool = False,
    ) -> None:
        """With `faulty`, proposers may fail. With `mtp`, the context itself drafts. `media_bytes` is the capacity of
        the encoder of images; None for none."""
        self._faulty = faulty
        self.backend: Any = backend or ToyBackend(context)
        self.outputs: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[Logprob]] = {}
        self.ends: dict[int, Finished | Failed] = {}
        outbox = Outbox(self.deliver)
        self.next_proposers: dict[str, Proposer] = {}
        self.projector = ToyProjector(context)
        self.encoder = None if media_bytes is None else BlockingEncoder(self.projector, media_bytes)
        self.speculative_decoding = SpeculativeDecoding(
            SharedDraftData(speculation or SpeculationConfig(), self.backend.vocab),
            speculation or SpeculationConfig(),
            DraftConfig(n_max=6, noise=noise),
            DraftModel(ToyBackend(draft), VOCABULARY, StepCost(layout=Layout.of(draft))) if draft else None,
            None if speculation else lambda _: self.next_proposers,
            equal_cost(self.backend.context),
            MtpProposer(context, self.backend.vocab.ends) if mtp else None,
        )
        offload = offload or (Offload(ram, whole=not context.divisible) if ram else None)
        targets = StepTargets(0.0, 0.5)
        self.core = EngineCore(
            self.backend,
            slots,
            targets,
            outbox,
            self.speculative_decoding,
            offload,
            reuse,
            queue_timeout,
            encoder=self.encoder,
        )
        cast("Any", self.core.cost).prompt_rows = lambda *_, **__: prompt_rows
        self.sequences: dict[int, Sequence] = {}

    def deliver(self, items: list[StepOutput]) -> None:
        for key, ids, logprobs, end, *_ in items:
            assert key not in self.ends, "nothing follows the terminal update"
            self.outputs[key] += ids
            self.logprobs.setdefault(key, []).extend(logprobs)
            if isinstance(end, Finished | Failed):
                self.ends[key] = end

    def submit(self, key: int, request: Request, proposer: Proposer | None = None) -> None:
        seed = request.sampling.seed or 0
        context = self.backend.context
        sequence = Sequence(key, request, seed, self.backend.vocab, context.sequence_cells)
        self.next_proposers = {"oracle": proposer} if proposer else {}
        self.outputs[key], self.sequences[key] = [], sequence
        self.core.lifecycle.submit(sequence)

    def check(self) -> None:
        """Asserts that cache, context and sequences agree."""
        self.core.kv.check()
        for sequence in self.core.running.values():
            assert sequence.computed == self.core.kv.length(sequence.seq), "sequence and cache agree"

    def offload_idle(self) -> None:
        """Saves all idle sequences, as the engine does while nothing runs."""
        while self.core.maintain_idle():
            pass

    def run(self, max_steps: int = 5000) -> None:
        while self.core.lifecycle.busy:
            self.core.step()
            max_steps -= 1
            assert max_steps, "the run does not end"
        self.core.step()
        self.core.check_idle()
        self.check()
        failures = [stats.type for stats in self.speculative_decoding.draft_stats if stats.failures]
        assert self._faulty or not failures, f"proposers failed: {failures}"

    def close(self) -> None:
        """Ends the thread that encodes images."""
        if self.encoder is not None:
            self.encoder.close()

    def compare(
        self, wanted: Mapping[int, tuple[abc.Sequence[int], FinishReason]], cancelled: Container[int], *, faults: bool
    ) -> None:
        """Asserts that each request has the tokens and the finish reason of `wanted`; a cancelled one has the first
        tokens."""
        for key, (tokens, reason) in wanted.items():
            end = self.ends[key]
            if isinstance(end, Failed):
                assert faults, "no request fails unless decodes do"
            elif end.reason is FinishReason.CANCELLED:
                assert key in cancelled
                assert self.outputs[key] == tokens[: len(self.outputs[key])]
            else:
                assert (self.outputs[key], end.reason) == (tokens, reason)


def alone(request: Request, cells: int) -> tuple[list[int], FinishReason]:
    """Returns the tokens and the finish reason of a request that runs alone."""
    bench = CoreBench(ToyContext(cells=cells), slots=1, media_bytes=0 if request.media else None)
    bench.submit(0, request)
    bench.run()
    bench.close()
    end = bench.ends[0]
    assert isinstance(end, Finished)
    return bench.outputs[0], end.reason


# Sampling whose state follows from the output.
STATEFUL = (
    SamplingParams(mirostat=2, mirostat_tau=2.0, mirostat_eta=0.7, seed=1),
    SamplingParams(adaptive_target=0.4, adaptive_decay=0.3, min_p=0.01, seed=2),
    SamplingParams(mirostat=1, mirostat_tau=2.0, mirostat_eta=0.7, seed=3),
)


# The embeddings of an image attend to those before them, or to all others of the image.
IMAGES = tuple(ToyChunk(range(first, first + 5 * at + 3), causal=at % 2 == 0) for at, first in enumerate((60, 80, 110)))


def draw_request(
    random: Random, prefixes: list[list[int]], longest: int, images: abc.Sequence[ToyChunk] = ()
) -> Request:
    """Returns a request of at most `longest` tokens, with up to two of `images` in the prompt."""
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
    shown = random.choices(images, k=random.randint(0, 2)) if images else []
    parts: list[int | ToyChunk] = [*prompt]
    if len(prompt) + sum(image.length for image in shown) < longest:
        for image in shown:
            parts.insert(random.choice([0, len(prompt) // 2, len(prompt) - 1]), image)
    return request_of(
        parts,
        max_tokens=random.choice([0, 1, 2, 10, 30, None]),
        min_tokens=random.choice([0, 0, 5]),
        sampling=sampling,
        stop_tokens=random.choice([(), (3, 4)]),
        ignore_eos=random.random() < 0.3,
        salt=random.choice(["", "", "tenant"]),
    )


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("seed", range(sized(60, 1000)))
def test_random_interleavings(seed: int, unified: bool) -> None:
    random = Random(seed)
    cells = random.choice([64, 90, 300])
    sequences, rows = random.choice([5, 12]), random.choice([16, 64])
    max_rollback = (1, 3, 8)[seed % 3] if seed % 4 == 0 else None  # a model with recurrent states
    context = context_of(unified, cells, sequences=sequences, rows=rows, outputs=16, max_rollback=max_rollback)
    images = IMAGES if seed % 5 < 2 else ()
    media_bytes, ram = (random.choice([0, 400]), random.choice([0, 10**6])) if images else (None, 0)
    bench = CoreBench(context, 4, random.choice([1, 5, 100]), ram=ram, media_bytes=media_bytes)
    chance = random.choice([0.0, 0.0, 0.1])
    context.faults = lambda _: NoFreeCells() if random.random() < chance else None
    prefixes = [[random.randrange(1, VOCABULARY) for _ in range(40)] for _ in range(3)]
    wanted: dict[int, tuple[list[int], FinishReason]] = {}
    cancelled: set[int] = set()
    for key in range(12):
        request = draw_request(random, prefixes, cells, images)
        if key % 4 == 3:
            request = structs.replace(request, sampling=STATEFUL[key % len(STATEFUL)])
        request = structs.replace(request, owner="ab"[key % 2], priority=key % 5 // 4)
        wanted[key] = alone(request, cells)
        oracle = Oracle(request, wanted[key][0], random.choice([0.0, 0.3, 1.0]), random)
        bench.submit(key, request, oracle if random.random() < 0.5 else None)
        for _ in range(random.randint(0, 6)):
            bench.core.step()
            bench.check()
        if random.random() < 0.2:
            victim = random.randrange(key + 1)
            bench.core.lifecycle.end(victim, FinishReason.CANCELLED)
            cancelled.add(victim)
        if bench.core.running and random.random() < 0.15:
            bench.core.lifecycle.preempt(random.choice(list(bench.core.running.values())))
    bench.run()
    bench.close()
    bench.compare(wanted, cancelled, faults=chance > 0)
    assert context.used() == bench.core.kv.used_cells
    bench.core.kv.drop_idle()
    assert context.used() == 0


# Types for requests without a grammar; test_grammar_exact.py tests requests with a grammar.
GRAMMARLESS_TYPES = tuple(kind for kind in PROPOSER_TYPES if kind != "grammar")
# Only four tokens are emitted, so that n-grams recur.
LOOPING = SamplingParams(temperature=0.0, logit_bias=tuple((token, 8.0) for token in range(1, 5)))


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("kind", [*GRAMMARLESS_TYPES, "auto", "fixed"])
@pytest.mark.parametrize("seed", range(6))
def test_no_type_of_speculation_changes_the_tokens(kind: Any, seed: int, unified: bool) -> None:
    random = Random(seed)
    order: Any = "measured" if kind == "auto" else "fixed"
    types: Any = ("auto",) if kind == "fixed" else (kind,)
    speculation = SpeculationConfig(
        types=types, order=order, size_n=2, size_m=5, mod_match=2, mod_min=1, suffix_tokens=100
    )
    mtp = kind == "draft-mtp" or (kind in ("auto", "fixed") and seed % 2 == 1)
    draft = None if mtp else context_of(unified, random.choice([60, 400]), other=0.3)
    cells, rows, outputs = random.choice([110, 300]), random.choice([16, 64]), random.choice([8, 16])
    bench = CoreBench(
        context_of(unified, cells, rows=rows, outputs=outputs, head=mtp),
        prompt_rows=random.choice([1, 5, 100]),
        speculation=speculation,
        draft=draft,
        mtp=mtp,
        media_bytes=400,
    )
    prefixes = [[random.randrange(1, VOCABULARY) for _ in range(20)] for _ in range(2)]
    wanted: dict[int, list[int]] = {}
    for key in range(8):
        request = structs.replace(draw_request(random, prefixes, 60, IMAGES), max_tokens=random.choice([1, 10, 40]))
        if key < 2 or random.random() < 0.5:
            request = structs.replace(request, sampling=LOOPING, ignore_eos=True, max_tokens=50)
        wanted[key] = alone(request, 300)[0]
        if kind in ("prediction", "auto", "fixed"):
            prediction = tuple(token if random.random() < 0.8 else 7 for token in wanted[key])
            request = structs.replace(request, prediction=prediction)
        bench.submit(key, request)
        for _ in range(random.randint(0, 6)):
            bench.core.step()
            bench.check()
        if bench.core.running and random.random() < 0.15:
            bench.core.lifecycle.preempt(random.choice(list(bench.core.running.values())))
    bench.run()
    bench.close()
    assert bench.outputs == wanted
    expected = {*GRAMMARLESS_TYPES} - {"draft" if mtp else "draft-mtp"} if kind in ("auto", "fixed") else {kind}
    assert {drafts.type for drafts in bench.speculative_decoding.draft_stats} == expected
    assert any(drafts.drafted for drafts in bench.speculative_decoding.draft_stats), "something was drafted"
    if bench.speculative_decoding.draft_model is not None:
        bench.speculative_decoding.draft_model.kv.check()


def run_by_cell_order(seed: int, *, unified: bool) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Returns outputs of requests that arrive and end, share prefixes and have rejected drafts, and their outputs
    alone.

    The logits also depend on the order of the cells.
    """
    random = Random(seed)
    cells = random.choice([64, 90, 300])
    bench = CoreBench(
        context_of(unified, cells, rows=64, outputs=16, by_cell_order=True), prompt_rows=random.choice([1, 5, 100])
    )
    prefixes = [[random.randrange(1, VOCABULARY) for _ in range(40)] for _ in range(3)]
    wanted: dict[int, list[int]] = {}
    for key in range(14):
        request = draw_request(random, prefixes, 60)
        wanted[key] = alone(request, cells)[0]
        bench.submit(key, request, Oracle(request, wanted[key], random.choice([0.0, 0.3, 1.0]), random))
        for _ in range(random.randint(0, 6)):
            bench.core.step()
            bench.check()
        if bench.core.running and random.random() < 0.15:
            bench.core.lifecycle.preempt(random.choice(list(bench.core.running.values())))
    bench.run(max_steps=20_000)
    return bench.outputs, wanted


@pytest.mark.parametrize("seed", range(sized(20, 400)))
def test_with_per_slot_kv_cells_are_in_the_order_of_positions(seed: int) -> None:
    """The last bits of a sum over cells therefore depend on nothing else, as the deterministic profile requires."""
    got, wanted = run_by_cell_order(seed, unified=False)
    assert got == wanted


# Only prompts have these tokens, so that no prompt continues an output.
OWN_TOKENS = range(40, VOCABULARY)


@pytest.mark.parametrize("seed", range(sized(20, 400)))
def test_rows_of_prompts_are_never_single_and_share_no_pass(seed: int) -> None:
    """An output does not depend on chunks, cached prefixes or other sequences.

    The logits of a single row differ here from those of several rows, as on a CPU without flash attention.
    """
    random = Random(seed)

    def context(slots: int) -> ToyContext:
        return context_of(False, 100, slots, rows=64, outputs=16, prefill_rows=2)

    bench = CoreBench(context(4), prompt_rows=random.choice([2, 3, 7, 100]), ram=random.choice([0, 10**6]))
    prefixes = [[random.randrange(1, OWN_TOKENS[0]) for _ in range(40)] for _ in range(3)]
    bias = tuple((token, -100.0) for token in OWN_TOKENS)
    wanted: dict[int, list[int]] = {}
    for key in range(14):
        own = [random.choice(OWN_TOKENS) for _ in range(random.randint(1, 5))]
        prompt = (*random.choice(prefixes)[: random.randint(1, 40)], *own)
        sampling = SamplingParams(temperature=random.choice([0.0, 1.0]), seed=key, logit_bias=bias)
        request = Request(prompt=prompt, max_tokens=random.randint(1, 20), sampling=sampling)
        single = CoreBench(context(1), slots=1)
        single.submit(0, request)
        single.run()
        wanted[key] = single.outputs[0]
        bench.submit(key, request)
        for _ in range(random.randint(0, 6)):
            bench.core.step()
    bench.run()
    assert bench.outputs == wanted


def test_with_unified_kv_the_order_of_cells_can_change_the_text() -> None:
    """Without this effect of the order, the tests with `by_cell_order` would prove nothing."""
    got, wanted = run_by_cell_order(2, unified=True)
    assert got != wanted


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_right_and_wrong_drafts_change_nothing(wrong: float, unified: bool) -> None:
    request = Request(prompt=(1, 2, 3), max_tokens=24, ignore_eos=True, sampling=SamplingParams(seed=4))
    tokens, _ = alone(request, 200)
    context = context_of(unified, 200)
    bench = CoreBench(context, slots=2)
    bench.submit(0, request, Oracle(request, tokens, wrong, Random(0), lambda _: False))
    bench.run()
    end = bench.ends[0]
    assert bench.outputs[0] == tokens
    assert isinstance(end, Finished)
    assert end.usage.drafted > 0
    assert end.usage.accepted == (end.usage.drafted if wrong == 0 else 0)
    assert (context.decodes < 24) == (wrong == 0), "right drafts save steps, wrong ones save none"


def test_right_alternatives_to_wrong_drafts_save_steps_with_unified_kv() -> None:
    request = Request(prompt=(1, 2, 3), max_tokens=24, ignore_eos=True, sampling=SamplingParams(seed=4))
    tokens, _ = alone(request, 200)
    decodes = []
    for unified in (True, False):
        context = context_of(unified, 200)
        bench = CoreBench(context, slots=2)
        bench.submit(0, request, Oracle(request, tokens, 1.0, Random(0), lambda _: True))
        bench.run()
        assert bench.outputs[0] == tokens
        decodes.append(context.decodes)
    assert decodes[0] < 24
    assert decodes[1] == 24


@pytest.mark.parametrize("unified", LAYOUTS)
def test_a_prefix_in_flight_is_computed_once(unified: bool) -> None:
    context = context_of(unified, 200)
    bench = CoreBench(context, prompt_rows=7)
    shared = tuple(range(1, 41))
    for key in range(4):
        bench.submit(key, Request(prompt=(*shared, 41 + key), max_tokens=3, ignore_eos=True))
    bench.run()
    assert context.computed == 40 + 4 * (1 + 2)
    assert context.copied == (0 if unified else 3 * 40)
    cached = [end.usage.cached for end in bench.ends.values() if isinstance(end, Finished)]
    assert sorted(cached) == [0, 40, 40, 40]


@pytest.mark.parametrize("unified", LAYOUTS)
def test_a_held_request_starts_when_the_request_it_is_held_for_is_cancelled(unified: bool) -> None:
    context = context_of(unified, 200)
    bench = CoreBench(context, prompt_rows=10)
    shared = tuple(range(1, 41))
    bench.submit(0, Request(prompt=(*shared, 41), max_tokens=3))
    bench.submit(1, Request(prompt=(*shared, 42), max_tokens=3, ignore_eos=True))
    bench.core.step()
    bench.core.step()
    assert list(bench.core.running) == [0]
    bench.core.lifecycle.end(0, FinishReason.CANCELLED)
    bench.run()
    assert context.computed == 20 + (41 - 20) + 2
    end = bench.ends[1]
    assert isinstance(end, Finished)
    assert end.usage.cached == 20
    assert context.copied == 0, "the slot that holds the prefix is taken"


@pytest.mark.parametrize("unified", LAYOUTS)
def test_the_next_turn_of_a_conversation_computes_only_what_is_new(unified: bool) -> None:
    context = context_of(unified, 200)
    bench = CoreBench(context)
    first = Request(prompt=tuple(range(1, 21)), max_tokens=10, ignore_eos=True)
    bench.submit(0, first)
    bench.run()
    before = context.computed
    bench.submit(1, Request(prompt=(*first.prompt, *bench.outputs[0], 7, 8), max_tokens=1))
    bench.run()
    assert context.computed - before == 3, "the last token of the output has no cell, and two are new"


def test_cancelling_a_queued_request_frees_nothing_and_ends_once() -> None:
    bench = CoreBench(ToyContext(), slots=1)
    bench.submit(0, Request(prompt=(1,), max_tokens=5, ignore_eos=True))
    bench.submit(1, Request(prompt=(2,), max_tokens=5))
    bench.core.step()
    bench.core.lifecycle.end(1, FinishReason.CANCELLED)
    bench.core.lifecycle.end(1, FinishReason.CANCELLED)
    bench.run()
    end = bench.ends[1]
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.CANCELLED
    assert len(bench.outputs[0]) == 5


@pytest.mark.parametrize("unified", LAYOUTS)
def test_a_model_that_cannot_share_parts_still_serves(unified: bool) -> None:
    context = context_of(unified, 200, partial=False)
    bench = CoreBench(context)
    request = Request(prompt=(1, 2, 3, 4), max_tokens=6, ignore_eos=True, sampling=SamplingParams(temperature=0))
    tokens, _ = alone(request, 200)
    for key in range(3):
        bench.submit(key, request, Oracle(request, tokens, 0.0, Random(0)))
    bench.run()
    assert [bench.outputs[key] for key in range(3)] == [tokens] * 3
    assert context.computed == 3 * (4 + 5)


@pytest.mark.parametrize("unified", LAYOUTS)
def test_a_failed_step_fails_its_sequences_and_no_other(unified: bool) -> None:
    context = context_of(unified, 200, slots=1)
    bench = CoreBench(context, slots=1)
    bench.submit(0, Request(prompt=(1, 2), max_tokens=9, ignore_eos=True))
    bench.submit(1, Request(prompt=(1, 2), max_tokens=9, ignore_eos=True))
    context.faults = lambda n: NativeFault("injected") if n == 3 else None
    bench.run()
    assert isinstance(bench.ends[0], Failed)
    assert isinstance(bench.ends[1], Finished)
    assert len(bench.outputs[1]) == 9


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("faults", [1, 2, 4])
def test_decodes_that_find_no_cells_are_tried_with_less(faults: int, unified: bool) -> None:
    """Up to `faults` decodes of several rows fail in a row; no request fails."""
    request = Request(prompt=tuple(range(1, 20)), max_tokens=9, ignore_eos=True)
    tokens, _ = alone(request, 200)
    context = context_of(unified, 200)
    bench = CoreBench(context)
    for key in range(3):
        bench.submit(key, request, Oracle(request, tokens, 0.5, Random(1)))
    context.faults = lambda n: NoFreeCells() if n % 10 < faults and context.batch.rows > 1 else None
    bench.run()
    assert [bench.outputs[key] for key in range(3)] == [tokens] * 3


@pytest.mark.parametrize("unified", LAYOUTS)
def test_two_sequences_that_never_fit_together_run_one_after_the_other(unified: bool) -> None:
    request = Request(prompt=(1, 2, 3), max_tokens=6, ignore_eos=True)
    tokens, _ = alone(request, 200)
    context = context_of(unified, 200)
    bench = CoreBench(context)
    for key in range(2):
        bench.submit(key, request)
    context.faults = lambda n: NoFreeCells() if len(set(context.batch.seq[: context.batch.rows])) > 1 else None
    bench.run()
    assert [bench.outputs[key] for key in range(2)] == [tokens] * 2


@pytest.mark.parametrize("unified", LAYOUTS)
def test_a_request_that_does_not_fit_alone_fails_and_no_other(unified: bool) -> None:
    context = context_of(unified, 200)
    bench = CoreBench(context)
    bench.submit(0, Request(prompt=(1, 2, 3), max_tokens=6, ignore_eos=True))
    bench.core.step()
    bench.submit(1, Request(prompt=(4, 5, 6), max_tokens=6, ignore_eos=True))
    first = bench.sequences[0]

    def without_room(decode: int) -> Exception | None:
        rows = context.batch.seq[: context.batch.rows]
        return NoFreeCells() if first.allocation is not None and first.seq in rows else None

    context.faults = without_room
    bench.run()
    assert isinstance(bench.ends[0], Failed)
    assert isinstance(bench.ends[1], Finished)


@pytest.mark.parametrize("unified", LAYOUTS)
def test_a_source_that_lost_cells_is_not_shared(monkeypatch: pytest.MonkeyPatch, unified: bool) -> None:
    """The prompt is computed again, as with a sliding window."""
    context = context_of(unified, 200)
    monkeypatch.setattr(context, "copy", lambda source, target, length: False)
    monkeypatch.setattr(context, "intact", lambda seq, length: False)
    context.window = 16
    bench = CoreBench(context)
    request = Request(prompt=tuple(range(1, 45)), max_tokens=3, ignore_eos=True)
    for key in range(2):
        bench.submit(key, request)
        bench.run()
    assert bench.outputs[0] == bench.outputs[1]
    assert context.computed == 2 * (44 + 2)


def test_an_idle_prefix_is_evicted_when_keeping_it_has_cost_enough() -> None:
    context = ToyContext(cells=2000)
    bench = CoreBench(context)
    idle = Request(prompt=tuple(range(1, 41)), max_tokens=1)
    bench.submit(0, idle)
    bench.run()
    bench.submit(1, Request(prompt=(45,), max_tokens=UNPRICED_STEPS - 5, ignore_eos=True))
    bench.run()
    before = context.computed
    bench.submit(2, idle)
    bench.run()
    assert context.computed == before + 1, "the prefix is still resident"
    bench.submit(3, Request(prompt=(46,), max_tokens=UNPRICED_STEPS + 100, ignore_eos=True))
    bench.run()
    before = context.computed
    bench.submit(4, idle)
    bench.run()
    assert context.computed == before + 40, "the prefix is evicted"


def test_with_per_slot_kv_an_idle_prefix_stays_until_its_slot_is_needed() -> None:
    context = context_of(False, 2000, slots=2)
    bench = CoreBench(context, slots=2)
    idle = Request(prompt=tuple(range(1, 41)), max_tokens=1)
    bench.submit(0, idle)
    bench.run()
    bench.submit(1, Request(prompt=(45,), max_tokens=2 * UNPRICED_STEPS, ignore_eos=True))
    bench.run()
    before = context.computed
    bench.submit(2, idle)
    bench.run()
    assert context.computed == before + 1


@pytest.mark.parametrize("unified", LAYOUTS)
def test_a_prompt_that_grows_by_a_token_each_time(unified: bool) -> None:
    """Requests resemble those of an editor: each diverges from the previous one at another token."""
    context = context_of(unified, 3000, rows=2048)
    bench = CoreBench(context, prompt_rows=2048)
    document = [1 + n % (VOCABULARY - 2) for n in range(1500)]
    for size in range(1, 1500, 1):
        bench.submit(size, Request(prompt=(*document[:size], VOCABULARY - 1), max_tokens=0))
        bench.core.step()
    bench.run()
    assert context.computed < 1500 * 3


def test_a_stop_string_counts_as_a_stop() -> None:
    bench = CoreBench(ToyContext())
    bench.submit(0, Request(prompt=(1,), ignore_eos=True))
    bench.core.step()
    bench.core.lifecycle.end(0, FinishReason.STOP)
    bench.run()
    assert bench.core.counters.finished == {"stop": 1, "length": 0, "cancelled": 0, "error": 0}


def test_probabilities_after_sampling_are_the_same_with_drafts() -> None:
    sampling = SamplingParams(temperature=0.9, top_k=6, top_p=1.0, min_p=0.0, presence_penalty=0.5, seed=5)
    request = Request(
        prompt=(1, 2, 3, 4), max_tokens=30, ignore_eos=True, sampling=sampling, logprobs=3, post_sampling=True
    )
    bench = CoreBench(context_of(True, 500), speculation=SpeculationConfig(order="fixed"))
    bench.submit(0, structs.replace(request, speculation=Speculation()))
    bench.run()
    bench.submit(1, structs.replace(request, prediction=tuple(bench.outputs[0])))
    bench.run()
    end = bench.ends[1]
    assert isinstance(end, Finished)
    assert end.usage.accepted > 0
    assert bench.logprobs[0] == bench.logprobs[1]
    for entry in bench.logprobs[0]:
        assert entry.logprob > float("-inf")
        assert len(entry.top) == 3
