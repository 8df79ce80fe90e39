"""Images in prompts on the toy context: the encoding thread, preemption, prompts, and the checks of files."""

from __future__ import annotations

import io
import struct
import wave
import zlib
from collections.abc import Sequence
from typing import Any, cast

import pytest
from msgspec import structs

from engine.adapters import uncached_namespace
from engine.backend import NoFreeCells
from engine.config import SpeculationConfig
from engine.contract import Failed, Request, RequestRefused, SamplingParams
from engine.media import (
    MAX_FILE_BYTES,
    MediaEncoder,
    MediaReader,
    MediaRun,
    UnreadableMedia,
    WantedRun,
    without_runs,
)
from engine.media.file_check import check_file
from engine.validation import TokenCheck
from tests.engine.test_same_as_alone import LAYOUTS, CoreBench, alone, context_of
from tests.native.tiny_mmproj import png, png_of
from tests.toy import VOCABULARY, ToyContext, ToyVocab
from tests.toy_media import ToyChunk, ToyProjector, request_of


@pytest.mark.parametrize("unified", LAYOUTS)
@pytest.mark.parametrize("head", [False, True], ids=["draft-model", "mtp"])
def test_batched_proposers_draft_after_an_image(head: bool, unified: bool) -> None:
    draft = None if head else context_of(unified, 300)
    speculation = SpeculationConfig(types=("draft-mtp" if head else "draft",), order="fixed")
    context = context_of(unified, 300, head=head)
    bench = CoreBench(context, draft=draft, mtp=head, speculation=speculation, noise="shared", media_bytes=10**6)
    image, sampled = ToyChunk(range(60, 90)), SamplingParams(temperature=1.0, seed=3)
    requests = [request_of([1, 2, image, 3, image, key], max_tokens=30, sampling=sampled) for key in (4, 5)]
    for key, request in enumerate(requests):
        bench.submit(key, request)
    bench.run()
    bench.close()
    assert [bench.outputs[key] for key in range(2)] == [alone(request, 300)[0] for request in requests]
    (stats,) = bench.speculative_decoding.draft_stats
    assert stats.drafted
    assert stats.accepted or not head, "the toy draft model does not know the image, on which the next token depends"


def test_one_image_in_two_turns_is_encoded_once_and_not_across_salts() -> None:
    context = ToyContext(cells=300)
    bench = CoreBench(context, media_bytes=10**6)
    image = ToyChunk(range(60, 90))
    for key, salt in enumerate(["", "", "other"]):
        bench.submit(key, request_of([1, 2, image, *range(3, 5 + key)], max_tokens=4, salt=salt))
        bench.run()
    cached = [cast("Any", bench.ends[key]).usage.cached for key in range(3)]
    assert cached == [0, 34, 0]
    assert len(bench.projector.encoded) == 2
    bench.close()


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
    bench = CoreBench(ToyContext(cells=300), media_bytes=10**6)
    decode, lifecycle = bench.projector.decode, bench.core.lifecycle
    faults, found, preempt = [NoFreeCells()], list[int](), lifecycle.preempt

    def decode_with_fault(*arguments: Any, **options: Any) -> None:
        if faults:
            raise faults.pop()
        decode(*arguments, **options)

    def record(sequence: Any, **options: Any) -> None:
        found.append(sequence.key)
        preempt(sequence, **options)

    monkeypatch.setattr(bench.projector, "decode", decode_with_fault)
    monkeypatch.setattr(lifecycle, "preempt", record)
    prompts: list[list[int | ToyChunk]] = [[1, 2, 3], [4, 5], [6, ToyChunk(range(60, 70)), 7]]
    requests = [request_of(prompt, max_tokens=30, ignore_eos=True) for prompt in prompts]
    for key, (request, priority, timeout) in enumerate(zip(requests, priorities, timeouts, strict=True)):
        bench.submit(key, structs.replace(request, priority=priority, timeout=timeout))
        bench.core.step()
    while not found:
        bench.core.step()
    bench.run()
    bench.close()
    assert found == [preempted]
    assert [bench.outputs[key] for key in range(3)] == [alone(request, 300)[0] for request in requests]


@pytest.mark.parametrize("late", [[3, ToyChunk(range(80, 90)), 4], [*range(1, 31)]], ids=["image", "text"])
def test_one_owner_with_many_images_does_not_hold_up_another(
    late: Sequence[int | ToyChunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = CoreBench(ToyContext(cells=300), prompt_rows=10, media_bytes=10**6)
    decode, lengths = bench.projector.decode, list[int]()

    def record(*arguments: Any) -> None:
        lengths.append(len(bench.outputs.get(1, ())))
        decode(*arguments)

    monkeypatch.setattr(bench.projector, "decode", record)
    images = [ToyChunk(range(first, first + 10)) for first in range(100, 200, 10)]
    bench.submit(0, request_of([1, *images, 2], max_tokens=2, owner="a"))
    while len(lengths) < 3:
        bench.core.step()
    bench.submit(1, request_of(late, max_tokens=30, ignore_eos=True, owner="b"))
    bench.run()
    bench.close()
    assert lengths.count(0) <= 8, "the second owner has tokens before all images of the first one are decoded"


def test_encodings_are_in_the_order_of_the_prefill() -> None:
    bench = CoreBench(ToyContext(cells=300), media_bytes=10**6)
    images = [ToyChunk(range(first, first + 10)) for first in range(100, 150, 10)]
    prompts: list[list[int | ToyChunk]] = [[1, *images[:3], 2], [3, images[3], 4], [5, images[4], 6]]
    for key, prompt in enumerate(prompts):
        bench.submit(key, request_of(prompt, max_tokens=1, owner="ab"[key % 2], priority=-(key == 2)))
    for sequence in bench.core.waiting:
        sequence.submitted = 0.0  # so that the seconds between two submissions do not count
    bench.core.step()
    assert bench.projector.encoded == [140, 130, 100, 110]
    bench.run()
    bench.close()


def test_an_encoding_that_fails_ends_only_its_request() -> None:
    bench = CoreBench(ToyContext(cells=300), media_bytes=10**6)
    bench.projector.faulty = True
    bench.submit(0, request_of([1, ToyChunk(range(60, 70)), 2], max_tokens=4))
    bench.submit(1, request_of([1, 2, 3], max_tokens=4))
    bench.run()
    bench.close()
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


def flac(samples: int, rate: int = 48_000, channels: int = 2) -> bytes:
    """Returns a FLAC with a picture in its metadata, and frames that no check reads."""
    format = struct.pack(">Q", rate << 44 | channels - 1 << 41 | 15 << 36 | samples)
    return b"fLaC\0\0\0\x22" + bytes(10) + format + bytes(16) + b"\x86\0\0\x04PICT" + FRAMES


FRAMES = b"\xff\xf8FRAMES"
# A frame of 417 bytes and 1,152 samples at 44.1 kHz.
MP3 = b"\xff\xfb\x90\xc0" + bytes(413)
XING = MP3[:21] + b"Xing\0\0\0\1\xff\xff\xff\xff" + MP3[33:]
ID3 = b"ID3\4\0\0\0\0\0\5title" + bytes(20)
JPEG = b"\xff\xd8\xff\xe0\x00\x04xx\xff\xc0\x00\x0b\x08\x00\x10\x00\x20\x01\x01\x11\x00"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(bytes(MAX_FILE_BYTES + 1), "bytes; at most", id="large"),
        pytest.param(b"", "supported types", id="empty"),
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
        pytest.param(sound()[:20], "cannot be read: its data end too early", id="cut-sound"),
        pytest.param(b"RIFF$\0\0\0WAVEJUNK\xff\0\0\0" + bytes(20), "cannot be read", id="long-chunk"),
        pytest.param(MP3 * 3, "0.1 to 600 seconds", id="short-mp3"),
        pytest.param(XING * 20, "0.1 to 600 seconds", id="mp3-without-sound"),
        pytest.param(MP3 * 24_000 + b"x", "at most", id="large-mp3"),
        pytest.param(b"\xff\xf3\x14\xc4" + bytes(20), "0.1 to 600", id="slow-mp3"),
        pytest.param(MP3 * 9 + b"x" * 2_000 + MP3 * 9, "0.2 seconds are followed by no MP3 frame", id="damaged-mp3"),
        pytest.param(ID3 + b"x", "layer III", id="mp3-without-frames"),
        pytest.param(flac(0), "no number of samples", id="flac-of-unknown-length"),
        pytest.param(flac(48_000 * 601), "0.1 to 600 seconds", id="long-flac"),
        pytest.param(flac(90_000_000, 192_000), "180000000 samples; at most", id="flac-of-many-samples"),
        pytest.param(flac(48_000)[:40], "cannot be read", id="cut-flac"),
    ],
)
def test_bad_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(UnreadableMedia, match=message):
        check_file(data)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"RIFF\0\0\0\0WEBPVP8 ", "WebP"),
        (b"\0\0\0\x1cftypheic", "HEIC"),
        (b"\0\0\0\x1cftypavif", "AVIF"),
        (b"\0\0\0\x1cftypisom", "MP4 or M4A"),
        (b"II*\0", "TIFF"),
        (b'<?xml version="1.0"?>\n<!-- a --><svg>', "SVG"),
        (b"OggS", "Ogg"),
        (b"\xff\xf1\x50\x80", "AAC"),
        (b"%PDF-1.7", "PDF"),
        (b"<!" + b"-" * 10_000, None),
    ],
)
def test_other_types_are_refused_by_name(head: bytes, kind: str | None) -> None:
    expected = f"The type {kind} cannot be decoded" if kind else "not known"
    with pytest.raises(UnreadableMedia, match=f"{expected}.*PNG, JPEG, GIF or BMP for images, WAV, MP3 or FLAC"):
        check_file(head + bytes(100))


def test_sounds_lose_tags_and_claimed_lengths() -> None:
    assert check_file(ID3 + XING + MP3 * 9 + b"TAG" + bytes(125)) == (MP3 * 9, True)
    assert check_file(MP3 * 9 + MP3[:100]) == (MP3 * 9, True)
    original = flac(48_000)
    assert check_file(original) == (b"fLaC\x80" + original[5:42] + FRAMES, True)


def test_good_files_are_accepted() -> None:
    for data in (png(), png(1, 1), JPEG, b"GIF87a\x10\x00\x10\x00"):
        assert check_file(data) == (data, False)
    assert check_file(sound()) == (sound(), True)
    lying = sound()[:40] + b"\xff\xff\xff\x7f" + sound()[44:]
    assert check_file(lying) == (sound(), True), "the header's size is corrected"
