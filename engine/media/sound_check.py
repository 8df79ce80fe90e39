"""Checks of sounds, WAV, MP3 and FLAC, before a native library decodes them.

A checked sound is a new file without the tags and sizes of the old one: the library allocates as many samples as a
header claims, and ends the process if that fails.
"""

from __future__ import annotations

import io
import re
import struct
import wave
from typing import NamedTuple

from engine.media.values import UnreadableMedia

MIN_SOUND_SECONDS, MAX_SOUND_SECONDS = 0.1, 600.0
# In samples per second.
SAMPLE_RATES = range(8_000, 192_001)
MAX_CHANNELS = 8
# Maximum samples of all channels of a FLAC, whose size does not bound them: 600 s of 48 kHz stereo.
MAX_FLAC_SAMPLES = 57_600_000

# Bit rates of MPEG-1 and MPEG-2 layer III, in units of 8 kbit/s.
_BIT_RATES = (
    (0, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40),
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20),
)
_MP3_RATES = (44_100, 48_000, 32_000)
# The first bytes of what may follow the last frame of an MP3: tags, and padding.
_MP3_TRAILERS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3", b"\0")
_MAX_MP3_FRAME_BYTES = 1441
# Bytes from the start of a frame on that contain its Xing or Info header, if it has one.
_MP3_INFO_BYTES = 64
_STREAM_INFO_BYTES = 34


def checked_sound(data: bytes) -> bytes | None:
    """Returns a new file with the same sound; None if `data` is no WAV, MP3 or FLAC. Raises UnreadableMedia."""
    try:
        if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
            return _checked_wav(data)
        if data[:4] == b"fLaC":
            return _checked_flac(data)
        if data[:3] == b"ID3" or _Mp3Frame.of(data, 0) is not None:
            return _checked_mp3(data)
    except (wave.Error, EOFError, struct.error, RuntimeError) as error:  # RuntimeError: a chunk larger than the file
        raise UnreadableMedia(f"The sound cannot be read: {str(error) or 'its data end too early'}.") from None
    return None


def _check_format(samples: int, rate: int, channels: int) -> None:
    """Raises UnreadableMedia unless channels, rate and duration are accepted. `samples` are those of one channel."""
    if rate not in SAMPLE_RATES or not 1 <= channels <= MAX_CHANNELS:
        raise UnreadableMedia(
            f"The sound must have 1 to {MAX_CHANNELS} channels and {SAMPLE_RATES.start:,} to {SAMPLE_RATES.stop - 1:,} "
            "samples per second."
        )
    if not MIN_SOUND_SECONDS <= samples / rate <= MAX_SOUND_SECONDS:
        raise UnreadableMedia(f"The sound must last {MIN_SOUND_SECONDS} to {MAX_SOUND_SECONDS:.0f} seconds.")


def _checked_wav(data: bytes) -> bytes:
    with wave.open(io.BytesIO(data)) as source:
        params = source.getparams()
        samples = source.readframes(len(data))
    frame = params.nchannels * params.sampwidth
    frames = len(samples) // frame if frame else 0
    _check_format(frames, params.framerate, params.nchannels)
    rewritten = io.BytesIO()
    with wave.open(rewritten, "wb") as target:
        target.setnchannels(params.nchannels)
        target.setsampwidth(params.sampwidth)
        target.setframerate(params.framerate)
        target.writeframes(samples[: frames * frame])
    return rewritten.getvalue()


def _checked_flac(data: bytes) -> bytes:
    """Returns the FLAC without metadata other than the first block, which has the number of samples."""
    blocks, at, last = list[tuple[int, bytes]](), 4, False
    while not last:
        (header,) = struct.unpack_from(">I", data, at)
        last, kind, size = bool(header >> 31), header >> 24 & 0x7F, header & 0xFFFFFF
        blocks = blocks or [(kind, data[at + 4 : at + 4 + size])]
        at += 4 + size
    kind, stream_info = blocks[0]
    if kind or len(stream_info) != _STREAM_INFO_BYTES or at >= len(data):
        raise UnreadableMedia("The sound is damaged: its FLAC header is invalid.")
    (packed,) = struct.unpack_from(">Q", stream_info, 10)
    rate, channels, samples = packed >> 44, (packed >> 41 & 7) + 1, packed & 2**36 - 1
    if not samples:
        raise UnreadableMedia("The FLAC's header has no number of samples, so its duration is not known.")
    _check_format(samples, rate, channels)
    if samples * channels > MAX_FLAC_SAMPLES:
        raise UnreadableMedia(
            f"The sound has {samples * channels} samples; at most {MAX_FLAC_SAMPLES} are accepted. Send fewer channels "
            "or samples per second."
        )
    return b"fLaC" + struct.pack(">I", 1 << 31 | _STREAM_INFO_BYTES) + stream_info + data[at:]


class _Mp3Frame(NamedTuple):
    """A frame of MPEG layer III."""

    size: int
    samples: int
    rate: int
    kind: int
    """Version and rate, which the frames of one sound share."""

    @classmethod
    def of(cls, data: bytes, at: int) -> _Mp3Frame | None:
        """Returns the frame at this position; None if there is none, or one of free format."""
        if len(data) < at + 4 or data[at] != 0xFF:
            return None
        version, bits = data[at + 1] & 0xFE, data[at + 2]  # without the bit of the checksum
        if version not in (0xE2, 0xF2, 0xFA) or bits >> 4 in (0, 15) or bits >> 2 & 3 == 3:
            return None
        halved = (version != 0xFA) + (version == 0xE2)
        samples, rate = 576 if halved else 1152, _MP3_RATES[bits >> 2 & 3] >> halved
        size = samples * 8 * _BIT_RATES[halved > 0][bits >> 4] * 125 // rate + (bits >> 1 & 1)
        return cls(size, samples, rate, version << 8 | bits & 0x0C)


def _checked_mp3(data: bytes) -> bytes:
    """Returns the frames of the MP3 without tags, and without the header that claims a number of frames."""
    at = _mp3_start(data)
    first = frame = _Mp3Frame.of(data, at)
    if first is None:
        raise UnreadableMedia("The sound is damaged: an MP3 has frames of MPEG layer III, not of free format.")
    begin, samples = at, 0
    while frame is not None and frame.kind == first.kind and at + frame.size <= len(data):
        info = data[at : at + _MP3_INFO_BYTES]
        at += frame.size
        if not samples and (b"Xing" in info or b"Info" in info):
            begin = at
        else:
            samples += frame.samples
        if samples > MAX_SOUND_SECONDS * first.rate:
            break
        frame = _Mp3Frame.of(data, at)
    _check_format(samples, first.rate, 1)
    if len(data) - at > _MAX_MP3_FRAME_BYTES and not data.startswith(_MP3_TRAILERS, at):
        raise UnreadableMedia(f"The sound is damaged: {samples / first.rate:.1f} seconds are followed by no MP3 frame.")
    return data[begin:at]


def _mp3_start(data: bytes) -> int:
    """Returns the position after the ID3 tags at the start, and the zeros after these."""
    at = 0
    while data.startswith(b"ID3", at) and len(data) >= at + 10:
        size = 0
        for byte in data[at + 6 : at + 10]:
            size = size << 7 | byte & 0x7F
        at += 10 + size + (10 if data[at + 5] & 0x10 else 0)
    zeros = re.compile(rb"\0*").match(data, at)
    return at if zeros is None else zeros.end()
