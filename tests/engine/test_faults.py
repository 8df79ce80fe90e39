"""Faults are contained: under a random load an exception raised at any named point ends at most the request that it
belongs to, and every other request has the tokens that it gets alone."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine.backend import NativeFault, NoFreeCells
from engine.contract import Failed, Finished, FinishReason, Request, SamplingParams, Tokens
from engine.generation import Generation
from engine.grammar import Matcher, Regex
from engine.grammar import masks as mask_module
from engine.kv import Offload
from engine.kv import disk as disk_module
from engine.kv.disk import Disk
from engine.outbox import StepOutput
from engine.speculate import Draft
from tests.engine.delivering import DeliveringBench
from tests.engine.test_grammar_exact import alone as alone_with_pairs
from tests.engine.test_grammar_exact import draw_constrained
from tests.engine.test_same_as_alone import IMAGES, LAYOUTS, CoreBench, Oracle, alone, context_of, draw_request
from tests.engine.vocabularies import PAIRS, bytes_of, grammar
from tests.sizes import sized
from tests.toy import VOCABULARY, ToyContext

# Points at which a fault ends the drafts of a request, or the request itself.
PROPOSER_POINTS = ("begin", "propose", "observe", "end")
REQUEST_POINTS = ("sample", "adjust", "append", "proposers")
# The same for requests with a grammar.
MATCHER_POINTS = ("accept", "recover", "mask")
# Methods of a generation. A fault fails the generation, and cancels its request.
DELIVERY_POINTS = ("_piece", "deliver_tokens", "deliver_end")
# Faults of a decode. Each ends at most the requests of its step.
DECODE_FAULTS: dict[str, type[Exception]] = {"cells": NoFreeCells, "native": NativeFault}
POINTS = (*PROPOSER_POINTS, *REQUEST_POINTS, *MATCHER_POINTS, *DELIVERY_POINTS, *DECODE_FAULTS, "")


class Injected(Exception):
    """The fault of these tests."""


class FaultyOracle(Oracle):
    """An oracle whose method `point` raises with probability `chance`."""

    def __init__(self, point: str, chance: float, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._point, self._chance = point, chance

    def _raise_at(self, point: str) -> None:
        if point == self._point and self.random.random() < self._chance:
            raise Injected(point)

    def begin(self, tokens: Sequence[int]) -> None:
        self._raise_at("begin")
        super().begin(tokens)

    def propose(self, limit: int) -> Draft:
        self._raise_at("propose")
        return super().propose(limit)

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        self._raise_at("observe")
        super().observe(emitted, drafted, accepted)

    def end(self) -> None:
        self._raise_at("end")
        super().end()


def fault_with(random: Random, fault: type[Exception] | None) -> Callable[[object], Exception | None]:
    """Returns the faults of decodes, of which one in ten has a `fault`."""
    return lambda _: fault("injected") if fault is not None and random.random() < 0.1 else None


def break_disk(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a third of the writes fail, as on a full or failing disk, a third take long, and damages some files."""
    save, wait = disk_module._save, time.sleep

    def faulty(path: Path, *content: Any) -> int:
        match random.randrange(6):
            case 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            case 1:
                raise OSError(errno.EIO, "Input/output error")
            case 2 | 3:
                wait(0.001)
        size = save(path, *content)
        if random.random() < 0.2:
            path.write_bytes(path.read_bytes()[: size // 2])
        return size

    monkeypatch.setattr(disk_module, "_save", faulty)
    monkeypatch.setattr(disk_module, "WRITE_PAUSE_SECONDS", 0.0)


def break_masks(monkeypatch: pytest.MonkeyPatch) -> dict[Matcher, int]:
    """Returns an empty map. Masks that include a matcher in it raise once that has accepted as many tokens."""
    fill, broken = mask_module.fill_bitmasks, dict[Matcher, int]()

    def faulty(bitmasks: mask_module.Bitmasks, jobs: list[mask_module.MaskJob]) -> None:
        natives = {id(native) for native, *_ in jobs}
        if any(id(each.native) in natives and len(each._tokens) >= count for each, count in broken.items()):
            raise Injected("mask")
        fill(bitmasks, jobs)

    monkeypatch.setattr(mask_module, "fill_bitmasks", faulty)
    return broken


def break_calls(owner: Any, name: str, countdown: int) -> None:
    """Makes the call number `countdown` of a method, and all later ones, raise."""
    method, left = getattr(owner, name), [countdown]

    def call(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Injected(name)
        return method(*arguments, **options)

    setattr(owner, name, call)


def break_sequence(sequence: Any, point: str, countdown: int, broken_masks: dict[Matcher, int]) -> None:
    """Makes the call number `countdown` at a point of the sequence raise. `observe` of its proposers follows the change
    of the KV cells."""
    if point == "mask":
        broken_masks[sequence.matcher] = countdown
        return
    owner, name = {
        "sample": (sequence.sampler, "sample"),
        "adjust": (sequence.sampler, "adjust"),
        "append": (sequence, "append"),
        "proposers": (sequence.proposers, "observe"),
        "accept": (sequence.matcher, "accept_token"),
        "recover": (sequence.matcher, "recover"),
    }[point]
    break_calls(owner, name, countdown)


class FaultyLoad:
    """Submits requests with faults at random points, with steps in between, and compares the outputs at the end."""

    def __init__(self, bench: DeliveringBench, random: Random, cells: int, broken_masks: dict[Matcher, int]) -> None:
        self._bench, self._random, self._cells, self._broken_masks = bench, random, cells, broken_masks
        self._prefixes = [[random.randrange(1, VOCABULARY) for _ in range(40)] for _ in range(3)]
        self._wanted: dict[int, tuple[list[int], FinishReason]] = {}
        self._broken: set[int] = set()
        self._undelivered: set[int] = set()

    def submit(self) -> None:
        random, bench = self._random, self._bench
        point = random.choice(POINTS)
        if point in MATCHER_POINTS or random.random() < 0.3:
            request, _ = draw_constrained(random, self._prefixes)
        else:
            request = draw_request(random, self._prefixes, self._cells, IMAGES)
        wanted = alone_with_pairs(request, self._cells)
        key = bench.enter(request, FaultyOracle(point, random.choice([0.2, 1.0]), request, wanted[0], 0.3, random))
        self._wanted[key] = wanted
        if point in (*REQUEST_POINTS, *MATCHER_POINTS):
            break_sequence(bench.sequences[key], point, random.randrange(6), self._broken_masks)
            self._broken.add(key)
        if point in DELIVERY_POINTS:
            break_calls(bench.generations[key], point, 0 if point == "deliver_end" else random.randrange(6))
            self._undelivered.add(key)
        bench.backend.context.faults = fault_with(random, DECODE_FAULTS.get(point))

    def compare(self) -> None:
        """Asserts one terminal update of each request, and the tokens and texts of those without faults."""
        assert self._bench.engine._generations == {}, "each has a terminal update"
        for key, (tokens, reason) in self._wanted.items():
            output, end, received = self._bench.outputs[key], self._bench.ends[key], self._bench.received(key)
            if isinstance(end, Failed):
                assert key in self._broken or "no free cell" in str(end.error) or "injected" in str(end.error)
                assert output == tokens[: len(output)]
                assert received.error is not None
            elif key in self._undelivered and received.error is not None:
                assert "The request has failed" in str(received.error)
                assert output == tokens[: len(output)]
            else:
                assert (output, end.reason) == (tokens, reason)
                assert (received.ids, received.text) == (tokens, bytes_of(tokens, PAIRS).decode())
                assert received.end is not None
                assert received.end.reason is reason


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("seed", range(sized(21, 420)))
def test_a_fault_at_any_point_stays_with_its_request(
    seed: int, unified: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    random = Random(seed)
    cells = random.choice([64, 90, 300])
    context = context_of(unified, cells, sequences=random.choice([5, 12]), rows=random.choice([16, 64]), outputs=16)
    disk = Disk(tmp_path, "toy") if seed % 3 == 0 else None
    offload = Offload(random.choice([0, 5000]), disk=disk, disk_bytes=50_000) if disk else None
    break_disk(Random(seed), monkeypatch)
    clock = [0.0]
    monkeypatch.setattr("engine.step.time.perf_counter", lambda: clock[0])
    settings: dict[str, Any] = {
        "prompt_rows": random.choice([1, 5, 100]),
        "offload": offload,
        "offloaded": seed % 2 == 1,
        "media_bytes": 400,
    }
    with closing(DeliveringBench(context, faulty=True, **settings)) as bench:
        load = FaultyLoad(bench, random, cells, break_masks(monkeypatch))
        for _ in range(12):
            load.submit()
            for _ in range(random.randint(0, 6)):
                clock[0] += random.choice([0.0, 0.01, 1e6, -1e3])  # jumps forwards and back
                bench.step()
        bench.run()
        load.compare()
        bench.core.kv.drop_idle()
        assert context.used() == 0


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("point", [*REQUEST_POINTS, *MATCHER_POINTS])
def test_a_fault_at_a_point_ends_its_request_only(point: str, offloaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingParams(temperature=0.0, repeat_penalty=1.3)
    regex = grammar(Regex("[A-H]{9,30}"), PAIRS)
    request = Request(prompt=(1, 2, 3), max_tokens=20, grammar=regex, sampling=sampling)
    tokens, _ = alone_with_pairs(request)
    broken_masks = break_masks(monkeypatch)
    with closing(DeliveringBench(ToyContext(cells=300), faulty=True, offloaded=offloaded)) as bench:
        first, second = (bench.enter(request, Oracle(request, tokens, 0.3, Random(key))) for key in range(2))
        break_sequence(bench.sequences[first], point, 2, broken_masks)
        bench.run()
        assert isinstance(bench.ends[first], Failed)
        assert 0 < len(bench.outputs[first]) < len(tokens)
        assert bench.received(second).ids == tokens


def test_a_native_fault_ends_the_requests_of_its_step_only() -> None:
    bench = CoreBench(context_of(False, 90))
    first, later = Request(prompt=(1, 2, 3), max_tokens=8), Request(prompt=(4, 5), max_tokens=8)
    bench.submit(0, first)
    bench.backend.context.faults = lambda _: NativeFault("injected")
    bench.core.step()
    bench.backend.context.faults = lambda _: None
    bench.submit(1, later)
    bench.run()
    assert isinstance(bench.ends[0], Failed)
    assert bench.outputs[1] == alone(later, 90)[0]


async def test_a_delivery_that_raises_fails_its_generation_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[Generation] = []

    def piece(token: int) -> bytes:
        if token == 13:
            raise Injected
        return b"x"

    generation = Generation(Request(prompt=(1,)), piece, lambda _: None, cancelled.append)
    assert generation.deliver(StepOutput(1, [5], (), None))
    assert not generation.deliver(StepOutput(1, [13], (), None))
    update = await anext(generation)
    assert isinstance(update, Tokens)
    with pytest.raises(Exception, match="The request has failed"):
        await anext(generation)


def test_a_proposer_that_fails_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    bench = CoreBench(context_of(False, 90), faulty=True)
    request = Request(prompt=(1, 2, 3), max_tokens=8)
    bench.submit(0, request, FaultyOracle("propose", 1.0, request, alone(request, 90)[0], 0.0, Random(1)))
    bench.run()
    end = bench.ends[0]
    assert isinstance(end, Finished)
    assert bench.outputs[0] == alone(request, 90)[0]
    assert [drafts.failures for drafts in end.drafts] == [1]
    assert "a proposer of type oracle failed" in caplog.text
