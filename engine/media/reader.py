"""Converts a text with markers, and the files in place of the markers, to a prompt."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from msgspec import Struct

from engine.backend import Vocab
from engine.media.file_check import check_file
from engine.media.values import MediaRun, Projector, UnreadableMedia, content_key, pseudo_tokens
from engine.worker_pool import checkpoint


class MediaPrompt(Struct, frozen=True):
    """The tokens of a prompt, and the runs of pseudo-tokens among them."""

    tokens: tuple[int, ...]
    runs: tuple[MediaRun, ...]


class MediaReader:
    """Reads prompts with images and sounds. Any thread may use it."""

    def __init__(self, projector: Projector, vocab: Vocab) -> None:
        self._projector = projector
        self._vocab = vocab
        self.marker = f"<__media_{secrets.token_hex(16)}__>"
        """The text in place of one file. It is random, so that no text of a client contains it."""

    @property
    def vision(self) -> bool:
        """True if prompts can have images."""
        return self._projector.vision

    @property
    def audio(self) -> bool:
        """True if prompts can have sounds."""
        return self._projector.audio

    def read(self, text: str, files: Sequence[bytes]) -> MediaPrompt:
        """Returns the prompt of `text` with `files` in place of its markers. Raises UnreadableMedia.

        Texts are tokenized as by `Vocab.tokenize` with special tokens; a BOS at the start of `text` is not repeated.
        Each file takes some tenths of a second.
        """
        if (bos := self._vocab.added[0]) >= 0:
            text = text.removeprefix(self._vocab.text(bos))
        texts = text.split(self.marker)
        if len(texts) != len(files) + 1:
            raise UnreadableMedia("The chat template does not show each image and sound exactly once.")
        before, after = ([token] if token >= 0 else [] for token in self._vocab.added)
        tokens, runs = [*before], list[MediaRun]()
        for index, part in enumerate(texts):
            checkpoint()
            tokens += self._tokens(part)
            if index < len(files):
                self._append_file(files[index], tokens, runs)
        return MediaPrompt((*tokens, *after), tuple(runs))

    def _tokens(self, text: str) -> list[int]:
        """Returns the tokens of a part of the text, without those that the tokenizer adds at the ends of a text."""
        tokens = self._vocab.tokenize(text, special=True) if text else []
        before, after = self._vocab.added
        start = int(bool(tokens) and tokens[0] == before)
        return tokens[start : len(tokens) - int(len(tokens) > start and tokens[-1] == after)]

    def _append_file(self, data: bytes, tokens: list[int], runs: list[MediaRun]) -> None:
        """Appends the tokens and pseudo-tokens of a file to `tokens`, and its runs to `runs`."""
        checked = check_file(data)
        if not (self.audio if checked.is_sound else self.vision):
            raise UnreadableMedia(f"This model reads no {'sounds' if checked.is_sound else 'images'}.")
        for index, piece in enumerate(self._projector.read(checked.data)):
            if isinstance(piece, Sequence):
                tokens += piece
                continue
            run = MediaRun(len(tokens), content_key(self._projector.identity, checked.data, index), piece)
            runs.append(run)
            tokens += pseudo_tokens(run.key, piece.length)
