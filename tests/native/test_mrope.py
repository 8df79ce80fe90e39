"""Images with M-RoPE, whose rows have positions in a grid: random models, compared with the library's own prefill. The
tests need a build with mtmd (`make serve VISION=1`)."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from llama_cpp import llama_cpp as native
from numpy.typing import NDArray

from engine import Engine, EngineConfig, Request, SamplingParams, Speculation, has_media_library
from engine.backend import StatePart
from engine.llama.context import LlamaContext
from engine.llama.model import LlamaBackend, open_gguf
from engine.llama.mtmd import LlamaProjector, open_projector
from engine.llama.row_positions import NO_IMAGES, RowPositions
from engine.media import MediaPrompt, MediaReader
from engine.step import EngineCore
from tests.native.test_engine import answer
from tests.native.tiny import WIDTH, delta_net, grid
from tests.native.tiny_mmproj import png, projector

if not has_media_library():
    pytest.skip("llama-cpp-python was built without mtmd: make serve VISION=1", allow_module_level=True)

KINDS = ["grid", "hybrid"]
# Attention in F32, which rounds equally in every batch.
EXACT = {"flash_attention": "off", "cache_type_k": "f32", "cache_type_v": "f32"}
LENGTH = 16
MARKER = "<__media__>"
ONE, TALL, WIDE = png(64, 48, 0), png(33, 150, 1), png(160, 96, 2)
FIRST = f"<|im_start|>user\nWhat is {MARKER}? Say it.<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = [
    (FIRST, [ONE]),
    (FIRST + f"A cat, I say.<|im_end|>\n<|im_start|>user\nAnd {MARKER}{MARKER}?<|im_end|>\n", [ONE, TALL, WIDE]),
    (f"{MARKER} is like {MARKER}, but not like " + MARKER + "".join(f" {n}," for n in range(40)), [TALL, WIDE, TALL]),
    ("No image at all.", []),
]


class Opened(NamedTuple):
    """A model and its projector."""

    backend: LlamaBackend
    projector: LlamaProjector

    @property
    def context(self) -> LlamaContext:
        assert isinstance(self.backend.context, LlamaContext)
        return self.backend.context

    def read(self, text: str, images: list[bytes]) -> MediaPrompt:
        reader = MediaReader(self.projector, self.backend.vocab)
        return reader.read(text.replace(MARKER, reader.marker), images)


def config(files: Path, kind: str, **fields: Any) -> EngineConfig:
    settings = {"slots": 3, "context": 3072, "calibrate": False, "threads": 1, **EXACT, **fields}
    return EngineConfig.of(path=files / f"{kind}.gguf", media={"path": str(files / "projector.gguf")}, **settings)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a model of each kind and a projector."""
    folder = tmp_path_factory.mktemp("mrope")
    grid(folder / "grid.gguf")
    delta_net(folder / "hybrid.gguf")
    projector(folder / "projector.gguf", WIDTH, "qwen2vl_merger")
    return folder


@pytest.fixture
def opened(files: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    """Opens a model and the projector; the parameter has the kind and the layout."""
    kind, unified = request.param
    chosen = config(files, kind, kv_unified=unified)
    backend = open_gguf(chosen, lambda share: None, lambda: True)
    image_projector = open_projector(chosen, backend)
    yield Opened(backend, image_projector)
    image_projector.close()
    backend.close()


def library_output(opened: Opened, text: str, images: list[bytes]) -> list[int]:
    """Returns the greedy output after the library has tokenized and decoded the prompt, as llama-server does."""
    mtmd, projector_handle, context = opened.projector._mtmd, opened.projector._handle, opened.context._handle
    chunks = mtmd.mtmd_input_chunks_init()
    buffers = [(ctypes.c_uint8 * len(image)).from_buffer_copy(image) for image in images]
    bitmaps = [mtmd.mtmd_helper_bitmap_init_from_buf(projector_handle, each, len(each), False) for each in buffers]
    given = mtmd.mtmd_input_text(text.encode(), len(text.encode()), True, True)
    array = (ctypes.c_void_p * len(bitmaps))(*bitmaps)
    assert not mtmd.mtmd_tokenize(projector_handle, chunks, ctypes.byref(given), array, len(bitmaps))
    at = native.llama_pos(0)
    assert not mtmd.mtmd_helper_eval_chunks(projector_handle, context, chunks, 0, 0, 512, True, ctypes.byref(at))
    output: list[int] = []
    while len(output) < LENGTH:
        logits = np.ctypeslib.as_array(native.llama_get_logits_ith(context, -1), (opened.backend.vocab.size,))
        if (token := int(logits.argmax())) in opened.backend.vocab.ends:
            break
        output.append(token)
        opened.context.batch.clear()
        opened.context.batch.add(0, at.value + len(output) - 1, [token], 1)
        opened.context._native_batch.n_tokens = 1
        assert not native.llama_decode(context, opened.context._native_batch)
    opened.context.clear()
    mtmd.mtmd_input_chunks_free(chunks)
    for bitmap in bitmaps:
        mtmd.mtmd_bitmap_free(bitmap)
    return output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unified", [True, False])
async def test_outputs_are_those_of_the_library(files: Path, kind: str, unified: bool) -> None:
    chosen = config(files, kind, kv_unified=True)
    backend = open_gguf(chosen, lambda share: None, lambda: True)
    reference = Opened(backend, open_projector(chosen, backend))
    wanted = [library_output(reference, *prompt) for prompt in PROMPTS]
    reference.projector.close()
    backend.close()
    assert len({tuple(each) for each in wanted}) == len(PROMPTS)
    speculation = {"order": "fixed", "types": ["auto"], "size_n": 2, "size_m": 4}
    async with Engine.open(config(files, kind, kv_unified=unified, speculation=speculation)) as engine:
        for fields in ({"speculation": Speculation(type=())}, {"salt": "drafts"}, {"salt": "drafts"}):
            requests = [_request(engine, *PROMPTS[at], wanted[at], **fields) for at in range(len(PROMPTS))]
            found = [await answer(engine, each) for each in requests]
            assert [ids for ids, _ in found] == wanted
            assert bool(sum(end.usage.accepted for _, end in found)) == ("salt" in fields)
            await engine.query(lambda core: core.kv.drop_idle())  # the third round restores the blocks of the second
        assert found[1][1].usage.cached >= len(requests[1].prompt) - 6
        together = await asyncio.gather(*(answer(engine, _request(engine, *prompt, [])) for prompt in PROMPTS))
        assert [ids for ids, _ in together] == wanted


def _request(engine: Engine, text: str, images: list[bytes], expected: list[int], **fields: Any) -> Request:
    assert engine.media is not None
    prompt = engine.media.read(text.replace(MARKER, engine.media.marker), images)
    predicted = tuple(token if at % 4 else 77 for at, token in enumerate(expected))
    sampling = SamplingParams(temperature=0)
    return Request(
        prompt=prompt.tokens, media=prompt.runs, max_tokens=LENGTH, sampling=sampling, prediction=predicted, **fields
    )


async def test_a_preempted_request_continues_after_its_images(files: Path) -> None:
    def preempt(core: EngineCore) -> None:
        for sequence in [*core.running.values()]:
            core.lifecycle.preempt(sequence, keep=False)

    async with Engine.open(config(files, "grid", memory={"ram": 0})) as engine:
        wanted, _ = await answer(engine, _request(engine, *PROMPTS[2], []))
        async with engine.generate(_request(engine, *PROMPTS[2], [], salt="other")) as updates:
            ids: list[int] = []
            async for update in updates:
                ids += getattr(update, "ids", ())
                if not engine.stats().preemptions:
                    await engine.query(preempt)
        assert ids == wanted
        assert engine.stats().preemptions == 1


def _continued(opened: Opened, prompt: MediaPrompt, seq: int) -> NDArray[np.float32]:
    """Computes the rows of `prompt` that `seq` lacks, images in two parts. Returns the logits of the last row."""
    context = opened.context
    for run in (*prompt.runs, None):
        at, end = context.length(seq), run.start if run is not None else len(prompt.tokens)
        if at < end:
            context.batch.clear()
            context.batch.add(seq, at, prompt.tokens[at:end], 1)
            logits: NDArray[np.float32] = context.decode()[0].copy()
        while run is not None and (at := context.length(seq)) < run.end:
            part = opened.projector.encode(run.chunk)[at - run.start :][: run.chunk.length // 2 + 1]
            opened.projector.decode(seq, at, part, run)
    return logits


@pytest.mark.parametrize("opened", [("grid", True), ("grid", False)], ids=["unified", "per-slot"], indirect=True)
def test_sequences_are_cut_copied_and_loaded_at_any_row(opened: Opened) -> None:
    prompt, context = opened.read(*PROMPTS[2]), opened.context
    wanted, length = _continued(opened, prompt, 0), len(prompt.tokens)
    first, _, last = prompt.runs
    assert context.row_positions[0].following < last.start, "images take fewer positions than rows"
    assert context.copy(0, 2, last.end - 4) is not context.unified, "cells of one position are shared together"
    context.cut(2, 0)
    assert context.copy(0, 1, last.end)
    assert np.array_equal(_continued(opened, prompt, 1), wanted)
    snapshot = context.save(0)
    assert snapshot is not None
    ends = [*range(0, length, 32), length]
    parts = [StatePart(snapshot.cut(*span), *span) for span in pairwise(ends)]  # type: ignore[arg-type]
    for cut in (length - 3, last.end - 4, last.start, first.start + 5):
        assert context.cut(1, cut)
        assert context.length(1) == cut
        assert np.array_equal(_continued(opened, prompt, 1), wanted)
    assert all(context.load(2, some) for some in (parts[:1], parts[1:3], parts[3:-1]))
    assert context.length(2) == parts[-1].start
    assert np.array_equal(_continued(opened, prompt, 2), wanted)
    context.cut(2, 0)
    assert context.load(2, [StatePart(parts[0].state, 0, 20), StatePart(parts[0].state, 20, 29)])
    assert not context.load(2, [StatePart(parts[1].state, 29, 40)]), "the block begins later"
    assert np.array_equal(_continued(opened, prompt, 2), wanted)


def test_positions_of_text_and_images() -> None:
    two_by_three = np.array([[2] * 6, [2, 2, 3, 3, 4, 4], [2, 3] * 3], np.int32)
    found = NO_IMAGES.extended(2, two_by_three[:, :3]).extended(5, two_by_three[:, 3:])
    assert [found.at(index) for index in range(11)] == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7]
    assert [found.count(last) for last in range(-1, 8)] == [0, 1, 2, 8, 8, 8, 9, 10, 11]
    assert [found.image_start(index) for index in (1, 2, 7, 8, 9)] == [1, 2, 2, 8, 9]
    assert [found.cut(length).at(length) for length in (0, 1, 2, 8, 9)] == [0, 1, 2, 5, 6]
    assert found.cut(2).is_trivial
    assert not found.is_trivial
    assert [found.continued_by(9, position) for position in (4, 5, 6, 7)] == [False, True, True, False]
    whole = np.concatenate((np.tile(np.arange(2, dtype=np.int32), (3, 1)), two_by_three), axis=1)
    again = RowPositions.of(whole[:, ::-1])
    assert (again.listed.tolist(), again.following) == ([0, 1] + 6 * [2], 5)
