"""Runs of pseudo-tokens, which stand for images and sounds in prompts, and the protocol of a projector."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

# The vectors of one run, [pseudo-tokens, input width of the model].
Embeddings = NDArray[np.float32]


class UnreadableMedia(ValueError):
    """A file cannot be read as an image or sound. The message is a sentence for the client."""


class MediaChunk(Protocol):
    """A part of an image or a sound, ready to be encoded. Some projectors divide an image into several, as tiles."""

    @property
    def length(self) -> int:
        """Number of embeddings of the chunk."""

    @property
    def causal(self) -> bool:
        """False if each embedding attends to all others of the chunk, so that all must be decoded together."""


# One of the parts that represent a file in a prompt: the tokens of a text, or a chunk.
MediaPiece = Sequence[int] | MediaChunk


class MediaRun(Struct, frozen=True, eq=False):
    """The pseudo-tokens of a prompt from position `start` on, in place of the embeddings of `chunk`."""

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
        """True if the projector reads images."""

    @property
    def audio(self) -> bool:
        """True if the projector reads sounds."""

    @property
    def identity(self) -> bytes:
        """Digest of the projector's file and settings, which determine the embeddings of a given image or sound."""

    def read(self, data: bytes) -> Sequence[MediaPiece]:
        """Returns the pieces of a file that `check_file` has accepted. Raises UnreadableMedia."""

    def encode(self, chunk: MediaChunk) -> Embeddings:
        """Returns the embeddings of a chunk. Raises NativeFault."""

    def decode(self, seq: int, start: int, embeddings: Embeddings, run: MediaRun) -> None:
        """Appends one cell for each of `embeddings`, those of `run` from position `start` of the prompt on, to the
        sequence `seq` of the model's context, which has `start` positions. Raises NoFreeCells with nothing changed,
        Aborted or NativeFault."""

    def close(self) -> None:
        """Frees the native objects. No other method may run at the same time or later."""


def without_runs(prompt: Sequence[int], runs: Sequence[MediaRun]) -> Sequence[int]:
    """Returns the tokens of a prompt without the pseudo-tokens of `runs`."""
    starts, ends = [0, *(run.end for run in runs)], [*(run.start for run in runs), len(prompt)]
    return prompt if not runs else [t for start, end in zip(starts, ends, strict=True) for t in prompt[start:end]]


def content_key(identity: bytes, data: bytes, index: int) -> bytes:
    """Returns the key of the piece number `index` that the projector with `identity` makes of the file `data`."""
    content = hashlib.blake2b(data, digest_size=32).digest()
    return hashlib.blake2b(identity + content + index.to_bytes(4, "little"), digest_size=32).digest()


def pseudo_tokens(key: bytes, length: int) -> list[int]:
    """Returns `length` negative token ids for a run. Equal keys have equal ids, and different keys different ids."""
    ids = np.frombuffer(hashlib.shake_256(key).digest(4 * length), "<i4")
    return [int(token) for token in ids | np.int32(-(2**31))]
