"""Vocabularies with tokens of more than one character, for tests of grammars."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from engine.backend import Vocab
from engine.grammar import Grammar, GrammarCompiler, GrammarSpec
from tests.toy import END, VOCABULARY, ToyVocab


class PairVocab(ToyVocab):
    """The toy's vocabulary, except that the last tokens are two letters each: a text has several tokenizations."""

    PAIRS = ("AB", "CD", "AA", "BC", "EF", "GH", "AC", "BD", "DE")

    def piece(self, token: int) -> bytes:
        pair = token - (VOCABULARY - len(self.PAIRS))
        return self.PAIRS[pair].encode() if pair >= 0 else super().piece(token)

    def text(self, token: int) -> str:
        return self.piece(token).decode() if token != END else super().text(token)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return longest_tokens(text, {self.piece(token).decode(): token for token in range(1, VOCABULARY)})


class AsciiVocab:
    """A vocabulary of ASCII, some words, and three special tokens, two of which are end tokens."""

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
        self._tokens = {text: token for token, text in enumerate(texts)}

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return longest_tokens(text, self._tokens)

    def piece(self, token: int) -> bytes:
        return b"" if token in self.special else self.pieces[token]

    def text(self, token: int) -> str:
        return self.SPECIAL[token - self.end] if token in self.special else self.pieces[token].decode("latin-1")


def longest_tokens(text: str, tokens_by_text: dict[str, int]) -> list[int]:
    """Returns a tokenization of `text` with the longest token at each position."""
    tokens = []
    while text:
        size = next(size for size in range(8, 0, -1) if text[:size] in tokens_by_text)
        tokens.append(tokens_by_text[text[:size]])
        text = text[size:]
    return tokens


ASCII = AsciiVocab()
PAIRS = PairVocab()


# One compiler for each vocabulary, because building a tokenizer takes long.
_COMPILERS: dict[int, GrammarCompiler] = {}


def grammar(spec: GrammarSpec, vocab: Vocab = ASCII) -> Grammar:
    """Returns the compiled grammar of `spec`."""
    return asyncio.run(_COMPILERS.setdefault(id(vocab), GrammarCompiler(vocab)).compile(spec))


def bytes_of(tokens: Iterable[int], vocab: Vocab = ASCII) -> bytes:
    """Returns the bytes of all tokens together."""
    return b"".join(map(vocab.piece, tokens))
