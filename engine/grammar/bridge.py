"""A model's vocabulary as llguidance wants to know it: the bytes of every token, and how texts become tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

from llguidance import LLTokenizer

from engine.backend import Vocab

MARK = b"\xff"
"""What llguidance knows a special token by: no text has this byte, so no text is taken for one."""


BLOCK = 1024
"""Characters of a forced text that are tokenized at once. In each step all that is still forced is to be, on whatever
thread: in blocks from its end, so that most are known from the step before and none needs much of a stack."""
KNOWN = 512
"""Blocks whose tokens are kept."""


class _Tokens:
    """What `LLTokenizer` reads of a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        pieces = (vocab.piece(token) for token in range(vocab.size))
        self.tokens = [b"" if piece.startswith(MARK) else piece for piece in pieces]
        for token in vocab.special:
            self.tokens[token] = MARK + vocab.text(token).encode()
        self.eos_token_id = min(vocab.ends, default=0)
        self.bos_token_id = None
        self.special_token_ids: Sequence[int] = sorted(vocab.special)
        self._block = lru_cache(KNOWN)(self._written)

    def __call__(self, text: str) -> list[int]:
        """The tokens in which a forced text is written: together exactly its bytes, or no token would be permitted.

        Never raises, as the caller is native code.
        """
        starts = range(len(text) % BLOCK - BLOCK, len(text), BLOCK)
        return [token for start in starts for token in self._block(text[max(0, start) : start + BLOCK])]

    def _written(self, text: str) -> list[int]:
        """Some vocabularies put a space before every text, which a line break in front keeps apart."""
        wanted = text.encode()
        for lead in ("", "\n"):
            try:
                tokens = self._vocab.tokenize(lead + text, special=False)
            except Exception:  # the model is closed, or the vocabulary knows no such text
                continue
            size = sum(len(self.tokens[token]) for token in tokens)
            while size > len(wanted):
                size -= len(self.tokens[tokens.pop(0)])
            if b"".join(self.tokens[token] for token in tokens) == wanted:
                return tokens
        return self._spelled(wanted)

    def _spelled(self, text: bytes) -> list[int]:
        """At every place the longest token; bytes for which there is none are left out."""
        tokens, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._by_bytes), None)
            if end is not None:
                tokens.append(self._by_bytes[text[start:end]])
            start = end or start + 1
        return tokens

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {piece: token for token, piece in enumerate(self.tokens) if piece and not piece.startswith(MARK)}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._by_bytes), default=0)


def tokenizer(vocab: Vocab) -> LLTokenizer:
    """The tokenizer of a model; takes some tenths of a second for a large vocabulary."""
    known = _Tokens(vocab)
    return LLTokenizer(known, eos_token=sorted(vocab.ends) or None)  # type: ignore[arg-type]
