"""Splits of a model among devices, the cells that fit them, and host work that overlaps a decode."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.backend import NoFreeCells
from engine.config import EngineConfig
from engine.contract import ModelError
from engine.llama import fit, library, open_gguf
from tests.conftest import MODEL

MIB = 2**20


def test_as_many_cells_as_fit_the_measured_memory() -> None:
    def measure(cells: int) -> dict[str, int]:
        return {"CUDA0": 100 * MIB + 1000 * cells, "CUDA1": 50 * MIB, "CUDA2": 80 * MIB + 4000 * cells}

    uses = fit.measure_memory(measure)
    assert uses["CUDA0"] == pytest.approx((100 * MIB, 1000))
    assert uses["CUDA1"] == pytest.approx((50 * MIB, 0))
    free = {"CUDA0": 1000 * MIB, "CUDA1": 100 * MIB, "CUDA2": 1000 * MIB}
    found = fit.fitting_cells(free, uses, dict.fromkeys(free, 10 * MIB), 10**6)
    assert found % 256 == 0
    assert all(measure(found)[device] <= free[device] - 10 * MIB for device in free)
    assert measure(found + 256)["CUDA2"] > free["CUDA2"] - 10 * MIB
    assert fit.fitting_cells(free, uses, {}, 8192) == 8192


def test_too_little_memory_is_an_error() -> None:
    uses = {"CUDA0": fit.MemoryUse(100 * MIB, 1000)}
    with pytest.raises(fit.TooLittleMemory, match="CUDA0 has 100 MiB free"):
        fit.fitting_cells({"CUDA0": 100 * MIB}, uses, {}, 8192)
    free = {"CUDA0": 105 * MIB}
    assert fit.fitting_cells(free, uses, {}, 8192, minimum=4096) == 5120
    with pytest.raises(fit.TooLittleMemory, match="too little for the 8192 cells of --fit-ctx"):
        fit.fitting_cells(free, uses, {}, 8192, minimum=8192)


def test_a_gpu_without_cells_may_be_full() -> None:
    """With `--device CUDA0`, the memory of CUDA1 does not matter."""
    uses = {"CUDA0": fit.MemoryUse(100 * MIB, 1000), "CUDA1": fit.MemoryUse(0, 0)}
    free = {"CUDA0": 9000 * MIB, "CUDA1": 300 * MIB}
    assert fit.fitting_cells(free, uses, fit.reserved_bytes("1024", free), 8192) == 8192
    assert fit.reserved_bytes("64, 32", ("a", "b", "c")) == {"a": 64 * MIB, "b": 32 * MIB, "c": 32 * MIB}


@pytest.mark.parametrize("proportions", ["a", "3,", "-1,2", "0,0", "inf", ",".join("1" * 99)])
def test_an_invalid_split_is_refused_before_the_load(proportions: str) -> None:
    config = EngineConfig.of(path=MODEL, tensor_split=proportions)
    with pytest.raises(ModelError, match=r"is not a tensor split: use up to \d+ numbers of 0 or more"):
        open_gguf(config, lambda share: None, lambda: True)


def test_a_split_has_the_librarys_format() -> None:
    library.initialize()
    assert library.parse_tensor_split("") is None
    assert list(library.parse_tensor_split("3,1"))[:2] == [3.0, 1.0]


def test_one_device_works_with_every_split() -> None:
    config = EngineConfig.of(path=MODEL, context=512, split_mode="none", tensor_split="1", fit="on")
    backend = open_gguf(config, lambda share: None, lambda: True)
    try:
        assert backend.context.cells == 512
    finally:
        backend.close()


def test_a_draft_model_on_its_own_device_is_not_split() -> None:
    fields = {"path": MODEL, "split_mode": "row", "tensor_split": "3,1", "main_gpu": 1, "fit": "on"}
    own = EngineConfig.of(draft={"path": "draft.gguf", "device": "CUDA1"}, **fields).for_draft_model(100).model  # type: ignore[arg-type]
    assert (own.split_mode, own.tensor_split, own.main_gpu, own.fit) == ("layer", "", 0, "off")
    shared = EngineConfig.of(draft={"path": "draft.gguf"}, **fields).for_draft_model(100).model  # type: ignore[arg-type]
    assert (shared.split_mode, shared.tensor_split, shared.main_gpu, shared.fit) == ("row", "3,1", 1, "off")


def test_host_work_runs_once_the_rows_have_cells(short_model: Path) -> None:
    config = EngineConfig.of(path=short_model, slots=2, context=512, kv_unified=True)
    backend = open_gguf(config, lambda share: None, lambda: True)
    context, done = backend.context, list[int]()
    context.batch.add(0, 0, [5, 6, 7], 0)
    assert len(context.decode(lambda: done.append(context.length(0)))) == 0
    assert done == [3]
    while context.length(0) < context.cells:
        context.batch.clear()
        context.batch.add(0, start := context.length(0), [5] * min(256, context.cells - start), 0)
        context.decode()
    context.batch.clear()
    context.batch.add(1, 0, [5], 1)
    with pytest.raises(NoFreeCells):
        context.decode(lambda: done.append(0))
    assert done == [3]
    backend.close()
