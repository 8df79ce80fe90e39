"""Saved KV in both layouts on SmolLM2: blocks that are cut, joined and loaded elsewhere give the same logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from llama_cpp import llama_cpp as native
from numpy.typing import NDArray

from engine.backend import Context, Logits, NativeFault, NoFreeCells, State, StatePart
from engine.config import EngineConfig
from engine.llama import open_gguf, shift
from engine.llama.context import LlamaContext
from engine.llama.layout import KvLayout
from engine.llama.model import LlamaBackend
from engine.llama.params import context_params
from engine.llama.shift import FLOAT_TYPES, as_floats, equal_keys
from engine.llama.state import StateFormat
from tests.native.test_llama import feed

TYPES: dict[str, dict[str, str]] = {
    "F16": {"flash_attention": "off"},
    "flash F16": {"flash_attention": "on"},
    "flash F16 BF16": {"flash_attention": "on", "cache_type_v": "bf16"},
    "flash Q8_0": {"flash_attention": "on", "cache_type_k": "q8_0", "cache_type_v": "q8_0"},
}
TOKENS = [int(token) for token in np.random.default_rng(5).integers(100, 4000, 300)]
LENGTH, BLOCK_TOKENS = 45, 16


class ContextSample(NamedTuple):
    """A context, and the states and logits after it computed the first LENGTH tokens."""

    context: LlamaContext
    blocks: list[StatePart]
    whole: State
    expected: Logits
    """The logits of the row after these tokens."""


def opened(model: Path, unified: bool, **fields: Any) -> LlamaBackend:
    config = EngineConfig.of(path=model, slots=3, context=768, rows=128, kv_unified=unified, **fields)
    return open_gguf(config, lambda share: None, lambda: True)


@pytest.fixture(scope="module", params=list(TYPES))
def pair(request: pytest.FixtureRequest, short_model: Path) -> Iterator[dict[str, ContextSample]]:
    """Yields contexts of both layouts with the same types of cells."""
    fields = TYPES[request.param] | {"memory": {"reuse": 16}}
    backends = {"unified": opened(short_model, True, **fields), "per-slot": opened(short_model, False, **fields)}
    assert backends["unified"].info.layout == backends["per-slot"].info.layout
    yield {name: sample_of(backend) for name, backend in backends.items()}
    for backend in backends.values():
        backend.close()


def sample_of(backend: LlamaBackend) -> ContextSample:
    context = backend.context
    assert isinstance(context, LlamaContext)
    assert all(context.length(seq) == 0 for seq in range(context.sequences)), "the probe leaves nothing behind"
    feed(context, 0, 0, TOKENS[:LENGTH], 0)
    saved = blocks(context, 0)
    return ContextSample(context, saved, cut(context, 0, 0, LENGTH), next_logits(context, 0))


@pytest.fixture(params=["unified", "per-slot"])
def sample(pair: dict[str, ContextSample], request: pytest.FixtureRequest) -> ContextSample:
    """Returns a sample whose context has empty cells."""
    found = pair[request.param]
    found.context.clear()
    return found


def next_logits(context: Context, seq: int) -> Logits:
    """Returns the logits of a sequence's next row; the row is dropped afterwards."""
    length = context.length(seq)
    row: Logits = feed(context, seq, length, TOKENS[length : length + 1])[0]
    assert context.cut(seq, length)
    return row


def cut(context: Context, seq: int, start: int, end: int) -> State:
    snapshot = context.save(seq)
    assert snapshot is not None
    state = snapshot.cut(start, end)
    assert state is not None
    return state


def blocks(context: Context, seq: int) -> list[StatePart]:
    """Returns the whole state of a sequence in blocks of BLOCK_TOKENS tokens."""
    length = context.length(seq)
    spans = [(start, min(length, start + BLOCK_TOKENS)) for start in range(0, length, BLOCK_TOKENS)]
    return [StatePart(cut(context, seq, *span), *span) for span in spans]


def test_the_properties_of_a_context(sample: ContextSample) -> None:
    context = sample.context
    expected = (22, 768, 1) if context.unified else (3, 256, 3)
    assert (context.sequences, context.sequence_cells, context.streams) == expected
    assert context.cells == 768
    assert context.divisible
    assert context.shifts


def test_blocks_loaded_elsewhere_give_the_same_logits(sample: ContextSample) -> None:
    context = sample.context
    assert context.load(2, sample.blocks)
    assert (context.length(2), context.intact(2, LENGTH)) == (LENGTH, True)
    assert np.array_equal(cut(context, 2, 0, LENGTH), sample.whole)
    assert np.array_equal(next_logits(context, 2), sample.expected)


def test_parts_of_blocks_are_appended_to_a_sequence(sample: ContextSample) -> None:
    context, (first, second, third) = sample.context, (part.state for part in sample.blocks)
    assert context.load(1, [StatePart(first, 0, 16), StatePart(sample.whole, 16, 20)])
    assert context.length(1) == 20
    assert context.load(1, [StatePart(second, 20, 32), StatePart(third, 32, LENGTH)])
    assert np.array_equal(next_logits(context, 1), sample.expected)


def test_a_copy_has_the_same_logits_and_stays_when_its_source_changes(sample: ContextSample) -> None:
    context = sample.context
    assert context.load(0, sample.blocks)
    assert context.copy(0, 1, 30)
    assert context.cut(0, 30)
    expected = next_logits(context, 0)
    assert np.array_equal(next_logits(context, 1), expected)
    assert context.cut(0, 10)
    assert np.array_equal(next_logits(context, 1), expected)
    assert not context.copy(0, 2, 11), "the source has 10 positions"
    assert context.length(2) == 0
    assert context.copy(0, 2, 0)
    assert context.length(2) == 0


def test_rejected_rows_leave_no_trace(sample: ContextSample) -> None:
    context = sample.context
    assert context.load(0, sample.blocks)
    feed(context, 0, LENGTH, [5, 6, 7, 8, 9], 0)
    assert context.cut(0, LENGTH)
    assert np.array_equal(next_logits(context, 0), sample.expected)


def test_blocks_of_one_layout_load_in_the_other(pair: dict[str, ContextSample]) -> None:
    for source, target in (("unified", "per-slot"), ("per-slot", "unified")):
        context = pair[target].context
        context.clear()
        assert context.load(1, pair[source].blocks)
        assert np.array_equal(cut(context, 1, 0, LENGTH), pair[source].whole)
        assert np.array_equal(next_logits(context, 1), pair[source].expected)


def test_states_that_do_not_fit_are_refused_and_change_nothing(sample: ContextSample) -> None:
    context, (first, second, _) = sample.context, sample.blocks
    assert context.load(1, [first])
    foreign = second.state.copy()
    foreign[len(foreign) // 2 :] = 0
    states = second.state, foreign, second.state[:-1], np.zeros(3, np.uint8), np.zeros(1000, np.uint8)
    ends = 33, 32, 32, 32, 32
    wrong = [[StatePart(state, 16, end)] for state, end in zip(states, ends, strict=True)]
    for parts in (
        *wrong,
        [second, StatePart(foreign, 32, LENGTH)],
        [StatePart(second.state, 16, context.sequence_cells + 1)],
    ):
        assert not context.load(1, parts)
        assert np.array_equal(cut(context, 1, 0, 16), first.state)


def test_a_load_without_free_cells_changes_nothing(pair: dict[str, ContextSample]) -> None:
    context, saved = pair["unified"].context, pair["unified"].blocks
    context.clear()
    full = context.cells // LENGTH
    assert all(context.load(seq, saved) for seq in range(full))
    assert not context.load(full, saved)
    assert context.length(full) == 0
    context.cut(0, 0)
    assert context.load(full, saved)


def test_a_load_that_the_library_refuses_keeps_the_old_content(
    sample: ContextSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, saved = sample.context, sample.blocks
    assert context.load(0, saved[:2])
    refuse, work = [True], context.set_state

    def set_state(seq: int, state: State) -> bool:
        if refuse and refuse.pop():
            context.drop(seq)
            return False
        return work(seq, state)

    monkeypatch.setattr(context, "set_state", set_state)
    assert not context.load(0, saved[2:])
    assert context.length(0) == 32
    assert context.load(0, saved[2:])
    assert np.array_equal(next_logits(context, 0), sample.expected)
    if not context.unified:
        refuse[:] = [True, True]
        context.cut(0, 32)
        with pytest.raises(NativeFault, match="lost its 32 positions"):
            context.load(0, saved[2:])
        assert context.length(0) == 0


def test_rows_beyond_a_sequences_cells_and_foreign_ids_are_refused(sample: ContextSample) -> None:
    context = sample.context
    assert context.load(0, sample.blocks)
    with pytest.raises(NoFreeCells):
        feed(context, 1, context.sequence_cells, [5], 0)
    for seq in (-1, context.sequences, 300):
        with pytest.raises(NativeFault, match="sequence id"):
            feed(context, seq, 0, [5], 0)
        with pytest.raises(NativeFault, match="sequence id"):
            context.save(seq)
    if not context.unified:
        with pytest.raises(NativeFault, match="shared"):
            context._share(0, 1, 0, 10)
    assert context.save(2) is None, "the sequence is empty"
    assert [context.length(seq) for seq in range(3)] == [LENGTH, 0, 0]


def test_a_shifted_state_is_that_of_tokens_computed_there(sample: ContextSample) -> None:
    context, whole, by = sample.context, sample.whole, 117
    assert context.load(0, sample.blocks)
    moved = context.shift(whole, 0, LENGTH, by)
    assert moved is not None
    feed(context, 1, by, TOKENS[:LENGTH], 0)
    computed = cut(context, 1, by, by + LENGTH)
    before, ours, expected = (data_of(context, state) for state in (whole, moved, computed))
    assert np.array_equal(ours[1], before[1]), "values are not rotated"
    kind = form_of(context).key_type
    assert equal_keys(ours[0][:1], expected[0][:1], kind)
    if kind in FLOAT_TYPES:
        left, right = (as_floats(data[0], kind).ravel() for data in (ours, expected))
        assert np.corrcoef(left, right)[0, 1] > 0.999
        assert not equal_keys(before[0][:1], expected[0][:1], kind), "the shift changes the keys"
    assert np.array_equal(cut(context, 0, 0, LENGTH), whole), "no sequence changes"


def test_a_part_of_a_state_is_shifted_back(sample: ContextSample) -> None:
    context, whole = sample.context, sample.whole
    there = context.shift(whole, 10, 40, 200)
    assert there is not None
    back = context.shift(there, 210, 240, -200)
    cells = form_of(context).cells(sample.whole)
    kept = form_of(context).cut(cells, 10, 40)
    assert back is not None
    assert kept is not None
    assert equal_keys(data_of(context, back)[0], data_of(context, kept)[0], form_of(context).key_type)
    assert context.shift(whole, 0, LENGTH, -1) is None, "a position would be negative"
    assert context.shift(whole, 0, LENGTH + 1, 1) is None, "the state has fewer positions"


def form_of(context: LlamaContext) -> StateFormat:
    assert context._format is not None
    return context._format


def data_of(context: LlamaContext, state: State) -> list[NDArray[np.uint8]]:
    """Returns the keys and the values of all layers."""
    return form_of(context).cells(state).view.data


@pytest.mark.parametrize("scaling", [native.LLAMA_ROPE_SCALING_TYPE_LINEAR, native.LLAMA_ROPE_SCALING_TYPE_YARN])
def test_keys_that_the_library_would_scale_at_each_rotation_are_not_shifted(short_model: Path, scaling: int) -> None:
    """With YaRN each rotation multiplies the keys by a factor that must be applied only once."""
    config = EngineConfig.of(path=short_model, slots=2)
    params = context_params(config.model, config.batch, KvLayout(False, 512, ""), 2, 9, False)
    params.rope_scaling_type, params.rope_freq_scale, params.yarn_orig_ctx = scaling, 0.25, 2048
    backend = opened(short_model, False)
    context = LlamaContext(backend.model, params, partial=True, window=0, shifting=True)
    assert context.shifts is (scaling == native.LLAMA_ROPE_SCALING_TYPE_LINEAR)
    context.close()
    backend.close()


def test_shifts_use_the_rotations_of_the_serving_context(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"general.architecture": "phi3", "phi3.rope.scaling.original_context_length": "4096"}
    monkeypatch.setattr(shift, "metadata", lambda model, key: values.get(key, ""))
    assert [shift._rope_cells(None, cells) for cells in (4096, 4352)] == [0, 4097]
    values.clear()
    assert shift._rope_cells(None, 100_000) == 0
