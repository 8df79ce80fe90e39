"""Images for the toy context: a projector without pixels, and prompts with images among their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.backend import NativeFault, NoFreeCells
from engine.contract import Request
from engine.media import (
    Embeddings,
    MediaChunk,
    MediaEncoder,
    MediaPiece,
    MediaRun,
    WantedRun,
    content_key,
    pseudo_tokens,
)
from tests.toy import Cell, ToyContext


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
        self.encoded: list[int] = []  # the first token of each encoded chunk
        self.faulty = False
        self.closed = False

    def read(self, data: bytes) -> Sequence[MediaPiece]:
        """Returns an opening token, an image that depends on the number of bytes, and a closing token."""
        return [[48], ToyChunk(range(100 + len(data) % 50, 110 + len(data) % 50)), [49]]

    def encode(self, chunk: MediaChunk) -> Embeddings:
        """Returns one row for each embedding: its token, its index, and the length of the chunk."""
        assert isinstance(chunk, ToyChunk)
        self.encoded.append(chunk.tokens[0])
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
        if (fault := context.faults(context.decodes)) is not None:
            raise fault
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


class BlockingEncoder(MediaEncoder):
    """Ends each call of `want` with all runs encoded, so that the steps of a test do not depend on threads."""

    def want(self, wanted: Sequence[WantedRun]) -> None:
        """Blocks until the wanted runs are encoded."""
        super().want(wanted)
        for each in wanted:
            while self.result(each) is None:
                self.wait(1.0)


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
