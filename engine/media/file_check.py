"""Checks of files before a native library decodes them: type, sizes of images, and the length of compressed data.

Only types whose headers or frames give the decoded size are accepted, because the library itself has no limit.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

from engine.media.sound_check import checked_sound
from engine.media.values import UnreadableMedia

MAX_FILE_BYTES = 8 * 2**20
MAX_PIXELS, MAX_SIDE_PIXELS, MAX_ASPECT_RATIO = 25_000_000, 16_384, 100
# Each scan of a progressive JPEG takes time in proportion to its pixels; encoders write about ten.
MAX_JPEG_SCANS = 64
# Compressed data are decompressed in pieces, of which the unused rest is copied.
_INFLATE_BYTES = 2**16

SUPPORTED_TYPES = "PNG, JPEG, GIF or BMP for images, WAV, MP3 or FLAC for sounds"
# The first bytes of common types that the native library cannot read.
_OTHER_TYPES = {
    "WebP": rb"RIFF....WEBP",
    "AVIF": rb"....ftypavi[fs]",
    "HEIC": rb"....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "TIFF": rb"II\*\0|MM\0\*",
    "SVG": rb"(\xef\xbb\xbf)?\s*<[?!s].*?svg",
    "PDF": rb"%PDF-",
    "Ogg": rb"OggS",
    "AAC": rb"\xff[\xf0\xf1\xf8\xf9]|ADIF",
    "AIFF": rb"FORM....AIF[FC]",
    "MP4 or M4A": rb"....ftyp",
    "WebM or Matroska": rb"\x1a\x45\xdf\xa3",
}
# Bytes of a file that are searched for its type.
_MAGIC_BYTES = 4096
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
    """Returns the checked file; a sound is that of `checked_sound`. Raises UnreadableMedia."""
    if len(data) > MAX_FILE_BYTES:
        raise UnreadableMedia(f"The file has {len(data)} bytes; at most {MAX_FILE_BYTES} are accepted.")
    if (sound := checked_sound(data)) is not None:
        return CheckedFile(sound, is_sound=True)
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
        head = data[:_MAGIC_BYTES]
        kind = next((name for name, magic in _OTHER_TYPES.items() if re.match(magic, head, re.DOTALL)), None)
        found = f"The type {kind} cannot be decoded" if kind else "The type of the file is not known"
        raise UnreadableMedia(f"{found}. The supported types are {SUPPORTED_TYPES}.")


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
    view, needed = memoryview(data), height * (1 + -(-width * depth * _PNG_SAMPLES[colour] // 8))
    at, inflater, size = len(_PNG), zlib.decompressobj(), 0
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        if at + length + 12 > len(data):
            raise UnreadableMedia(_TRUNCATED)
        if kind == b"IEND":
            break
        if kind == b"IDAT":
            # An interlaced image has more rows, each with one more byte, as it is stored in seven passes.
            size += _inflated_size(inflater, view[at + 8 : at + 8 + length], needed * (1 + interlaced) + 64 - size)
        at += length + 12
    if size < needed:
        raise UnreadableMedia(_TRUNCATED)


def _inflated_size(inflater: zlib._Decompress, data: memoryview, limit: int) -> int:
    """Returns the number of decompressed bytes of `data`. Raises UnreadableMedia for more than `limit` bytes."""
    size = 0
    try:
        for at in range(0, len(data), _INFLATE_BYTES):
            rest: bytes | memoryview = data[at : at + _INFLATE_BYTES]
            while rest:
                size += len(inflater.decompress(rest, 2**20))
                if size > limit:
                    raise UnreadableMedia("The image is damaged: it has more data than its size needs.")
                rest = inflater.unconsumed_tail
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
