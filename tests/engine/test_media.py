"""Images in prompts: with a toy projector, each output is the same as if the request ran alone."""

from __future__ import annotations

import io
import wave
import zlib
from collections.abc import Sequence
from random import Random
from typing import Any, cast

import numpy as np
import pytest
from msgspec import structs

from engine.adapters import uncached_namespace
from engine.backend import NativeFault, NoFreeCells
from engine.config import SpeculationConfig
from engine.contract import Failed, FinishReason, Request, RequestRefused, SamplingParams
from engine.media import (
    MAX_FILE_BYTES,
    Embeddings,
    MediaChunk,
    MediaEncoder,
    MediaPiece,
    MediaReader,
    MediaRun,
    UnreadableMedia,
    WantedRun,
    content_key,
    pseudo_tokens,
    without_runs,
)
from engine.media.file_check import check_file
from engine.validation import TokenCheck
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, Oracle, context_of
from tests.native.tiny_mmproj import png, png_of
from tests.sizes import sized
from tests.toy import VOCABULARY, Cell, ToyContext, ToyVocab


class ToyChunk:
    """An image whose embeddings are `tokens`, ids that no text has."""

    def __init__(self, tokens: Sequence[int], *, causal: bool = True) -> None:
        self.tokens = tokens
        self.length = len(tokens)
        self.causal = causal


class ToyProjector:
    """Implements `engine.media.Projector` for a toy context."""

    vision, audio, identity = True, False, b"toy"

    def __init__(self, context: ToyContext | None = None) -> None:
        self.context = context
        self.encodings = 0
        self.faulty = False
        self.closed = False

    def read(self, data: bytes) -> Sequence[MediaPiece]:
        """Returns an opening token, an image that depends on the number of bytes, and a closing token."""
        return [[48], ToyChunk(range(100 + len(data) % 50, 110 + len(data) % 50)), [49]]

    def encode(self, chunk: MediaChunk) -> Embeddings:
        """Returns one row for each embedding: its token, its index, and the length of the chunk."""
        assert isinstance(chunk, ToyChunk)
        self.encodings += 1
        if self.faulty:
            raise NativeFault("injected")
        rows = [(token, index, chunk.length) for index, token in enumerate(chunk.tokens)]
        return np.array(rows, np.float32)

    def decode(self, seq: int, start: int, embeddings: Embeddings, run: MediaRun) -> None:
        """Appends one cell for each embedding. Asserts the start, and that only causal images are divided."""
        context = self.context
        assert context is not None
        assert context.length(seq) == start, "the image continues the sequence"
        if not run.chunk.causal:
            assert embeddings[-1, 1] == embeddings[-1, 2] - 1, "the image is decoded up to its end"
        used = context.used() if context.unified else start
        if used + len(embeddings) > (context.cells if context.unified else context.sequence_cells):
            raise NoFreeCells
        free = context._free_cells(context.held if context.unified else [context.held[seq]])
        for at, row in enumerate(embeddings):
            context.held[seq][start + at] = Cell(int(row[0]), next(free))
        context.droppable.clear()

    def close(self) -> None:
        """Records the call."""
        self.closed = True


def request_of(prompt: Sequence[int | ToyChunk], **fields: Any) -> Request:
    """Returns a request whose prompt has images among its tokens."""
    tokens, runs = list[int](), list[MediaRun]()
    for part in prompt:
        if isinstance(part, int):
            tokens.append(part)
        else:
            run = MediaRun(len(tokens), content_key(b"toy", bytes(part.tokens), 0), part)
            runs.append(run)
            tokens += pseudo_tokens(run.key, part.length)
    return Request(prompt=tuple(tokens), media=tuple(runs), **fields)


def bench_of(context: ToyContext, slots: int = 4, capacity: int = 10**6, **settings: Any) -> CoreBench:
    """Returns an engine core with a toy projector."""
    return CoreBench(context, slots, encoder=MediaEncoder(ToyProjector(context), capacity), **settings)


def projector_of(bench: CoreBench) -> ToyProjector:
    """Returns the projector of a core."""
    return cast("ToyProjector", cast("Any", bench.core)._media._encoder.projector)


def run(bench: CoreBench) -> None:
    """Runs all requests to their ends, and ends the encoding thread."""
    bench.run()
    cast("Any", bench.core)._media._encoder.close()


def alone(request: Request, cells: int) -> list[int]:
    """Returns the tokens of a request that runs alone."""
    bench = bench_of(ToyContext(cells=cells), slots=1)
    bench.submit(0, request)
    run(bench)
    return bench.outputs[0]


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("seed", range(sized(8, 300)))
def test_outputs_are_the_same_as_alone(seed: int, unified: bool) -> None:
    random = Random(seed)
    cells = random.choice([100, 300])
    max_rollback = 3 if seed % 4 == 0 else None
    context = context_of(unified, cells, rows=random.choice([16, 64]), outputs=16, max_rollback=max_rollback)
    bench = bench_of(
        context, prompt_rows=random.choice([1, 5, 100]), ram=random.choice([0, 10**6]), capacity=random.choice([0, 400])
    )
    chance = random.choice([0.0, 0.0, 0.1])
    context.faults = lambda _: NoFreeCells() if random.random() < chance else None
    images = [ToyChunk(range(first, first + 5 * at + 3), causal=at % 2 == 0) for at, first in enumerate((60, 80, 110))]
    texts = [[random.randrange(1, VOCABULARY) for _ in range(20)] for _ in range(2)]
    wanted: dict[int, list[int]] = {}
    cancelled: set[int] = set()
    for key in range(10):
        parts: list[int | ToyChunk] = [*random.choice(texts)[: random.randint(0, 12)]]
        for _ in range(random.randint(0, 2)):
            parts += [random.choice(images), *random.choice(texts)[: random.randint(0, 3)]]
        sampling = SamplingParams(temperature=random.choice([0.0, 1.0]), seed=key, repeat_penalty=1.2)
        request = request_of([*parts, 7], max_tokens=random.randint(1, 25), sampling=sampling)
        wanted[key] = alone(request, cells)
        text = structs.replace(request, prompt=tuple(without_runs(request.prompt, request.media)), media=())
        bench.submit(key, request, Oracle(text, wanted[key], 0.3, random) if random.random() < 0.5 else None)
        for _ in range(random.randint(0, 6)):
            bench.core.step()
            bench.check()
        if random.random() < 0.15:
            victim = random.randrange(key + 1)
            bench.core.lifecycle.end(victim, FinishReason.CANCELLED)
            cancelled.add(victim)
        if bench.core.running and random.random() < 0.15:
            bench.core.lifecycle.preempt(random.choice(list(bench.core.running.values())))
    run(bench)
    for key, tokens in wanted.items():
        end = bench.ends[key]
        assert not isinstance(end, Failed) or chance, "a request fails only if decodes fail"
        whole = key not in cancelled and not isinstance(end, Failed)
        assert bench.outputs[key] == (tokens if whole else tokens[: len(bench.outputs[key])])
    assert context.used() == bench.core.kv.used_cells


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("head", [False, True], ids=["draft-model", "mtp"])
def test_batched_proposers_draft_after_an_image(head: bool, unified: bool) -> None:
    draft = None if head else context_of(unified, 300)
    speculation = SpeculationConfig(types=("draft-mtp" if head else "draft",), order="fixed")
    context = context_of(unified, 300, head=head)
    bench = bench_of(context, draft=draft, mtp=head, speculation=speculation, noise="shared")
    image, sampled = ToyChunk(range(60, 90)), SamplingParams(temperature=1.0, seed=3)
    requests = [request_of([1, 2, image, 3, image, key], max_tokens=30, sampling=sampled) for key in (4, 5)]
    for key, request in enumerate(requests):
        bench.submit(key, request)
    run(bench)
    assert [bench.outputs[key] for key in range(2)] == [alone(request, 300) for request in requests]
    (stats,) = bench.speculative_decoding.draft_stats
    assert stats.drafted
    assert stats.accepted or not head, "the toy draft model does not know the image, on which the next token depends"


def test_one_image_in_two_turns_is_encoded_once_and_not_across_salts() -> None:
    context = ToyContext(cells=300)
    bench = bench_of(context)
    image = ToyChunk(range(60, 90))
    for key, salt in enumerate(["", "", "other"]):
        bench.submit(key, request_of([1, 2, image, *range(3, 5 + key)], max_tokens=4, salt=salt))
        bench.run()
    cached = [cast("Any", bench.ends[key]).usage.cached for key in range(3)]
    assert cached == [0, 34, 0]
    assert projector_of(bench).encodings == 2


@pytest.mark.parametrize(
    ("priorities", "timeouts", "preempted"),
    [
        pytest.param((1, 0, 0), (None, None, None), 0, id="priority"),
        pytest.param((0, 0, 0), (600.0, 900.0, 600.0), 1, id="deadline"),
        pytest.param((0, 0, 0), (None, 600.0, 900.0), 0, id="no-deadline"),
        pytest.param((0, 0, 1), (None, None, None), 2, id="itself"),
        pytest.param((0, 0, 0), (None, None, None), 2, id="last-start"),
    ],
)
def test_an_image_without_cells_preempts_the_least_urgent_sequence(
    priorities: Sequence[int], timeouts: Sequence[float | None], preempted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(ToyContext(cells=300))
    decode, lifecycle = projector_of(bench).decode, bench.core.lifecycle
    faults, found, preempt = [NoFreeCells()], list[int](), lifecycle.preempt

    def decode_with_fault(*arguments: Any, **options: Any) -> None:
        if faults:
            raise faults.pop()
        decode(*arguments, **options)

    def record(sequence: Any, **options: Any) -> None:
        found.append(sequence.key)
        preempt(sequence, **options)

    monkeypatch.setattr(projector_of(bench), "decode", decode_with_fault)
    monkeypatch.setattr(lifecycle, "preempt", record)
    prompts: list[list[int | ToyChunk]] = [[1, 2, 3], [4, 5], [6, ToyChunk(range(60, 70)), 7]]
    requests = [request_of(prompt, max_tokens=30, ignore_eos=True) for prompt in prompts]
    for key, (request, priority, timeout) in enumerate(zip(requests, priorities, timeouts, strict=True)):
        bench.submit(key, structs.replace(request, priority=priority, timeout=timeout))
        bench.core.step()
    while not found:
        cast("Any", bench.core)._media._encoder.wait(0.1)
        bench.core.step()
    run(bench)
    assert found == [preempted]
    assert [bench.outputs[key] for key in range(3)] == [alone(request, 300) for request in requests]


def test_an_encoding_that_fails_ends_only_its_request() -> None:
    bench = bench_of(ToyContext(cells=300))
    projector_of(bench).faulty = True
    bench.submit(0, request_of([1, ToyChunk(range(60, 70)), 2], max_tokens=4))
    bench.submit(1, request_of([1, 2, 3], max_tokens=4))
    run(bench)
    assert isinstance(bench.ends[0], Failed)
    assert len(bench.outputs[1]) == 4


def test_the_encoder_keeps_its_capacity_and_frees_the_projector() -> None:
    projector = ToyProjector()
    encoder = MediaEncoder(projector, 250)
    wanted = [WantedRun("", MediaRun(0, bytes([key]), ToyChunk(range(10)))) for key in range(4)]
    wanted.append(wanted[0]._replace(namespace=uncached_namespace(7)))
    for each in wanted:
        encoder.want([each])
        while encoder.result(each) is None:
            encoder.wait(0.1)
    encoder.want([])
    assert [encoder.result(each) is not None for each in wanted] == [False, False, False, True, False]
    encoder.close()
    assert projector.closed


def test_a_text_with_markers_becomes_a_prompt_with_runs() -> None:
    reader = MediaReader(ToyProjector(), ToyVocab())
    image = png()
    prompt = reader.read(f"AB{reader.marker}C{reader.marker}D", [image, png(seed=1)])
    assert [run.start for run in prompt.runs] == [3, 16]
    assert without_runs(prompt.tokens, prompt.runs) == [1, 2, 48, 49, 3, 48, 49, 4]
    assert all(token < 0 for run in prompt.runs for token in prompt.tokens[run.start : run.end])
    again = reader.read(f"X{reader.marker}", [image])
    assert again.tokens[2:12] == prompt.tokens[3:13] != prompt.tokens[16:26]
    with pytest.raises(UnreadableMedia, match="exactly once"):
        reader.read("A", [image])
    TokenCheck()(Request(prompt=prompt.tokens, media=prompt.runs), VOCABULARY)
    with pytest.raises(RequestRefused, match="outside"):
        TokenCheck()(Request(prompt=prompt.tokens), VOCABULARY)


def sound(seconds: float = 0.2, rate: int = 16_000) -> bytes:
    """Returns a WAV file of silence."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(bytes(2 * int(seconds * rate)))
    return file.getvalue()


JPEG = b"\xff\xd8\xff\xe0\x00\x04xx\xff\xc0\x00\x0b\x08\x00\x10\x00\x20\x01\x01\x11\x00"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(bytes(MAX_FILE_BYTES + 1), "bytes; at most", id="large"),
        pytest.param(b"", "supported types", id="empty"),
        pytest.param(b"RIFF\0\0\0\0WEBPVP8 ", "supported types", id="webp"),
        pytest.param(png()[:-30], "too early", id="cut"),
        pytest.param(png()[:20], "too early", id="cut-header"),
        pytest.param(png_of(16, 16, b"\0" * 99), "too early", id="short"),
        pytest.param(png_of(30_000, 30_000, b""), "30000 x 30000 pixels; at most", id="many-pixels"),
        pytest.param(png_of(8, 8, bytes(10**7)), "more data than its size needs", id="bomb"),
        pytest.param(png_of(1, 500, bytes(2_000)), "ratio", id="narrow"),
        pytest.param(png_of(0, 5, b""), "0 x 5", id="no-pixels"),
        pytest.param(png()[:28] + b"\xff" + png()[29:], "header is invalid", id="interlace-method"),
        pytest.param(png().replace(zlib.compress(b"")[:2], b"\0\0", 1), "damaged", id="not-deflated"),
        pytest.param(JPEG[:12], "too early", id="cut-jpeg"),
        pytest.param(JPEG + b"\xff\xda" * 100, "scans", id="many-scans"),
        pytest.param(JPEG.replace(b"\x00\x10\x00\x20", b"\xff\xff\xff\xff"), "65535 x 65535", id="large-jpeg"),
        pytest.param(b"GIF89a\xff\xff\xff\xff", "65535 x 65535", id="large-gif"),
        pytest.param(sound(0.01), "0.1 to 600 seconds", id="short-sound"),
        pytest.param(sound(0.2, 100), "channels", id="slow-sound"),
        pytest.param(sound()[:20], "cannot be read", id="cut-sound"),
    ],
)
def test_bad_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(UnreadableMedia, match=message):
        check_file(data)


def test_good_files_are_accepted() -> None:
    for data in (png(), png(1, 1), JPEG, b"GIF87a\x10\x00\x10\x00"):
        assert check_file(data) == (data, False)
    assert check_file(sound()) == (sound(), True)
    lying = sound()[:40] + b"\xff\xff\xff\x7f" + sound()[44:]
    assert check_file(lying) == (sound(), True), "the header's size is corrected"
