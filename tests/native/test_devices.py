"""How a model is shared out among devices, and how many cells fit them; what is done while a decode is computed."""

from __future__ import annotations

import pytest

from engine.backend import NoFreeCells
from engine.config import EngineConfig
from engine.contract import ModelError
from engine.llama import fit, library, open_gguf
from engine.llama.model import LlamaBackend
from tests.native.conftest import MODEL

MIB = 2**20


def test_what_cells_take_is_measured_and_as_many_as_fit_are_made() -> None:
    def taken(cells: int) -> dict[str, int]:
        return {"CUDA0": 100 * MIB + 1000 * cells, "CUDA1": 50 * MIB, "CUDA2": 80 * MIB + 4000 * cells}

    needed = fit.needs(taken)
    assert needed["CUDA0"] == pytest.approx((100 * MIB, 1000))
    assert needed["CUDA1"] == pytest.approx((50 * MIB, 0))
    free = {"CUDA0": 1000 * MIB, "CUDA1": 100 * MIB, "CUDA2": 1000 * MIB}
    found = fit.cells(free, needed, 10 * MIB, 10**6)
    assert found % 256 == 0
    assert all(taken(found)[device] <= free[device] - 10 * MIB for device in free)
    assert taken(found + 256)["CUDA2"] > free["CUDA2"] - 10 * MIB
    assert fit.cells(free, needed, 10 * MIB, 8192) == 8192


def test_too_little_memory_is_told() -> None:
    needed = {"CUDA0": fit.Need(100 * MIB, 1000)}
    with pytest.raises(fit.TooLittle, match="CUDA0 has 100 MiB free"):
        fit.cells({"CUDA0": 100 * MIB}, needed, 0, 8192)


def test_a_gpu_that_has_no_cells_may_be_full() -> None:
    """With `--device CUDA0`, what others have on CUDA1 is nobody's business."""
    needed = {"CUDA0": fit.Need(100 * MIB, 1000), "CUDA1": fit.Need(0, 0)}
    assert fit.cells({"CUDA0": 9000 * MIB, "CUDA1": 300 * MIB}, needed, 1024 * MIB, 8192) == 8192


@pytest.mark.parametrize("proportions", ["a", "3,", "-1,2", "0,0", "inf", ",".join("1" * 99)])
def test_no_split_is_told_before_anything_is_loaded(proportions: str) -> None:
    config = EngineConfig.of(path=MODEL, tensor_split=proportions)
    with pytest.raises(ModelError, match=r"is no split: give up to \d+ numbers from 0 on, as in 3,1"):
        open_gguf(config, lambda share: None, lambda: True)


def test_a_split_is_as_long_as_the_library_reads() -> None:
    library.start()
    assert library.split("") is None
    assert list(library.split("3,1"))[:2] == [3.0, 1.0]


def test_one_device_serves_however_the_model_is_to_be_split() -> None:
    config = EngineConfig.of(path=MODEL, context=512, split_mode="none", tensor_split="1", fit="on")
    backend = open_gguf(config, lambda share: None, lambda: True)
    try:
        assert backend.context.cells == 512
    finally:
        backend.close()


def test_a_draft_models_own_device_is_not_split_as_the_models_are() -> None:
    fields = {"path": MODEL, "split_mode": "row", "tensor_split": "3,1", "main_gpu": 1, "fit": "on"}
    own = EngineConfig.of(draft={"path": "draft.gguf", "device": "CUDA1"}, **fields).of_draft(100).model  # type: ignore[arg-type]
    assert (own.split_mode, own.tensor_split, own.main_gpu, own.fit) == ("layer", "", 0, "off")
    shared = EngineConfig.of(draft={"path": "draft.gguf"}, **fields).of_draft(100).model  # type: ignore[arg-type]
    assert (shared.split_mode, shared.tensor_split, shared.main_gpu, shared.fit) == ("row", "3,1", 1, "off")


def test_something_is_done_meanwhile_once_the_rows_have_cells(backend: LlamaBackend) -> None:
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
