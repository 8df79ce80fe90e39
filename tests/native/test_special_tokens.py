"""Texts cut at special tokens: the same tokens as those of the whole text, in linear time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.llama import open_vocabulary, special_tokens
from engine.llama.special_tokens import SpecialToken, SpecialTokenSplitter
from engine.llama.vocab import LlamaVocab
from tests.conftest import MODEL

MODELS = [MODEL, MODEL.with_name("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf")]


@pytest.fixture(scope="module", params=MODELS, ids=["smollm2", "qwen2.5"])
def vocab(request: pytest.FixtureRequest) -> Iterator[LlamaVocab]:
    path: Path = request.param
    if not path.exists():
        pytest.skip(f"{path.name} is not downloaded")
    with open_vocabulary(path) as vocab:
        assert isinstance(vocab, LlamaVocab)
        yield vocab


@pytest.mark.parametrize("special", [True, False])
def test_pieces_have_the_tokens_of_the_whole_text(
    vocab: LlamaVocab, special: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [*(vocab.text(token) for token in vocab.special), "<|im_", "<|", "|>", "<", " ", "\n", "é", "x", "word "]
    generator = random.Random(7)
    monkeypatch.setattr(special_tokens, "PIECE_BYTES", 40)
    monkeypatch.setattr("engine.llama.vocab.PIECE_BYTES", 40)
    for length in (1, 10, 100, 300):
        text = "".join(generator.choice(parts) for _ in range(length))
        assert vocab.tokenize(text, special=special) == vocab._tokenize(text.encode(), add=special, parse=special)


def test_pieces_are_short(vocab: LlamaVocab) -> None:
    pieces = list(vocab._special_splitter.split(b"<|im_end|>x" * 100_000))
    assert max(map(len, pieces)) <= special_tokens.PIECE_BYTES + len(b"<|im_end|>x<|im_end|>")


def test_the_longest_token(vocab: LlamaVocab) -> None:
    assert 16 < vocab.longest_token <= 512


def partition(tokens: list[SpecialToken], text: bytes) -> list[bytes]:
    """Returns special tokens and the texts between them as the library does (`tokenizer_st_partition`)."""
    parts = [(False, text)] if text else []
    for token in tokens:
        found: list[tuple[bool, bytes]] = []
        for is_token, part in parts:
            while not is_token and token.text in part:
                before, _, part = part.partition(token.text)
                before = before.rstrip() if token.strips_left else before
                found += [(False, before), (True, token.text)]
                part = part.lstrip() if token.strips_right else part
            found.append((is_token, part))
        parts = [each for each in found if each[1]]
    return [part for _, part in parts]


TOKENS = st.builds(SpecialToken, st.text("ab <", min_size=1, max_size=4).map(str.encode), st.booleans(), st.booleans())


@settings(max_examples=300, deadline=None)
@given(
    st.lists(TOKENS, max_size=6, unique_by=lambda token: token.text),
    st.lists(st.text("ab <", max_size=5), max_size=12),
    st.randoms(use_true_random=False),
)
def test_any_special_tokens(tokens: list[SpecialToken], words: list[str], order: random.Random) -> None:
    """The library's order of tokens of one length is arbitrary."""
    order.shuffle(tokens)
    tokens.sort(key=lambda token: -len(token.text))
    text = b"".join(order.choice([word.encode(), *(token.text for token in tokens)]) for word in words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(special_tokens, "PIECE_BYTES", 1)
        pieces = list(SpecialTokenSplitter(tokens).split(text))
    assert b"".join(pieces) == text
    assert [part for piece in pieces for part in partition(tokens, piece)] == partition(tokens, text)
