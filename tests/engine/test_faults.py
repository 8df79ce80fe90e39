"""Faults are contained: under a random load an exception raised at any named point ends at most the request that it
belongs to, and every other request has the tokens that it gets alone."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine.backend import NativeFault, NoFreeCells
from engine.contract import Failed, Finished, FinishReason, Request, Tokens
from engine.generation import Generation
from engine.kv import Offload
from engine.kv import disk as disk_module
from engine.kv.disk import Disk
from engine.outbox import StepOutput
from engine.speculate import Draft
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, Oracle, alone, context_of, draw_request
from tests.sizes import sized
from tests.toy import VOCABULARY

# Points at which a fault ends the drafts of a request, or the request itself.
PROPOSER_POINTS = ("begin", "propose", "observe", "end")
REQUEST_POINTS = ("pick", "append", "proposers")
# Faults of a decode. Each ends at most the requests of its step.
DECODE_FAULTS: dict[str, type[Exception]] = {"cells": NoFreeCells, "native": NativeFault}


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


def break_sequence(sequence: Any, point: str, countdown: int) -> None:
    """Makes the call number `countdown` of a method of the sequence raise: the sampler's `pick`, `append` of a token,
    or `observe` of its proposers, which follows the change of the KV cells."""
    owner, name = {
        "pick": (sequence.sampler, "pick"),
        "append": (sequence, "append"),
        "proposers": (sequence.proposers, "observe"),
    }[point]
    method, left = getattr(owner, name), [countdown]

    def call(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Injected(point)
        return method(*arguments, **options)

    setattr(owner, name, call)


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
    bench = CoreBench(context, prompt_rows=random.choice([1, 5, 100]), faulty=True, offload=offload)
    clock = [0.0]
    monkeypatch.setattr("engine.step.time.perf_counter", lambda: clock[0])
    prefixes = [[random.randrange(1, VOCABULARY) for _ in range(40)] for _ in range(3)]
    wanted: dict[int, tuple[list[int], FinishReason]] = {}
    broken: set[int] = set()
    for key in range(12):
        request = draw_request(random, prefixes, cells)
        wanted[key] = alone(request, cells)
        point = random.choice([*PROPOSER_POINTS, *REQUEST_POINTS, *DECODE_FAULTS, ""])
        oracle = FaultyOracle(point, random.choice([0.2, 1.0]), request, wanted[key][0], 0.3, random)
        bench.submit(key, request, oracle)
        if point in REQUEST_POINTS:
            break_sequence(bench.sequences[key], point, random.randrange(6))
            broken.add(key)
        context.faults = fault_with(random, DECODE_FAULTS.get(point))
        for _ in range(random.randint(0, 6)):
            clock[0] += random.choice([0.0, 0.01, 1e6, -1e3])  # jumps forwards and back
            bench.core.step()
            bench.check()
    bench.run()
    for key, (tokens, reason) in wanted.items():
        end = bench.ends[key]
        if isinstance(end, Failed):
            assert key in broken or "no free cell" in str(end.error) or "injected" in str(end.error)
            assert bench.outputs[key] == tokens[: len(bench.outputs[key])]
        else:
            assert (bench.outputs[key], end.reason) == (tokens, reason)
    bench.core.kv.drop_idle()
    assert context.used() == 0
    bench.core.kv.close()


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
