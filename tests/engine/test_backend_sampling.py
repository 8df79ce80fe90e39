"""Tokens picked from those that the backend selects are those picked from all logits."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from engine import backend_picks
from engine.backend import HostWork, Logits, no_host_work
from engine.backend_picks import changed_counts
from engine.backend_sampling import SelectedTokens
from engine.contract import Request, SamplingParams
from engine.sampling import UNDECIDED, UNPICKED, RowCandidates, RowMaxima, Sampler, pick_candidates, pick_rows
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, Oracle, draw_request
from tests.sizes import sized
from tests.toy import VOCABULARY, Cell, ToyContext


class ToySelection:
    """Implements `engine.backend_sampling.BackendSampling`."""

    counts = (8, 46)

    def __init__(self) -> None:
        self.current: dict[int, int] = {}
        self.ids, self.logits = np.zeros((0, 46), np.int32), np.zeros((0, 46), np.float32)
        self.changes = self.rows = 0

    def change(self, counts: Mapping[int, int]) -> None:
        self.current = {seq: count for seq, count in (self.current | dict(counts)).items() if count}
        self.changes += 1

    def select(self, logits: Logits, ids: list[int]) -> None:
        """Keeps the most likely tokens of the rows of sequences with a count, whose logits become NaN."""
        self.ids, self.logits = np.full((len(ids), 46), -9, np.int32), np.full((len(ids), 46), 1e9, np.float32)
        for row, count in enumerate(map(self.current.get, ids)):
            if count:
                best = np.random.default_rng(0).permutation((-logits[row]).argsort()[:count])
                self.ids[row, :count], self.logits[row, :count] = best, logits[row, best]
                logits[row] = np.nan
                self.rows += 1

    def selected(self, rows: int) -> SelectedTokens:
        assert rows == len(self.ids)
        return SelectedTokens(self.ids, self.logits)


class SelectingToy(ToyContext):
    """A toy with backend sampling, whose logits have ties if `digits` is 0."""

    def __init__(self, digits: int, *, selects: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.digits = digits
        self.backend_sampling = self.selection = ToySelection() if selects else None
        self.alternatives = 0 if selects else self.alternatives

    def _logits(self, held: dict[int, Cell], pos: int) -> Logits:
        rounded: Logits = np.round(super()._logits(held, pos), self.digits)
        return rounded

    def decode(self, host_work: HostWork = no_host_work) -> Logits:
        logits = super().decode(host_work)
        if self.selection is not None:
            batch = self.batch
            self.selection.select(logits, batch.seq[: batch.rows][batch.output[: batch.rows] > 0].tolist())
        return logits


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("digits", [0, 7], ids=["ties", "no-ties"])
@pytest.mark.parametrize("seed", range(sized(2, 100)))
def test_backend_sampling_changes_no_token(
    seed: int, digits: int, unified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_picks, "CHANGE_STEPS", 3)
    random = Random(seed)
    cells = random.choice([90, 300])
    context = SelectingToy(digits, cells=cells, sequences=12 if unified else 4, unified=unified, outputs=16)
    bench = CoreBench(context, prompt_rows=random.choice([1, 5, 100]))
    prefixes = [[random.randrange(1, VOCABULARY) for _ in range(40)] for _ in range(3)]
    wanted: dict[int, list[int]] = {}
    for key in range(14):
        request = draw_request(random, prefixes, 60)
        if key % 3 == 0:  # needs few candidates
            sampling = SamplingParams(top_k=random.choice([1, 4, 5]), temperature=1.5, seed=key)
            request = structs.replace(request, sampling=sampling)
        if key == 7:
            request = structs.replace(request, logprobs=2)
        alone = CoreBench(SelectingToy(digits, selects=False, cells=cells), slots=1)
        alone.submit(0, request)
        alone.run()
        wanted[key] = alone.outputs[0]
        bench.submit(key, request, Oracle(request, wanted[key], 0.3, random) if random.random() < 0.5 else None)
        for _ in range(random.randint(0, 6)):
            bench.core.step()
            bench.check()
    bench.run()
    assert bench.outputs == wanted
    assert context.selection is not None
    assert context.selection.rows > 20, "tokens were picked from selected ones"
    assert context.selection.changes > 1, "some requests needed all logits"


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 2.5]),
    top_k=st.sampled_from([1, 3, 40, 255]),
    top_p=st.sampled_from([0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.4]),
)


@given(params=st.lists(PARAMS, min_size=1, max_size=5), seed=st.integers(0, 2**40), ties=st.booleans())
def test_decided_rows_have_the_tokens_of_all_logits(params: list[SamplingParams], seed: int, ties: bool) -> None:
    source = np.random.default_rng(seed)
    rows = source.normal(0.0, 3.0, (len(params), 600)).astype(np.float32)
    if ties:
        rows = (np.round(rows * 2) / 2).astype(np.float32)
    bans = source.integers(0, 600, 3)
    best = (-rows).argsort(axis=1)[:, :320]
    selected = SelectedTokens(best.astype(np.int32), np.take_along_axis(rows, best, axis=1))
    counts = [64 if each.top_k < 60 else 320 for each in params]
    known = np.arange(320) < np.array(counts)[:, None]
    rows[:, bans] = -np.inf
    samplers = [
        Sampler(Request(prompt=(0,), sampling=each), seed + i, frozenset(), bytes) for i, each in enumerate(params)
    ]
    assert all(0 < sampler.num_candidates < count for sampler, count in zip(samplers, counts, strict=True))
    row_params = [sampler.row_params for sampler in samplers]
    positions = list(range(len(params)))
    expected = pick_rows(RowMaxima(rows), row_params, positions)
    candidates = RowCandidates(selected, known, known & np.isin(best, bans))
    tokens = pick_candidates(candidates, [each for each in row_params if each is not None], positions)
    assert all(token in (UNDECIDED, wanted) for token, wanted in zip(tokens, expected, strict=True))
    if not ties:
        assert tokens == expected


def test_rows_with_nan_have_no_token() -> None:
    logits = np.array([[1.0, np.nan, 0.5], [2.0, 1.0, 0.5]], np.float32)
    selected = SelectedTokens(np.array([[4, 5, 6], [4, 5, 6]], np.int32), logits)
    sampler = Sampler(Request(prompt=(0,), sampling=SamplingParams(temperature=0.0)), 0, frozenset(), bytes)
    assert sampler.row_params is not None
    candidates = RowCandidates(selected, np.ones((2, 3), np.bool_), np.zeros((2, 3), np.bool_))
    assert pick_candidates(candidates, [sampler.row_params] * 2, [0, 1]) == [UNPICKED, 4]


@pytest.mark.parametrize(
    ("params", "needed"),
    [
        ({}, 41),
        ({"temperature": 0.0}, 2),
        ({"top_k": 0}, 0),
        ({"top_k": 256}, 257),
        ({"repeat_penalty": 1.1}, 0),
        ({"logit_bias": ((3, 1.0),)}, 0),
        ({"dry_multiplier": 0.8}, 0),
        ({"top_n_sigma": 1.0}, 0),
        ({"typical_p": 0.9}, 0),
        ({"mirostat": 2}, 0),
        ({"adaptive_target": 0.5}, 0),
    ],
)
def test_the_parameters_determine_the_number_of_candidates(params: dict[str, Any], needed: int) -> None:
    request = Request(prompt=(0,), sampling=SamplingParams(**params))
    assert Sampler(request, 0, frozenset(), bytes).num_candidates == needed
    banning = structs.replace(request, ignore_eos=True)
    assert Sampler(banning, 0, frozenset((5, 6)), bytes).num_candidates == (needed and needed + 2)


def test_a_change_is_made_when_it_must_be_or_rarely() -> None:
    selection = ToySelection()
    assert changed_counts({0: 2, 1: 0, 2: 40, 3: 99}, selection, add=True) == {0: 8, 2: 46}
    assert changed_counts({0: 2}, selection, add=False) == {}
    selection.change({0: 8, 2: 46})
    assert changed_counts({0: 8, 1: 0, 2: 2}, selection, add=True) == {}
    assert changed_counts({0: 0, 1: 5}, selection, add=False) == {0: 0, 1: 8}
    assert changed_counts({0: 9, 2: 99}, selection, add=False) == {0: 46, 2: 0}
