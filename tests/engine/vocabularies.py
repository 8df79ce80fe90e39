"""Vocabularies whose tokens are more than a character, for grammars."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from engine.backend import Vocab
from engine.grammar import Form, Grammar, Grammars
from tests.toy import END, VOCABULARY, ToyVocab


class PairVocab(ToyVocab):
    """As the toy's, but the last tokens are two letters each, so that a text can be cut in several ways."""

    PAIRS = ("AB", "CD", "AA", "BC", "EF", "GH", "AC", "BD", "DE")

    def piece(self, token: int) -> bytes:
        pair = token - (VOCABULARY - len(self.PAIRS))
        return self.PAIRS[pair].encode() if pair >= 0 else super().piece(token)

    def text(self, token: int) -> str:
        return self.piece(token).decode() if token != END else super().text(token)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return longest(text, {self.piece(token).decode(): token for token in range(1, VOCABULARY)})


class AsciiVocab:
    """ASCII, some words, and three special tokens, two of which end a text."""

    WORDS = ('{"', '":', '"}', '", "', "true", "null", "name", "age", ' "', "<b>", "café")
    SPECIAL = ("<|end|>", "<|stop|>", "<|call|>")
    kind = 0
    added = (-1, -1)

    def __init__(self) -> None:
        texts = [chr(code) for code in range(128)] + [*self.WORDS]
        self.pieces = [text.encode() for text in texts] + [b"\xc3", b"\xa9", b"\xff"]
        self.special = frozenset(range(len(self.pieces), len(self.pieces) + len(self.SPECIAL)))
        self.size = len(self.pieces) + len(self.SPECIAL)
        self.end, self.stop, self.call = sorted(self.special)
        self.ends = frozenset({self.end, self.stop})
        self._known = {text: token for token, text in enumerate(texts)}

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return longest(text, self._known)

    def piece(self, token: int) -> bytes:
        return b"" if token in self.special else self.pieces[token]

    def text(self, token: int) -> str:
        return self.SPECIAL[token - self.end] if token in self.special else self.pieces[token].decode("latin-1")


def longest(text: str, known: dict[str, int]) -> list[int]:
    """At every place the longest token."""
    tokens = []
    while text:
        size = next(size for size in range(8, 0, -1) if text[:size] in known)
        tokens.append(known[text[:size]])
        text = text[size:]
    return tokens


ASCII = AsciiVocab()
PAIRS = PairVocab()


MADE: dict[int, Grammars] = {}
"""For each vocabulary, as its tokenizer need not be made again."""


def grammar(form: Form, vocab: Vocab = ASCII) -> Grammar:
    """`form` compiled."""
    return asyncio.run(MADE.setdefault(id(vocab), Grammars(vocab)).compile(form))


def bytes_of(tokens: Iterable[int], vocab: Vocab = ASCII) -> bytes:
    """What tokens stand for."""
    return b"".join(map(vocab.piece, tokens))
