"""A model's vocabulary for llguidance: the bytes of every token, and the tokens of forced text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

from llguidance import LLTokenizer

from engine.backend import Vocab

# llguidance's prefix of special tokens. UTF-8 never contains this byte, so no text matches a special token.
SPECIAL_PREFIX = b"\xff"

# The library tokenizes a forced text again at each step. As blocks are counted from the text's end, most of them are
# cached from the step before. Short blocks also need no deep stack.
BLOCK_CHARACTERS = 1024
CACHED_BLOCKS = 512


class _TokenizerWrapper:
    """A tokenizer with the attributes that `LLTokenizer` reads."""

    is_tokenizer_wrapper = True

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        pieces = (vocab.piece(token) for token in range(vocab.size))
        self.tokens = [b"" if piece.startswith(SPECIAL_PREFIX) else piece for piece in pieces]
        for token in vocab.special:
            self.tokens[token] = SPECIAL_PREFIX + vocab.text(token).encode()
        self.eos_token_id = min(vocab.ends, default=0)
        self.bos_token_id = None
        self.special_token_ids: Sequence[int] = sorted(vocab.special)
        self._tokenize_block = lru_cache(CACHED_BLOCKS)(self._tokenize)

    def __call__(self, text: str) -> list[int]:
        """Returns tokens whose bytes together are exactly the forced text: with other bytes the masks would permit no
        token. Never raises, as the caller is native code."""
        starts = range(len(text) % BLOCK_CHARACTERS - BLOCK_CHARACTERS, len(text), BLOCK_CHARACTERS)
        blocks = (text[max(0, start) : start + BLOCK_CHARACTERS] for start in starts)
        return [token for block in blocks for token in self._tokenize_block(block)]

    def _tokenize(self, text: str) -> list[int]:
        """Returns the model's tokens of `text` if their bytes are exactly `text`; otherwise the longest matching
        tokens.

        Some vocabularies add a space in front of a text. A line break between the two allows to drop the space's
        tokens.
        """
        expected = text.encode()
        for lead in ("", "\n"):
            try:
                tokens = self._vocab.tokenize(lead + text, special=False)
            except Exception:  # the model is closed, or the vocabulary has no tokens for the text
                continue
            size = sum(len(self.tokens[token]) for token in tokens)
            while size > len(expected):
                size -= len(self.tokens[tokens.pop(0)])
            if b"".join(self.tokens[token] for token in tokens) == expected:
                return tokens
        return self._longest_matches(expected)

    def _longest_matches(self, text: bytes) -> list[int]:
        """Returns the longest matching token at each position. Skips bytes without a token."""
        tokens, start = [], 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest_token), start, -1)
            end = next((end for end in ends if text[start:end] in self._token_by_bytes), None)
            if end is not None:
                tokens.append(self._token_by_bytes[text[start:end]])
            start = end or start + 1
        return tokens

    @cached_property
    def _token_by_bytes(self) -> dict[bytes, int]:
        tokens = enumerate(self.tokens)
        return {piece: token for token, piece in tokens if piece and not piece.startswith(SPECIAL_PREFIX)}

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._token_by_bytes), default=0)


def build_tokenizer(vocab: Vocab) -> LLTokenizer:
    """Returns the tokenizer of a model. Takes some tenths of a second for a large vocabulary, with the GIL held."""
    wrapper = _TokenizerWrapper(vocab)
    return LLTokenizer(wrapper, eos_token=sorted(vocab.ends) or None)  # type: ignore[arg-type]
