"""Runs of pseudo-tokens, which stand for images and sounds in prompts, and the protocol of a projector."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

# The vectors of one run, [tokens, width of the model].
Embeddings = NDArray[np.float32]


class UnreadableMedia(ValueError):
    """A file is no image or sound that can be read. The message is a sentence for the client."""


class MediaChunk(Protocol):
    """A part of an image or a sound, ready to be encoded: an image can have several, as tiles."""

    @property
    def length(self) -> int:
        """Number of its embeddings."""

    @property
    def causal(self) -> bool:
        """False if each embedding attends to all others of the chunk; these are then decoded together."""


# A part of what a file becomes in a prompt: the tokens of a text, or a chunk.
MediaPiece = Sequence[int] | MediaChunk


class MediaRun(Struct, frozen=True, eq=False):
    """The pseudo-tokens from `start` on in a prompt, which stand for the embeddings of `chunk`."""

    start: int
    key: bytes
    """Identifies the content of the chunk and the projector."""
    chunk: MediaChunk

    @property
    def end(self) -> int:
        """The position after the last pseudo-token."""
        return self.start + self.chunk.length


class Projector(Protocol):
    """An opened projector of one model. `read` may be called on any thread, `encode` on one at a time, `decode` on the
    engine thread."""

    @property
    def vision(self) -> bool:
        """True if it reads images."""

    @property
    def audio(self) -> bool:
        """True if it reads sounds."""

    @property
    def identity(self) -> bytes:
        """Digest of everything besides a file on which its embeddings depend."""

    def read(self, data: bytes) -> Sequence[MediaPiece]:
        """Returns the pieces of a file that `check_file` has accepted. Raises UnreadableMedia."""

    def encode(self, chunk: MediaChunk) -> Embeddings:
        """Returns the embeddings of a chunk. Raises NativeFault."""

    def decode(self, seq: int, start: int, embeddings: Embeddings, *, causal: bool) -> None:
        """Appends cells of `embeddings` to the sequence `seq` of the model's context, which has `start` positions.

        Raises NoFreeCells with nothing changed, Aborted or NativeFault.
        """

    def close(self) -> None:
        """Frees the native objects. No other method may be running or be called later."""


def without_runs(prompt: Sequence[int], runs: Sequence[MediaRun]) -> Sequence[int]:
    """Returns the tokens of a prompt without those of `runs`: the text."""
    starts, ends = [0, *(run.end for run in runs)], [*(run.start for run in runs), len(prompt)]
    return prompt if not runs else [t for start, end in zip(starts, ends, strict=True) for t in prompt[start:end]]


def content_key(identity: bytes, data: bytes, part: int) -> bytes:
    """Returns the key of part `part` of the file `data` with the projector of this identity."""
    content = hashlib.blake2b(data, digest_size=32).digest()
    return hashlib.blake2b(identity + content + part.to_bytes(4, "little"), digest_size=32).digest()


def pseudo_tokens(key: bytes, length: int) -> list[int]:
    """Returns the `length` negative token ids of a run. Runs with equal keys have equal ids, others different ones."""
    ids = np.frombuffer(hashlib.shake_256(key).digest(4 * length), "<i4")
    return [int(token) for token in ids | np.int32(-(2**31))]
