"""Checks of images and sounds before a native library decodes them: type, sizes, and the length of compressed data.

Only types whose headers give the decoded size are accepted, because the library itself has no limit.
"""

from __future__ import annotations

import io
import struct
import wave
import zlib
from typing import NamedTuple

from engine.media.values import UnreadableMedia

MAX_FILE_BYTES = 8 * 2**20
MAX_PIXELS, MAX_SIDE_PIXELS, MAX_ASPECT_RATIO = 25_000_000, 16_384, 100
# Each scan of a progressive JPEG takes time in proportion to its pixels; encoders write about ten.
MAX_JPEG_SCANS = 64
MIN_SOUND_SECONDS, MAX_SOUND_SECONDS = 0.1, 600.0
# In samples per second.
SAMPLE_RATES = range(8_000, 192_001)

_PNG = b"\x89PNG\r\n\x1a\n"
# Samples per pixel, by PNG's colour type.
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# The markers SOF0 to SOF15. 0xC4 and 0xCC begin tables, 0xC8 is reserved.
_JPEG_STARTS_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_START_OF_SCAN = 0xDA
_TRUNCATED = "The image is damaged: its data end too early."


class CheckedFile(NamedTuple):
    """A file that can be decoded in bounded time and memory."""

    data: bytes
    is_sound: bool


def check_file(data: bytes) -> CheckedFile:
    """Returns the checked file; a sound gets a new header. Raises UnreadableMedia."""
    if len(data) > MAX_FILE_BYTES:
        raise UnreadableMedia(f"The file has {len(data)} bytes; at most {MAX_FILE_BYTES} are accepted.")
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return CheckedFile(_checked_sound(data), is_sound=True)
    try:
        _check_image(data)
    except (struct.error, IndexError):
        raise UnreadableMedia(_TRUNCATED) from None
    return CheckedFile(data, is_sound=False)


def _check_image(data: bytes) -> None:
    if data.startswith(_PNG):
        _check_png(data)
    elif data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data)
    elif data[:6] in (b"GIF87a", b"GIF89a"):
        _check_size(*struct.unpack_from("<HH", data, 6))
    elif data[:2] == b"BM" and struct.unpack_from("<I", data, 14)[0] >= 40:
        width, height = struct.unpack_from("<ii", data, 18)
        _check_size(width, abs(height))
    else:
        raise UnreadableMedia("The file is none of the supported types: PNG, JPEG, GIF, BMP or WAV.")


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise UnreadableMedia(f"The image has {width} x {height} pixels; both sides need at least one.")
    too_long = max(width, height) > min(MAX_SIDE_PIXELS, MAX_ASPECT_RATIO * min(width, height))
    if too_long or width * height > MAX_PIXELS:
        raise UnreadableMedia(
            f"The image has {width} x {height} pixels; at most {MAX_PIXELS} pixels are accepted, with sides of at most "
            f"{MAX_SIDE_PIXELS} and an aspect ratio of at most {MAX_ASPECT_RATIO}. Send a smaller image."
        )


def _check_png(data: bytes) -> None:
    """Raises UnreadableMedia unless the header is valid and the compressed data have the length that it implies."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    _check_size(width, height)
    if data[12:16] != b"IHDR" or colour not in _PNG_SAMPLES or depth not in (1, 2, 4, 8, 16) or interlaced > 1:
        raise UnreadableMedia("The image is damaged: its PNG header is invalid.")
    needed = height * (1 + -(-width * depth * _PNG_SAMPLES[colour] // 8))
    at, inflater, size = len(_PNG), zlib.decompressobj(), 0
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        if at + length + 12 > len(data):
            raise UnreadableMedia(_TRUNCATED)
        if kind == b"IEND":
            break
        if kind == b"IDAT":
            # An interlaced image has more rows, each with one more byte, as it is stored in seven passes.
            size += _inflated_size(inflater, data[at + 8 : at + 8 + length], needed * (1 + interlaced) + 64 - size)
        at += length + 12
    if size < needed:
        raise UnreadableMedia(_TRUNCATED)


def _inflated_size(inflater: zlib._Decompress, data: bytes, limit: int) -> int:
    """Returns the number of decompressed bytes of `data`. Raises UnreadableMedia for more than `limit` bytes."""
    size = 0
    try:
        while data:
            size += len(inflater.decompress(data, 2**20))
            if size > limit:
                raise UnreadableMedia("The image is damaged: it has more data than its size needs.")
            data = inflater.unconsumed_tail
    except zlib.error as error:
        raise UnreadableMedia(f"The image is damaged: {error}.") from None
    return size


def _check_jpeg(data: bytes) -> None:
    if data.count(bytes((0xFF, _JPEG_START_OF_SCAN))) > MAX_JPEG_SCANS:
        raise UnreadableMedia(f"The image has too many scans; at most {MAX_JPEG_SCANS} are accepted.")
    at = 2
    while True:
        mark, marker, length = struct.unpack_from(">BBH", data, at)
        if mark != 0xFF or marker == _JPEG_START_OF_SCAN:
            raise UnreadableMedia("The image is damaged: its JPEG header is invalid.")
        if marker in _JPEG_STARTS_OF_FRAME:
            height, width = struct.unpack_from(">HH", data, at + 5)
            _check_size(width, height)
            return
        at += 1 if marker == 0xFF else 2 + length


def _checked_sound(data: bytes) -> bytes:
    """Returns a WAV file with the samples of `data` and a header with their true sizes. Raises UnreadableMedia."""
    try:
        with wave.open(io.BytesIO(data)) as source:
            params = source.getparams()
            samples = source.readframes(len(data))
    except (wave.Error, EOFError, struct.error) as error:
        raise UnreadableMedia(f"The sound cannot be read: {error or 'its data end too early'}.") from None
    frame = params.nchannels * params.sampwidth
    frames = len(samples) // frame if frame else 0
    if params.framerate not in SAMPLE_RATES or not 1 <= params.nchannels <= 8:
        raise UnreadableMedia("The sound must have 1 to 8 channels and 8,000 to 192,000 samples per second.")
    if not MIN_SOUND_SECONDS <= frames / params.framerate <= MAX_SOUND_SECONDS:
        raise UnreadableMedia(f"The sound must last {MIN_SOUND_SECONDS} to {MAX_SOUND_SECONDS:.0f} seconds.")
    rewritten = io.BytesIO()
    with wave.open(rewritten, "wb") as target:
        target.setnchannels(params.nchannels)
        target.setsampwidth(params.sampwidth)
        target.setframerate(params.framerate)
        target.writeframes(samples[: frames * frame])
    return rewritten.getvalue()
