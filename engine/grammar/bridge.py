"""A model's vocabulary as llguidance wants to know it: the bytes of every token, and how texts become tokens."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLTokenizer

from engine.backend import Vocab

MARK = b"\xff"
"""What llguidance knows a special token by: no text has this byte, so no text is taken for one."""


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

    def __call__(self, text: str) -> list[int]:
        """Only for guesses: they are verified. Never raises, as the caller is native code."""
        try:
            return self._vocab.tokenize(text, special=False)
        except Exception:  # the model is closed
            return []


def tokenizer(vocab: Vocab) -> LLTokenizer:
    """The tokenizer of a model; takes some tenths of a second for a large vocabulary."""
    known = _Tokens(vocab)
    return LLTokenizer(known, eos_token=sorted(vocab.ends) or None)  # type: ignore[arg-type]
